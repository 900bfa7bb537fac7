"""What a device could reach at best: weights and KV cache read once a step, products at full speed.

The larger of two times counts: all bytes read / read speed, all operations / product speed; whoever
overlaps the two perfectly gets there, and nobody beyond. A product with a matrix of N weights takes 2·N
operations a token; causal attention over a prompt of n takes 2·n²·num_heads·head_dim a layer (two
products, half of each masked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import checkpoint
from harness.workload import Case, Decode, Workload


@dataclass(frozen=True)
class Limits:
    """What was measured of the device, or of all that share the model: bytes read and operations a second."""

    read: float
    product: float

    def seconds(self, work: Work) -> float:
        """What the work takes at least."""
        return max(work.read / self.read, work.operations / self.product)


@dataclass(frozen=True)
class Work:
    """Bytes to read and operations to do."""

    read: float
    operations: float

    def __add__(self, other: Work) -> Work:
        return Work(self.read + other.read, self.operations + other.operations)


@dataclass(frozen=True)
class Shape:
    """What of a model matters here; sizes in bytes."""

    step_bytes: int
    step_parameters: int
    layer_parameters: int
    kv_bytes: int
    attention_width: int
    num_layers: int
    vocab_size: int

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """The shape of a checkpoint. A step reads little of an embedding that is not the head too."""
        config = checkpoint.config_of(folder)
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        layers, vocab = config["num_hidden_layers"], config["vocab_size"]
        kv_heads = config.get("num_key_value_heads", heads)
        size, parameters = checkpoint.weight_bytes(folder), checkpoint.layer_parameters(folder)
        embedding = checkpoint.embedding_bytes(folder)
        tied = config.get("tie_word_embeddings", False)
        return cls(
            step_bytes=size - (0 if tied else embedding),
            step_parameters=parameters + vocab * hidden,
            layer_parameters=parameters,
            # Keys and values have the number format of the embedding, whatever the layers' weights have.
            kv_bytes=2 * layers * kv_heads * head_dim * embedding // (vocab * hidden),
            attention_width=heads * head_dim,
            num_layers=layers,
            vocab_size=vocab,
        )

    def prefill(self, lengths: Sequence[int]) -> Work:
        """Prompts of these lengths, in one step."""
        products = 2 * self.layer_parameters * sum(lengths)
        attention = 2 * self.attention_width * self.num_layers * sum(length**2 for length in lengths)
        return Work(self.step_bytes, products + attention)

    def decode(self, contexts: Sequence[int]) -> Work:
        """One token for each sequence that has so many tokens already, in one step."""
        read = self.step_bytes + self.kv_bytes * sum(contexts)
        return Work(read, 2 * self.step_parameters * len(contexts))


def seconds(case: Case, shape: Shape, limits: Limits) -> float:
    """What a case would take at best, in the unit in which it is measured."""
    if isinstance(case, Decode):
        middle = case.prompt + case.tokens // 2
        return limits.seconds(shape.decode([middle] * case.batch))
    if isinstance(case, Workload):
        return limits.seconds(_all_of(case, shape))
    return limits.seconds(shape.prefill([case.prompt] * case.batch))


def _all_of(case: Workload, shape: Shape) -> Work:
    """In as few steps as the longest answer has tokens: the first one reads all prompts."""
    requests = case.requests(shape.vocab_size)
    work = shape.prefill([len(request.prompt) for request in requests])
    for step in range(1, max(request.max_tokens for request in requests)):
        work += shape.decode([len(r.prompt) + step for r in requests if r.max_tokens > step])
    return work
