"""A long step of several ranks in two halves: the sums of one are under way while the other is computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from runtime.kernels.batch import PackedBatch
from runtime.kernels.linear import Product
from runtime.model.layers import MLP, Attention, LayerCache, RMSNorm

if TYPE_CHECKING:
    from runtime.model.decoder import Decoder
    from runtime.parallel.halves import Half


class Halves:
    """How a decoder computes a long step, cut in two after any of its tokens; `sums` are those of each half.

    Layer by layer, attention and MLP are computed for the first half, then for the second. A sum of one half
    begins with the end of its last product, and is added up and normed after the other half's next product.
    """

    def __init__(self, decoder: Decoder, sums: tuple[Half, Half]) -> None:
        self._decoder = decoder
        self._sums = sums

    @property
    def max_rows(self) -> int:
        """How many tokens each half may have."""
        return self._sums[0].max_rows

    def forward(self, batches: tuple[PackedBatch, PackedBatch], cache: Sequence[LayerCache]) -> torch.Tensor:
        """As `Decoder.forward` of both as one."""
        group, sums = self._decoder.group, self._sums
        assert group is not None
        self._decoder.before("all")
        residuals = [self._decoder.embedding(batch.token_ids) for batch in batches]
        scales = [self._decoder.query_scale(batch) for batch in batches]
        phases = _phases(self._decoder, cache)
        parts: list[Product] = []
        for index, (norm, work, layer_cache) in enumerate(phases):
            for half, other in ((0, 1), (1, 0)):
                x = sums[half].received() if index else norm(None, residuals[half])
                between = None
                if sums[other].under_way:
                    # The first half is a phase ahead.
                    next_norm = phases[index + half][0]
                    between = partial(sums[other].settle, residuals[other], next_norm.weight, next_norm.eps)
                if isinstance(work, Attention):
                    part = work(x, batches[half], scales[half], layer_cache, between)
                else:
                    part = work(x, between)
                if index < len(phases) - 1:
                    sums[half].send(part.compute())
                else:
                    parts.append(part)
        wanted = [_rows(batch) for batch in batches]
        x = torch.cat([part.x[rows] for part, rows in zip(parts, wanted, strict=True)])
        own = [
            each.own_of(residual, rows) for each, residual, rows in zip(sums, residuals, wanted, strict=True)
        ]
        return self._decoder.finish(Product(x, parts[0].weights), group.all_reduce(torch.cat(own)))


def _phases(
    decoder: Decoder, cache: Sequence[LayerCache]
) -> list[tuple[RMSNorm, Attention | MLP, LayerCache]]:
    """All norms up to the last layer's attention, each with what its result goes to."""
    phases: list[tuple[RMSNorm, Attention | MLP, LayerCache]] = []
    for layer, layer_cache in zip(decoder.layers, cache, strict=True):
        phases.append((layer.attention_norm, layer.attention, layer_cache))
        phases.append((layer.mlp_norm, layer.mlp, layer_cache))
    return phases[:-1]


def _rows(batch: PackedBatch) -> torch.Tensor:
    assert batch.logits_rows is not None
    return batch.logits_rows
