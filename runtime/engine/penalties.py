"""What changes logits before a token is drawn: penalties, biases and tokens that must not come yet."""

from __future__ import annotations

import torch

from runtime.engine.sequence import Sequence


class PenaltyState:
    """The distinct tokens of a sequence, and how often it has generated each; kept up to date as it grows."""

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        distinct = dict.fromkeys(sequence.token_ids[: sequence.num_prompt])
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        self._token_ids = torch.empty(vocab_size, dtype=torch.int64)  # memory is taken as it is filled
        self._token_ids[: len(distinct)] = torch.tensor(list(distinct))
        self._counts = torch.zeros(vocab_size)
        self._num_tokens = sequence.num_prompt

    def catch_up(self, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [n] of the tokens in prompt and output, and their counts [n] in the output alone."""
        for token_id in sequence.token_ids[self._num_tokens :]:
            place = self._places.setdefault(token_id, len(self._places))
            self._token_ids[place] = token_id
            self._counts[place] += 1
        self._num_tokens = len(sequence.token_ids)
        return self._token_ids[: len(self._places)], self._counts[: len(self._places)]


def needs_adjustment(sequence: Sequence) -> bool:
    """Whether anything here applies to the sequence's next token."""
    sampling = sequence.sampling
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
        or sequence.num_generated < sampling.min_tokens
    )


def adjust(logits: torch.Tensor, sequence: Sequence) -> None:
    """Apply the sequence's penalties, bias and minimum length to its logits, [vocab_size], in place.

    The repetition penalty (Keskar et al., 2019) counts prompt and output, as transformers does; the
    presence and frequency penalties count the output only, as OpenAI's API documents them.
    """
    sampling = sequence.sampling
    repetition, presence, frequency = (
        sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty,
    )  # fmt: skip
    if repetition != 1.0 or presence or frequency:
        if sequence.penalties is None:
            sequence.penalties = PenaltyState(sequence, logits.shape[0])
        token_ids, counts = sequence.penalties.catch_up(sequence)
        seen = logits[token_ids]
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
        logits[token_ids] = seen - counts * frequency - (counts > 0) * presence
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias))
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()))
    if sequence.num_generated < sampling.min_tokens and sequence.stop_token_ids:
        logits[torch.tensor(sorted(sequence.stop_token_ids))] = -torch.inf
