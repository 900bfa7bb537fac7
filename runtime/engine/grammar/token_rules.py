"""Which tokens a request allows at all, and which words must not come: what its masks leave of others."""

from __future__ import annotations

import numpy as np
import torch

from runtime.protocol import SamplingParams


class TokenRules:
    """`allowed_token_ids` and `bad_words` of one request."""

    def __init__(self, sampling: SamplingParams, num_words: int) -> None:
        """`num_words` is the length of a mask, see `TokenMasks`."""
        self.field = "allowed_token_ids" if sampling.allowed_token_ids else "bad_words"
        self._allowed: torch.Tensor | None = None
        if sampling.allowed_token_ids:
            bits = np.zeros(num_words * 32, np.uint8)
            bits[np.array(sampling.allowed_token_ids)] = 1
            self._allowed = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))
        # By the token before the last, the tokens before that one, and the last.
        self._endings: dict[int, list[tuple[list[int], int]]] = {}
        for *start, before, last in sampling.bad_words:
            self._endings.setdefault(before, []).append((start, last))

    def apply(self, bits: torch.Tensor, token_ids: list[int], num_prompt: int) -> None:
        """Rule out, in the mask [W] of the token behind these, what must not come.

        Words are looked for behind the prompt only.
        """
        if self._allowed is not None:
            bits &= self._allowed
        for start, last in self._endings.get(token_ids[-1], ()):
            first = len(token_ids) - 1 - len(start)
            if first >= num_prompt and token_ids[first:-1] == start:
                bits[last // 32] &= ~BITS[last % 32]


def mask_words(vocab_size: int) -> int:
    """The length of a mask, in words: a bit for each token, and one for the end, see `vocabulary.py`."""
    return vocab_size // 32 + 1


# Each bit of a word, as int32.
BITS = [1 << place if place < 31 else -(1 << 31) for place in range(32)]
