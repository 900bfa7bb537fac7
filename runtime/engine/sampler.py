"""From logits to tokens, for a whole step at once.

A token is drawn by inverting the cumulative distribution at one uniform number, which is a function of
the request's seed and the token's position alone. So a request's tokens do not depend on what else is
in the batch, on preemption, or on how often the engine was restarted.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
import torch.nn.functional as F

from runtime.engine.penalties import adjust, needs_adjustment
from runtime.engine.sequence import Sequence
from runtime.engine.step import TokenMasks
from runtime.kernels.token_mask import apply_mask
from runtime.protocol import TokenLogprobs

# Most nuclei fit into the first of these and nearly all into the second: far cheaper than the vocabulary.
_SHORT_LISTS = (64, 1024)
_MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one token of one request: SplitMix64 (Steele et al., 2014) as a hash."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def sample(logits: torch.Tensor, sequences: Rows[Sequence], masks: TokenMasks | None = None) -> list[int]:
    """The next token of each sequence; logits [R, vocab_size] float32, row by row theirs, are used up."""
    mask_of = {} if masks is None else dict(zip(map(id, masks.sequences), masks.bits, strict=True))
    for row, sequence in enumerate(sequences):
        if needs_adjustment(sequence):
            adjust(logits[row], sequence)
        if id(sequence) in mask_of:
            apply_mask(logits[row], mask_of[id(sequence)])
    greedy: list[int] = []
    whole: list[int] = []
    narrowed: list[int] = []
    for row, sequence in enumerate(sequences):
        drawn = narrowed if _narrows(sequence) else whole
        (drawn if sequence.sampling.temperature > 0 else greedy).append(row)
    tokens = [0] * len(sequences)
    for rows, draw in ((greedy, _likeliest), (whole, _draw), (narrowed, _draw_narrowed)):
        if rows:
            found = draw(_rows_of(logits, rows), [sequences[row] for row in rows])
            for row, token in zip(rows, found, strict=True):
                tokens[row] = token
    return tokens


def _rows_of(matrix: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return matrix if len(rows) == matrix.shape[0] else matrix[torch.tensor(rows, device=matrix.device)]


def _narrows(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return bool(sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def _probabilities(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Softmax of logits over temperatures. The greatest is brought to 0 first, so that none overflows.

    What is e^80 times less likely than that is ruled out: no uniform number is fine enough to draw it, and
    exponentials that are subnormal numbers take many times as long.
    """
    tiny = torch.finfo(torch.float32).tiny
    temperatures = _column([max(s.sampling.temperature, tiny) for s in sequences], logits.device)
    logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperatures.float())
    return F.threshold(logits, -80.0, -torch.inf, inplace=True).softmax(dim=-1)


def _invert(probs: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Where in its row of `probs` [R, n], whatever that adds up to, each uniform number falls; [R, 1]."""
    cumulative = probs.double().cumsum_(dim=-1)  # several times as fast as to ask `cumsum` for another dtype
    uniforms = _column([uniform(s.seed, s.num_tokens) for s in sequences], probs.device)
    found = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return found.clamp_(max=probs.shape[1] - 1)


def _likeliest(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    return logits.max(dim=-1).indices.tolist()  # like argmax the first of equals, at a third of its time


def _draw(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    return _invert(_probabilities(logits, sequences), sequences).squeeze(1).tolist()


def _draw_narrowed(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """As `_draw`, among the tokens that top-k, then top-p of what that leaves, and min-p leave.

    How many of its tokens a row sorts is its own affair, so its draw does not depend on the other rows.
    """
    vocab_size = logits.shape[1]
    probs = _probabilities(logits, sequences)
    tokens = [0] * len(sequences)
    left = list(range(len(sequences)))
    for width in (*_SHORT_LISTS, vocab_size):
        if not left or width > vocab_size:
            continue
        candidates = _rows_of(probs, left)
        if width < vocab_size:
            values, indices = candidates.topk(width, dim=-1)
        else:
            values, indices = candidates.sort(dim=-1, descending=True, stable=True)
        found, short = _pick(values.double(), [sequences[row] for row in left], vocab_size)
        picked = indices.gather(1, found).squeeze(1).tolist()
        for row, token in zip(left, picked, strict=True):
            tokens[row] = token
        left = [row for row, again in zip(left, short, strict=True) if again]
    return tokens


def _pick(probs: torch.Tensor, sequences: Rows[Sequence], vocab_size: int) -> tuple[torch.Tensor, list[bool]]:
    """Draw from the greatest probabilities [R, width], in descending order: [R, 1] indices into them.

    And for which rows they may be too few: tokens that are not among them may be wanted as well.
    """
    width, device = probs.shape[1], probs.device
    top_k = _column([s.sampling.top_k if s.sampling.top_k > 0 else vocab_size for s in sequences], device)
    top_p = _column([s.sampling.top_p for s in sequences], device)
    least = _column([s.sampling.min_p for s in sequences], device) * probs[:, :1]
    cumulative = probs.cumsum(dim=-1)
    # Only without top-k is it known what top-p is a share of.
    ends_here = torch.where(
        top_p < 1.0, (cumulative[:, -1:] >= top_p) & (top_k >= vocab_size), probs[:, -1:] < least
    )
    short = (top_k > width) & ~ends_here & (width < vocab_size)
    rank = torch.arange(width, device=device)[None]
    kept = (rank < top_k) & (probs >= least)
    # Top-p is a share of what top-k leaves, which without top-k is all. A token stays while those before
    # it fall short of that share.
    whole = torch.where(top_k < vocab_size, probs.masked_fill(rank >= top_k, 0.0).sum(-1, keepdim=True), 1.0)
    kept &= (cumulative - probs < top_p * whole) | (top_p >= 1.0)
    kept[:, 0] = True
    return _invert(probs.masked_fill(~kept, 0.0), sequences), short.squeeze(1).tolist()


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
