"""One rank of `all_reduce.py`: checks every sum, then times it."""

from __future__ import annotations

import json
import os
import statistics

import torch
from harness import BenchError
from harness.report import progress

from runtime.kernels.norm import add_rms_norm
from runtime.parallel import peers
from runtime.parallel.control import Meeting
from runtime.parallel.entry import enter
from runtime.parallel.group import Group
from runtime.parallel.ranks import Ranks
from runtime.weights.cuda_driver import Driver

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 2048)
ONE_SHOT_ROWS = 256
EPS = 1e-5
_CALLS, _ROUNDS, _REPLAYS = 20, 7, 3


class Sums:
    """A rank of the group, and the ways of adding up over all of it."""

    def __init__(self, rank: int, world_size: int, hidden_size: int) -> None:
        address, port, token = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "TOKEN"))
        self.ranks = Ranks(rank, world_size, Meeting(address, int(port), token))
        self.ranks.meet(has_gpu=True)
        driver = Driver()
        torch.cuda.set_stream(torch.cuda.Stream())
        group = enter(self.ranks, driver, 60.0)
        assert isinstance(group, peers.PeerGroup)
        peers.ONE_SHOT_ROWS = ONE_SHOT_ROWS
        group.prepare(hidden_size, 1024, torch.bfloat16)
        self.group = group
        self.hidden_size = hidden_size
        self.weight = torch.rand(hidden_size, generator=torch.Generator().manual_seed(0)).cuda() + 0.5

    def add(self, way: str, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual += the sum of x; returns its norm."""
        group = self.group
        if way == "NCCL":
            return add_rms_norm(Group.all_reduce(group, x), residual, self.weight, EPS)
        if group.few is None or group.many is None:
            raise BenchError("the GPUs cannot reach each other's memory")
        norm = residual, self.weight, EPS
        if way == "one-shot":
            return peers.one_shot(x, group.few, torch.empty_like(x), norm)
        return peers.two_shot(x, group.many, torch.empty_like(x), norm)

    def check(self, way: str, rows: int) -> None:
        """Raise AssertionError unless this way's sums are right."""
        for call in range(5):
            torch.manual_seed(call)
            made = torch.randn((self.group.world_size, rows, self.hidden_size)).bfloat16().cuda()
            residual = torch.randn((rows, self.hidden_size)).bfloat16().cuda()
            wide = residual.float() + made.float().sum(0)
            expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * self.weight
            found = self.add(way, made[self.group.rank].clone(), residual)
            torch.testing.assert_close(found.float(), expected, atol=0.08, rtol=0.03)

    def seconds(self, way: str, rows: int) -> float:
        """The median time of one sum, of several one after the other."""
        x, residual = torch.zeros((2, rows, self.hidden_size), dtype=torch.bfloat16, device="cuda")
        self.add(way, x, residual)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(_CALLS):
            self.add(way, x, residual)
        graph.capture_end()
        return statistics.median(self._replay(graph) for _ in range(_ROUNDS)) / _CALLS

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        graph.replay()
        torch.cuda.synchronize()
        self.ranks.control.exchange(0)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / _REPLAYS


def run_rank(rank: int, world_size: int, hidden_size: int) -> None:
    """Measure everything and end the process; rank 0 prints what it found as JSON."""
    sums = Sums(rank, world_size, hidden_size)
    found: dict[str, dict[int, float]] = {"NCCL": {}, "one-shot": {}, "two-shot": {}}
    for way, seconds in found.items():
        for rows in ROWS:
            if way != "one-shot" or rows <= ONE_SHOT_ROWS:
                sums.check(way, rows)
                seconds[rows] = sums.seconds(way, rows)
                if rank == 0:
                    progress(f"{way}, {rows} rows: {seconds[rows] * 1e6:.1f} us")
    if rank == 0:
        print(json.dumps(found), flush=True)
    sums.ranks.control.exchange(0)
    os._exit(0)
