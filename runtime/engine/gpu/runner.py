"""Carries out steps on a GPU, one step ahead of what the host has seen.

What a decode needs of its sequence is on the device already: its last token, its length, its blocks. So a
step is launched before the tokens of the step before have reached the host, and all that it sends is
which sequences take part, their new blocks, and the tokens of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from functools import partial

import numpy as np
import torch

from runtime.engine.gpu.memory import DeviceMemory
from runtime.engine.gpu.request_table import BlockUpdate, RequestTable
from runtime.engine.gpu.results import Drawn, Scores, UnderWay, to_host
from runtime.engine.gpu.sampling import DeviceSampler
from runtime.engine.gpu.staging import Staging, to_device
from runtime.engine.graphs import DecodeGraphs
from runtime.engine.memory import decode_bytes
from runtime.engine.scheduler import Scheduled
from runtime.engine.sequence import Sequence
from runtime.engine.step import TokenMasks
from runtime.engine.step_parts import MIN_ROWS_IN_HALVES, PART_ARRAYS, StepPart
from runtime.kernels.batch import DeviceBatch
from runtime.kernels.gpu.attention_decode import decode_workspace, splits_for
from runtime.kernels.gpu.attention_prefill import (
    prefill_splits,
    prefill_tile,
    prefill_workspace,
)
from runtime.kernels.gpu.attention_tile import Workspace
from runtime.kernels.gpu.prepare import apply_updates, prepare_decode
from runtime.kernels.gpu.sampling.parameters import Stages
from runtime.kernels.gpu.sampling.sampler import Batch
from runtime.model.decoder import CausalLM
from runtime.model.layers import LayerCache


class DeviceRunner:
    """The model, its paged cache and its requests' state on one GPU; a `Runner`."""

    steps_ahead = 1
    usual_prompt = 64

    def __init__(
        self,
        decoder: CausalLM,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        dtype: torch.dtype,
        memory: DeviceMemory,
    ) -> None:
        config = decoder.config
        device = torch.device("cuda", torch.cuda.current_device())
        self.decoder = decoder
        self.vocab_size = config.vocab_size
        self._config = config
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._stream)
        shape = (2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        with memory.cache():
            self._cache = [
                LayerCache(*torch.empty(shape, dtype=dtype, device=device)) for _ in range(config.num_layers)
            ]
        self._table = RequestTable(max_num_seqs, -(-max_model_len // block_size), device)
        self._staging = Staging(device)
        size = max(max_num_seqs, max_num_batched_tokens)
        self._token_ids, self._positions, self._slots, self._seq_lens = torch.zeros(
            (4, size), dtype=torch.int32, device=device
        )
        # What a graph reads must stay where it is: the decoding slots, and their new blocks.
        self._rows = torch.full((max_num_seqs,), -1, dtype=torch.int32, device=device)
        self._updates = torch.zeros((max_num_seqs, 3), dtype=torch.int32, device=device)
        self._num_updates = torch.zeros(1, dtype=torch.int32, device=device)
        self._tile = prefill_tile(config.num_heads, config.num_kv_heads, config.head_dim, dtype.itemsize)
        with memory.scratch():
            self._workspace = self._allocate_workspace(max_num_seqs, dtype, device)
            self._sampler = DeviceSampler(self._table, max_num_seqs, config.vocab_size, device)
        num_bytes = decode_bytes(config, max_num_seqs, dtype)
        self.graphs = DecodeGraphs(max_num_seqs, self._decode, lambda: memory.graph_pool(num_bytes))

    def _allocate_workspace(self, max_num_seqs: int, dtype: torch.dtype, device: torch.device) -> Workspace:
        config = self._config
        rows = config.num_heads * max(
            batch * self._decode_splits(batch) for batch in range(1, max_num_seqs + 1)
        )
        decode = decode_workspace(
            max_num_seqs, config.num_heads, config.num_kv_heads, config.head_dim, 1, device
        )
        prefill = prefill_workspace(
            config.num_kv_heads, config.head_dim, dtype.itemsize, self._num_sms, device
        )
        tiles = max(decode.counters.numel(), prefill.counters.numel())
        return Workspace.allocate(max(rows, prefill.logs.numel()), config.head_dim, tiles, device)

    def _decode_splits(self, batch: int) -> int:
        return splits_for(batch, self._config.num_kv_heads, self._max_model_len)

    @torch.inference_mode()
    def launch(self, scheduled: Rows[Scheduled]) -> UnderWay:
        """Begin to compute what is scheduled; see `Runner.launch`."""
        # The longest first: no long sequence starts its attention when the others are through with theirs.
        decodes = sorted((item for item in scheduled if item.decodes), key=lambda item: -item.start)
        others = [item for item in scheduled if not item.decodes]
        updates = self._table.block_updates(scheduled)
        samplers = [*decodes, *(item for item in others if item.samples)]
        sequences = [item.sequence for item in samplers]
        if others:
            rows, lengths, logits = self._mixed(decodes, others, updates)
        else:
            rows, lengths, logits = self._decode_only(decodes, updates)
        prompts: list[Scores] = []
        if any(item.scores_prompt for item in others):
            prompts, logits = self._score_prompts(len(decodes), others, logits)
        row_of = {id(item): row for row, item in enumerate(samplers)}
        order = [row_of[id(item)] for item in scheduled if item.samples]
        batch, stages = Batch(logits, rows, lengths), self._sampler.stages(sequences)
        return UnderWay(partial(self._draw, batch, stages, sequences), order, prompts)

    @torch.inference_mode()
    def _draw(
        self, batch: Batch, stages: Stages, sequences: Rows[Sequence], masks: TokenMasks | None
    ) -> Drawn:
        """Begin to sample what has been launched; `sequences` are those of the batch's rows."""
        row_masks = None if masks is None else self._sampler.row_masks(sequences, masks)
        tokens = self._sampler.sample(batch, stages, row_masks)
        scored = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
        scores = None
        if scored:
            num_top = [sequences[row].sampling.logprobs or 0 for row in scored]
            index = to_device(scored)
            scores = Scores.of(batch.logits[index], tokens[index], num_top)
        on_host = to_host(tokens[: len(sequences)])
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self._stream)
        return Drawn(on_host, done, scored, scores)

    def _decode_only(
        self, decodes: Rows[Scheduled], updates: list[BlockUpdate]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One token for each sequence, from a graph if there is one: slots, lengths, logits, padded."""
        size = len(decodes)
        if self.decoder.capturable:
            if (due := self.graphs.due(size)) is not None:
                self._take_nobody()
                self.graphs.capture(due)
            size = self.graphs.size_for(size)
        slots = [item.sequence.slot for item in decodes] + [-1] * (size - len(decodes))
        rows, new_blocks, count = self._staging.send([slots, np.array(updates, np.int32), [len(updates)]])
        self._rows[:size].copy_(rows)
        self._num_updates.copy_(count)
        self._updates.view(-1)[: len(new_blocks)].copy_(new_blocks)
        logits = self.graphs.run(size) if self.decoder.capturable else self._decode(size)
        return self._rows[:size], self._seq_lens[:size], logits

    @torch.inference_mode()
    def use_idle_time(self) -> bool:
        """Get on with the graphs; see `Runner.use_idle_time`."""
        if not self.decoder.capturable:
            return False
        self._take_nobody()
        return self.graphs.advance()

    def _take_nobody(self) -> None:
        """Make the inputs of a graph a batch of nobody: a run for a capture changes no request."""
        self._rows.fill_(-1)
        self._num_updates.zero_()

    def _decode(self, size: int) -> torch.Tensor:
        """What a graph of `size` sequences holds; the logits, [size, vocab_size] float32."""
        table, rows = self._table, self._rows[:size]
        apply_updates(self._updates[:size], self._num_updates, table.block_tables)
        self._prepare(rows)
        return self.decoder.forward(self._batch(StepPart(0, size)), self._cache)

    def _prepare(self, rows: torch.Tensor) -> None:
        n, table = rows.shape[0], self._table
        prepare_decode(
            rows, table.last_token, table.seq_len, table.block_tables, self._block_size,
            self._token_ids[:n], self._positions[:n], self._slots[:n], self._seq_lens[:n],
        )  # fmt: skip
        if self.decoder.num_position_tables > 1:
            # Padding, -1, finds the last row, which is nobody's.
            self._positions[:n] += table.position_base[rows]

    def _batch(self, part: StepPart, prompts: tuple[torch.Tensor, ...] = ()) -> DeviceBatch:
        """A step or one half of it; `prompts` are what `StepPart.arrays` gave, on the device."""
        tokens, n, none = slice(part.start, part.stop), part.num_decodes, self._rows[:0]
        query_start, seq_lens, table_rows, work_items, *rest = prompts or [none] * 4
        lengths = [item.start + item.num_new for item in part.prompts]
        splits = 1
        if lengths:
            num_items = len(work_items) // 2
            splits = prefill_splits(num_items, self._config.num_kv_heads, max(lengths), self._num_sms)
        return DeviceBatch(
            token_ids=self._token_ids[tokens],
            positions=self._positions[tokens],
            slots=self._slots[tokens],
            query_start=query_start,
            seq_lens=torch.cat((self._seq_lens[:n], seq_lens)) if prompts else self._seq_lens[:n],
            block_tables=self._table.block_tables,
            work_items=work_items.view(-1, 2),
            logits_rows=rest[0] if rest else None,
            table_rows=torch.cat((self._rows[:n], table_rows)) if prompts else self._rows[:n],
            num_decodes=n,
            decode_splits=self._decode_splits(max(1, n)),
            prefill_splits=splits,
            workspace=self._workspace,
        )

    def _mixed(
        self, decodes: Rows[Scheduled], others: Rows[Scheduled], updates: list[BlockUpdate]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A step with prompts in it, run eagerly: the slots that sample, their lengths, and logits.

        The logits have a row for each of them, but for a prompt that is scored a row for each new token.
        """
        n = len(decodes)
        parts = self._parts(n, others)
        entering = [item for item in others if item.samples]
        (
            rows, new_blocks, count, token_ids, positions, slots, new_lengths, bases, records, *prompts,
        ) = self._staging.send([
            [item.sequence.slot for item in (*decodes, *entering)],
            np.array(updates, np.int32),
            [len(updates)],
            np.concatenate([i.sequence.token_ids[i.start : i.start + i.num_new] for i in others]),
            np.concatenate([
                i.sequence.position_base + np.arange(i.start, i.start + i.num_new) for i in others
            ]),
            np.concatenate([self._slots_of(item) for item in others]),
            [item.start + item.num_new for item in entering],
            [item.sequence.position_base for item in entering],
            self._sampler.records([item.sequence for item in entering]),
            *(array for part in parts for array in part.arrays(self._tile)),
        ])  # fmt: skip
        self._sampler.enter([item.sequence for item in entering], rows[n:], records)
        if self.decoder.num_position_tables > 1:
            self._table.position_base[rows[n:]] = bases
        if updates:
            apply_updates(new_blocks.view(-1, 3), count, self._table.block_tables)
        total = parts[-1].stop
        if n:
            self._rows[:n].copy_(rows[:n])
            self._prepare(rows[:n])
        self._token_ids[n:total].copy_(token_ids)
        self._positions[n:total].copy_(positions)
        self._slots[n:total].copy_(slots)
        sampled_lengths = torch.cat((self._seq_lens[:n], new_lengths))
        batches = [
            self._batch(part, tuple(prompts[at : at + PART_ARRAYS]))
            for part, at in zip(parts, range(0, len(prompts), PART_ARRAYS), strict=True)
        ]
        if len(batches) == 1 or self.decoder.halves is None:
            return rows, sampled_lengths, self.decoder.forward(batches[0], self._cache)
        first, second = batches
        return rows, sampled_lengths, self.decoder.halves.forward((first, second), self._cache)

    def _parts(self, num_decodes: int, prompts: Rows[Scheduled]) -> list[StepPart]:
        """The step as a whole, or its two halves where that is faster."""
        whole = StepPart(0, num_decodes, prompts)
        halves = self.decoder.halves
        if halves is None or not MIN_ROWS_IN_HALVES <= whole.stop <= 2 * halves.max_rows:
            return [whole]
        return whole.halves()

    def _score_prompts(
        self, num_decodes: int, others: Rows[Scheduled], logits: torch.Tensor
    ) -> tuple[list[Scores], torch.Tensor]:
        """Log probabilities of the prompts that want them, and the logits of the rows that sample."""
        scores = []
        sampling = list(range(num_decodes))
        at = num_decodes
        for item in others:
            sequence = item.sequence
            if item.scores_prompt:
                stop = min(item.start + item.num_new + 1, sequence.num_prompt)
                targets = sequence.token_ids[item.start + 1 : stop]
                num_top = [sequence.sampling.prompt_logprobs or 0] * len(targets)
                scores.append(Scores.of(logits[at : at + len(targets)], to_device(targets), num_top))
                at += item.num_new
            elif item.samples:
                at += 1
            if item.samples:
                sampling.append(at - 1)
        return scores, logits[to_device(sampling)]

    def _slots_of(self, item: Scheduled) -> np.ndarray:
        blocks = np.asarray(item.sequence.table.block_ids, np.int64)
        span = np.arange(item.start, item.start + item.num_new)
        return blocks[span // self._block_size] * self._block_size + span % self._block_size
