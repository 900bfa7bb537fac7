"""What changes logits before a token is drawn: penalties, biases and tokens that must not come yet."""

from __future__ import annotations

import torch

from runtime.engine.sequence import Sequence


class PenaltyState:
    """Which tokens a sequence has seen and made, kept up to date one token at a time."""

    def __init__(self, sequence: Sequence, vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(vocab_size, device=device)
        self.num_tokens = sequence.num_prompt
        self.seen[torch.tensor(sequence.token_ids[: sequence.num_prompt], device=device)] = True

    def catch_up(self, sequence: Sequence) -> None:
        """Count the tokens generated since the last call."""
        for token_id in sequence.token_ids[self.num_tokens :]:
            self.seen[token_id] = True
            self.counts[token_id] += 1
        self.num_tokens = sequence.num_tokens


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
            sequence.penalties = PenaltyState(sequence, logits.shape[0], logits.device)
        state = sequence.penalties
        state.catch_up(sequence)
        if repetition != 1.0:
            penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits.copy_(torch.where(state.seen, penalised, logits))
        logits -= state.counts * frequency + (state.counts > 0) * presence
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
    if sequence.num_generated < sampling.min_tokens and sequence.stop_token_ids:
        logits[torch.tensor(sorted(sequence.stop_token_ids), device=logits.device)] = -torch.inf
