"""One sequence being generated, as the scheduler, the runner and the sampler see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.engine.blocks import BlockTable
from runtime.protocol import Submit, TokenLogprobs

if TYPE_CHECKING:
    from runtime.engine.penalties import PenaltyState


class Sequence:
    """A request's tokens and how far they have been computed.

    `token_ids` holds prompt and generated tokens; `num_computed` of them have their keys and values
    in the cache. `order` is the order of arrival, which is also the order of precedence.
    """

    __slots__ = (
        "num_cached",
        "num_computed",
        "num_prompt",
        "order",
        "penalties",
        "prompt_logprobs",
        "prompt_logprobs_left",
        "request_id",
        "sampling",
        "seed",
        "stop_token_ids",
        "table",
        "token_ids",
    )

    def __init__(self, request: Submit, order: int, seed: int) -> None:
        self.request_id = request.request_id
        self.sampling = request.sampling
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.num_computed = 0
        self.num_cached = 0
        self.order = order
        self.seed = seed
        self.stop_token_ids = frozenset(request.sampling.stop_token_ids)
        self.table = BlockTable(request.cache_salt)
        self.penalties: PenaltyState | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.prompt_logprobs_left = request.sampling.prompt_logprobs is not None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) - self.num_prompt
