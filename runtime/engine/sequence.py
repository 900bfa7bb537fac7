"""One sequence being generated, as the scheduler, the runner and the sampler see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.engine.blocks import BlockTable
from runtime.protocol import Submit, TokenLogprobs

if TYPE_CHECKING:
    from runtime.engine.grammar.constraint import Constraint
    from runtime.engine.penalties import PenaltyState


class Sequence:
    """A request's tokens and how far they have been computed.

    `token_ids` holds the prompt and the generated tokens that are known here; `num_pending` more have been
    sampled on the device and are on their way. `num_computed` tokens have their keys and values in the
    cache, or will have once the launched steps are through. `order` is the order of arrival, which is also
    the order of precedence. While it runs, a sequence owns one `slot`, a row of the tables on the device;
    `sampled_here` says that its last token was sampled in that slot. `position_base` is what the decoder
    wants added to its positions; `constraint` is there for requests with a grammar.
    """

    __slots__ = (
        "constraint",
        "ended",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_pending",
        "num_prompt",
        "order",
        "penalties",
        "position_base",
        "priority",
        "prompt_logprobs",
        "prompt_logprobs_left",
        "request_id",
        "sampled_here",
        "sampling",
        "seed",
        "slot",
        "stop_token_ids",
        "table",
        "taken_up",
        "token_ids",
    )

    def __init__(
        self, request: Submit, order: int, seed: int, max_model_len: int, position_base: int = 0
    ) -> None:
        self.request_id = request.request_id
        self.sampling = request.sampling
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.max_tokens = min(request.sampling.max_tokens, max_model_len - self.num_prompt)
        self.num_computed = 0
        self.num_pending = 0
        self.num_cached = 0
        self.slot = -1
        self.sampled_here = False
        self.ended = False
        self.taken_up = 0.0
        self.order = order
        self.priority = request.priority
        self.seed = seed
        self.stop_token_ids = frozenset(request.sampling.stop_token_ids)
        self.position_base = position_base
        self.table = BlockTable(request.cache_salt, position_base)
        self.penalties: PenaltyState | None = None
        self.constraint: Constraint | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.prompt_logprobs_left = request.sampling.prompt_logprobs is not None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, those on their way included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        """Generated tokens, those on their way included."""
        return len(self.token_ids) + self.num_pending - self.num_prompt
