"""One token whose answer is known: computed after every load and every wake, before anyone is answered."""

from __future__ import annotations

import math

from runtime.engine.core import Engine
from runtime.engine.step import Launched
from runtime.errors import FirstlightError
from runtime.protocol import SamplingParams, Submit, TokenLogprobs

# The same kernels on the same weights give the same bits; this leaves room for sums in another order.
_TOLERANCE = 1e-3
_SAMPLING = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0)


class CanaryError(FirstlightError):
    """The model does not say what it must: what lies in its weights is not the model."""


def ask(engine: Engine) -> Launched:
    """Begin to compute the likeliest token after a few of token 0. The engine must have nothing to do."""
    longest = min(engine.max_model_len - 1, engine.scheduler.max_num_batched_tokens)
    prompt = [0] * min(engine.runner.usual_prompt, longest)
    return engine.launch_apart(Submit(request_id="canary", prompt_token_ids=prompt, sampling=_SAMPLING))


def answer(asked: Launched) -> TokenLogprobs:
    """Wait for the token. Raises `CanaryError` if its probability is not a number."""
    (entry,) = asked.result().logprobs
    if entry is None or not math.isfinite(entry.logprob):
        raise CanaryError("The model's first logits are not finite numbers: its weight files are damaged.")
    return entry


def check(asked: Launched, expected: TokenLogprobs) -> None:
    """Wait for the token. Raises `CanaryError` if it is not the `expected` one."""
    found = answer(asked)
    if found.token_id != expected.token_id or abs(found.logprob - expected.logprob) > _TOLERANCE:
        raise CanaryError(
            "After waking, the model did not say what it said when it was loaded "
            f"(token {found.token_id} at {found.logprob:.4f}, not {expected.token_id} at "
            f"{expected.logprob:.4f}): its weights are damaged, or their files were replaced."
        )
