"""One token whose answer is known: computed after every load and every wake, before anyone is let in."""

from __future__ import annotations

import math

from runtime.engine.core import Engine
from runtime.errors import FirstlightError
from runtime.protocol import SamplingParams, Submit, TokenLogprobs

# The same kernels on the same weights give the same bits; this leaves room for sums in another order.
_TOLERANCE = 1e-3
_SAMPLING = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0)


class CanaryError(FirstlightError):
    """The model does not say what it must: what lies in its weights is not the model."""


def ask(engine: Engine) -> TokenLogprobs:
    """The likeliest token after a few of token 0. Raises `CanaryError` if that is not a number.

    The engine must have nothing to do, and counts nothing of this.
    """
    prompt = [0] * min(engine.runner.usual_prompt, engine.max_model_len - 1)
    with engine.uncounted():
        engine.submit(Submit(request_id="canary", prompt_token_ids=prompt, sampling=_SAMPLING))
        entries = []
        while engine.has_work:
            entries += [entry for delta in engine.step().deltas for entry in delta.logprobs]
    if len(entries) != 1 or not math.isfinite(entries[0].logprob):
        raise CanaryError("The model's first logits are not finite numbers: its weight files are damaged.")
    return entries[0]


def check(engine: Engine, expected: TokenLogprobs) -> None:
    """Ask again. Raises `CanaryError` if the answer is not the `expected` one."""
    found = ask(engine)
    if found.token_id != expected.token_id or abs(found.logprob - expected.logprob) > _TOLERANCE:
        raise CanaryError(
            "After waking, the model did not say what it said when it was loaded "
            f"(token {found.token_id} at {found.logprob:.4f}, not {expected.token_id} at "
            f"{expected.logprob:.4f}): its weights are damaged, or their files were replaced."
        )
