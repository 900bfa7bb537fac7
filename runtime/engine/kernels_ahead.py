"""Compiles the kernels that an engine may need for a model, without a GPU and without the weights.

    python -m runtime.engine.kernels_ahead MODEL [CAPABILITY ...]          into the user's cache
    python -m runtime.engine.kernels_ahead image MODEL [CAPABILITY ...]    for an image to ship

MODEL is named as for `firstlight serve`; of its files only the configuration is fetched. Capabilities are
80, 89, 90 (the default), 100 and the like.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from runtime.catalogue import find_catalogue, load_catalogue
from runtime.engine.deferred import import_the_rest
from runtime.engine.gpu.imagined_weights import imagined_weights
from runtime.engine.gpu.request_table import RequestTable
from runtime.engine.step_parts import MIN_ROWS_IN_HALVES
from runtime.errors import FirstlightError
from runtime.kernels.batch import DeviceBatch
from runtime.kernels.gpu import binaries, cache
from runtime.kernels.gpu.attention_prefill import prefill_tile, prefill_work_items
from runtime.kernels.gpu.attention_tile import Workspace
from runtime.kernels.gpu.inboxes import Inboxes
from runtime.kernels.gpu.offline import compiling_for
from runtime.kernels.gpu.prefetch import can_prefetch
from runtime.kernels.gpu.prepare import apply_updates, prepare_decode
from runtime.kernels.gpu.sampling.logprobs import token_logprobs
from runtime.kernels.gpu.sampling.mask import RowMasks
from runtime.kernels.gpu.sampling.parameters import SamplingTables, Stages
from runtime.kernels.gpu.sampling.sampler import Batch, Sampler
from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.model.families import Model, read_model
from runtime.model.layers import LayerCache, Weights
from runtime.parallel.control import Meeting
from runtime.parallel.group import Group
from runtime.parallel.halves import Half, HalfMemory
from runtime.parallel.peers import GATHERED_ROWS, HALF_ROWS, ONE_SHOT_ROWS, TWO_SHOT_ROWS, PeerGroup
from runtime.parallel.ranks import Ranks
from runtime.protocol import EngineConfig
from runtime.weights import sources
from runtime.weights.imagined import imagined_checkpoint
from runtime.weights.plan import make_plan
from runtime.weights.sources.cache import default_cache_dir

# Steps between whose kernels there is any difference, as (decoding sequences, lengths of new prompts).
_STEPS: Sequence[tuple[int, tuple[int, ...]]] = (
    (1, ()), (2, ()), (16, ()), (17, ()), (100, ()), (160, ()), (256, ()),
    (0, (1,)), (0, (64,)), (0, (2048,)), (3, (40, 500)),
)  # fmt: skip
_SPLITS = (1, 2)
_MAX_LEN = 4096
_SLOTS = 256
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class NotAhead(FirstlightError):
    """A model whose kernels cannot be compiled ahead."""


def compile_kernels(directory: Path, capability: int, world_size: int = 1) -> int:
    """Fill Triton's cache for so many GPUs of one kind; returns how many kernels were compiled.

    A process can do that for one capability and number of GPUs.

    Raises `NotAhead`.
    """
    model = read_model(directory)
    if not isinstance(model, Model):
        raise NotAhead(f"{model.architecture} runs through transformers, with the kernels of torch.")
    dtype = _DTYPES.get(model.torch_dtype, torch.bfloat16)
    before = cache.num_compiled()
    import_the_rest()
    plan = make_plan(model, imagined_checkpoint(model), 0, world_size)
    quantization = model.config.quantization
    with compiling_for(capability), FakeTensorMode(), torch.inference_mode():
        group = _ImaginedGroup(world_size, model.config, dtype) if world_size > 1 else None
        for weights in imagined_weights(plan, quantization, dtype):
            steps = _Steps(model, weights, dtype, _block_size(), group)
            for num_decodes, prompts in _STEPS:
                for num_splits in _SPLITS:
                    steps.sample(steps.forward(num_decodes, prompts, num_splits))
    return cache.num_compiled() - before


def _block_size() -> int:
    """The default of `EngineConfig`; with another, kernels are compiled when they are needed."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(EngineConfig)}
    return int(defaults["block_size"])


class _ImaginedGroup(PeerGroup):
    """Rank 0 of a group whose other ranks are not there."""

    def __init__(self, world_size: int, config: ModelConfig, dtype: torch.dtype) -> None:
        Group.__init__(self, _NoBackend(), Ranks(0, world_size, Meeting("", 0, "")))
        self._prefetches = can_prefetch()
        addresses = torch.empty(world_size, dtype=torch.int64, device="cuda")
        shared = dtype.itemsize == 2
        share = -(-config.vocab_size // world_size)
        self.few, self.many, self.rows = (
            Inboxes(addresses, _words(_SLOTS), 0, rows, width) if shared else None
            for rows, width in (
                *((ONE_SHOT_ROWS, config.hidden_size), (TWO_SHOT_ROWS, config.hidden_size)),
                (GATHERED_ROWS, share),
            )
        )
        size = config.hidden_size
        own = torch.empty(HalfMemory.num_bytes(world_size, HALF_ROWS, size), dtype=torch.uint8, device="cuda")
        memory = HalfMemory([0] * world_size, own, 0, HALF_ROWS, size, dtype)
        if shared:
            self.halves = Half(_NoWire(), memory), Half(_NoWire(), memory)


class _NoWire:
    """Copies nothing."""

    def begin(self) -> None:
        """There is nothing to wait for."""

    def copy(self, target: int, source: torch.Tensor, flag: int, count: int) -> None:
        """The same."""


class _NoBackend:
    """Adds up nothing."""

    def allreduce(self, tensors: list[torch.Tensor], options: object) -> None:
        """Tensors without data stay as they are."""

    def _allgather_base(self, output: torch.Tensor, one: torch.Tensor) -> None:
        """The same."""


class _Steps:
    """The parts of an engine that launch kernels, on tensors without data."""

    def __init__(
        self, model: Model, weights: Weights, dtype: torch.dtype, block_size: int, group: PeerGroup | None
    ) -> None:
        self._block_size = block_size
        self._decoder = Decoder(model.config, weights, _MAX_LEN, dtype, group)
        self._config = config = self._decoder.config
        shape = (2, 64, config.num_kv_heads, block_size, config.head_dim)
        self._cache = [
            LayerCache(*torch.empty(shape, dtype=dtype, device="cuda")) for _ in range(config.num_layers)
        ]
        self._tile = prefill_tile(config.num_heads, config.num_kv_heads, config.head_dim, dtype.itemsize)
        self._workspace = Workspace.allocate(1 << 24, config.head_dim, 1 << 24, "cuda")  # more than enough
        self._table = RequestTable(_SLOTS, _MAX_LEN // block_size, torch.device("cuda"))
        tables = SamplingTables.allocate(_SLOTS, config.vocab_size, "cuda")
        self._sampler = Sampler(tables, _SLOTS, config.vocab_size)

    def forward(self, num_decodes: int, prompts: tuple[int, ...], num_splits: int) -> torch.Tensor:
        """The logits of a step."""
        total = num_decodes + sum(prompts)
        token_ids, positions, slots, seq_lens, rows = _words(5, max(total, _SLOTS)).unbind()
        apply_updates(_words(1, 3), _words(1), self._table.block_tables)
        decodes = (each[:num_decodes] for each in (token_ids, positions, slots, seq_lens))
        if num_decodes:
            prepare_decode(
                rows[:num_decodes],
                self._table.last_token,
                self._table.seq_len,
                self._table.block_tables,
                self._block_size,
                *decodes,
            )
        num_items = len(prefill_work_items(prompts, prompts, self._tile)) if prompts else 0
        batch = DeviceBatch(
            token_ids=token_ids[:total],
            positions=positions[:total],
            slots=slots[:total],
            query_start=_words(len(prompts) + 1 if prompts else 0),
            seq_lens=seq_lens[: num_decodes + len(prompts)],
            block_tables=self._table.block_tables,
            work_items=_words(num_items, 2),
            logits_rows=_words(num_decodes + len(prompts)) if prompts else None,
            table_rows=rows[: num_decodes + len(prompts)],
            num_decodes=num_decodes,
            decode_splits=num_splits,
            prefill_splits=num_splits,
            workspace=self._workspace,
        )
        if self._decoder.halves is not None and total >= MIN_ROWS_IN_HALVES:
            return self._decoder.halves.forward((batch, batch), self._cache)
        return self._decoder.forward(batch, self._cache)

    def sample(self, logits: torch.Tensor) -> None:
        """Draw from these logits in every way that requests can ask for."""
        num_rows = logits.shape[0]
        batch = Batch(logits, _words(num_rows), _words(num_rows))
        tokens = _words(num_rows)
        masks = RowMasks(_words(num_rows), _words(num_rows, -(-self._config.vocab_size // 32)))
        for draw, top_k, top_p, adjust in itertools.product((False, True), repeat=4):
            stages = Stages(draw, draw and top_k, draw and top_p, adjust)
            for some in (None, masks):
                self._sampler.sample(batch, stages, tokens, self._table.last_token, self._table.seq_len, some)
        token_logprobs(logits, tokens, 1)


def _words(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device="cuda")


@contextmanager
def _configuration_of(name: str) -> Iterator[tuple[Path, int]]:
    """A folder with the model's configuration, fetched if it is not here, and how many GPUs share it."""
    spec = load_catalogue(find_catalogue()).resolve(name)
    folder = os.environ.get("FIRSTLIGHT_DOWNLOAD_DIR", default_cache_dir())
    here = sources.locate(spec, Path(folder))
    if here is not None:
        yield here, spec.tp_size
        return
    with tempfile.TemporaryDirectory() as scratch:
        arrival = sources.arrive(spec, Path(scratch), lambda progress: None)
        try:
            directory = arrival.directory
        finally:
            arrival.give_up()
        yield directory, spec.tp_size


def main(arguments: list[str]) -> int:
    """Compile a model's kernels for each capability."""
    if arguments[:1] == ["image"]:
        arguments = arguments[1:]
        os.environ["TRITON_CACHE_DIR"] = str(binaries.SHIPPED)
    name, *named = arguments
    capabilities = [int(each) for each in named or ["90"]]
    # Triton takes what a process has compiled for one GPU for what another one needs.
    with (
        _configuration_of(name) as (directory, world_size),
        ProcessPoolExecutor(mp_context=get_context("spawn"), max_tasks_per_child=1) as processes,
    ):
        counts = processes.map(partial(compile_kernels, directory, world_size=world_size), capabilities)
        try:
            for capability, count in zip(capabilities, counts, strict=True):
                print(f"{count} kernels compiled for capability {capability / 10:.1f}", file=sys.stderr)
        except NotAhead as reason:
            print(f"firstlight: no kernels are compiled ahead. {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except FirstlightError as problem:
        sys.exit(f"firstlight: {problem}")
