"""From logits to tokens, for a whole step at once.

A token is drawn by inverting the cumulative distribution at one uniform number, which is a function of
the request's seed and the token's position alone. So a request's tokens do not depend on what else is
in the batch, on preemption, or on how often the engine was restarted.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from runtime.engine.penalties import adjust, needs_adjustment
from runtime.engine.sequence import Sequence
from runtime.protocol import TokenLogprobs

# A nucleus seldom reaches past this many tokens; sorting them alone is far cheaper than the vocabulary.
_SHORT_LIST = 1024
_MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one token of one request: SplitMix64 (Steele et al., 2014) as a hash."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """The next token of each sequence; logits [R, vocab_size] float32, row by row theirs, are used up."""
    for row, sequence in enumerate(sequences):
        if needs_adjustment(sequence):
            adjust(logits[row], sequence)
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    narrowed = [row for row in drawn if _narrows(sequences[row])]
    for rows, draw in (([row for row in drawn if row not in narrowed], _draw), (narrowed, _draw_narrowed)):
        if rows:
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = draw(logits[index], [sequences[row] for row in rows])
    return tokens.tolist()


def _narrows(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return bool(sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def _scaled(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Logits over temperatures, with the greatest at 0: so none overflows, however low its temperature."""
    tiny = torch.finfo(torch.float32).tiny
    temperatures = _column([max(s.sampling.temperature, tiny) for s in sequences], logits.device)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperatures.float()


def _uniforms(sequences: Rows[Sequence], device: torch.device) -> torch.Tensor:
    return _column([uniform(s.seed, s.num_tokens) for s in sequences], device)


def _draw(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    cumulative = _scaled(logits, sequences).softmax(dim=-1).double().cumsum(dim=-1)
    wanted = _uniforms(sequences, logits.device) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, wanted, right=True)
    return found.squeeze(1).clamp_(max=logits.shape[1] - 1)


def _draw_narrowed(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """As `_draw`, among the tokens that top-k, then top-p of what that leaves, and min-p leave."""
    vocab_size, device = logits.shape[1], logits.device
    logits = _scaled(logits, sequences)
    top_k = _column([s.sampling.top_k if s.sampling.top_k > 0 else vocab_size for s in sequences], device)
    top_p = _column([s.sampling.top_p for s in sequences], device)
    min_p = _column([s.sampling.min_p for s in sequences], device)
    norm = logits.double().logsumexp(dim=-1, keepdim=True)
    width = min(vocab_size, _SHORT_LIST)
    values, indices = logits.topk(width, dim=-1)
    probs = (values.double() - norm).exp()
    if width < vocab_size and bool(_too_short(probs, top_k, top_p, min_p).any()):
        values, indices = logits.sort(dim=-1, descending=True, stable=True)
        probs = (values.double() - norm).exp()
    rank = torch.arange(probs.shape[1], device=device)[None]
    probs = probs.masked_fill(rank >= top_k, 0.0)
    cumulative = probs.cumsum(dim=-1)
    # Without top-k the whole is 1, of which a short list may hold only a part.
    whole = torch.where(top_k < vocab_size, cumulative[:, -1:], 1.0)
    # A token stays while those before it fall short of the share that is wanted.
    outside = (cumulative - probs >= top_p * whole) | (probs < min_p * probs[:, :1])
    probs = probs.masked_fill(outside, 0.0)
    probs[:, 0] = probs[:, 0].clamp(min=torch.finfo(torch.float64).tiny)
    cumulative = probs.cumsum(dim=-1)
    wanted = _uniforms(sequences, device) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=probs.shape[1] - 1)
    return indices.gather(1, found).squeeze(1)


def _too_short(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Which rows may keep tokens beyond the sorted probabilities [R, width] that are at hand."""
    nucleus = probs.sum(dim=-1, keepdim=True) < top_p
    likely = (top_p >= 1.0) & (probs[:, -1:] >= min_p * probs[:, :1])
    return (top_k > probs.shape[1]) & (nucleus | likely)


def token_logprobs(logits: torch.Tensor, token_ids: Rows[int], num_top: int) -> list[TokenLogprobs]:
    """Log probabilities under the model's own distribution: logits [R, vocab_size], one token a row."""
    if not token_ids:
        return []
    logprobs = logits - logits.logsumexp(dim=-1, keepdim=True)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = ((logprobs > chosen).sum(dim=-1) + 1).tolist()
    values, indices = logprobs.topk(num_top, dim=-1)
    tops = [list(zip(*pair, strict=True)) for pair in zip(indices.tolist(), values.tolist(), strict=True)]
    own = chosen.squeeze(1).tolist()
    return [TokenLogprobs(*row) for row in zip(token_ids, own, ranks, tops, strict=True)]
