"""From a configuration to an engine that takes requests, with everything overlapped that can be.

The files are found (or fetched), planned and read ahead in a thread while the main thread imports
torch. The thread waits in the kernel and in the network, not on Python's lock.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import marks
from runtime.engine.deferred import import_torch, native_parts
from runtime.engine.gpu.finding import FindingDevice
from runtime.engine.gpu.products import Products
from runtime.engine.verification import Verification
from runtime.errors import FirstlightError
from runtime.kernels import native
from runtime.model.families import ForeignModel, Model, read_model
from runtime.parallel.ranks import Ranks
from runtime.protocol import EngineConfig, Event, Progress, Ready
from runtime.weights import sources
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.cuda_driver import Driver
from runtime.weights.gate import OPEN, Gate
from runtime.weights.loader import MappedWeights
from runtime.weights.plan import Plan, check_world_size, make_plan, plan_all
from runtime.weights.sources.cache import persist_meanwhile
from runtime.weights.upload import DeviceWeights

if TYPE_CHECKING:
    from runtime.engine.core import Engine
    from runtime.engine.gpu.opening import Opening
    from runtime.engine.sleeper import Memory, Sleeper
    from runtime.weights.sources.arrival import Arrival

_PROGRESS_INTERVAL_S = 0.1
# How much longer a sum over all ranks waits for them than the watchdog, which has better words.
_PATIENCE = 4.0


class Preparation(threading.Thread):
    """Brings the model's files into memory. `finish` waits for it and raises what went wrong."""

    def __init__(
        self,
        config: EngineConfig,
        send: Callable[[Event], None],
        ranks: Ranks | None,
        device: FindingDevice,
    ) -> None:
        super().__init__(name="preparation", daemon=True)
        self._config = config
        self._send = send
        self._ranks = ranks
        self._met = threading.Event()
        self._products: Products | None = None
        # Once the model is here, or somebody has been sent for it.
        self._looked_for = threading.Event()
        self._error: Exception | None = None
        self._last_sent = 0.0
        self.marks: dict[str, float] = {}
        self.directory: Path
        self.model: Model | ForeignModel
        self.plan: Plan
        self.weights: MappedWeights | DeviceWeights
        # Of weights whose digests are not known yet.
        self.verification: Verification | None = None
        self._arena: DeviceWeights | None = None
        self._device = device
        self.device = "cpu"
        self.driver: Driver | None = None

    def run(self) -> None:
        """The thread's work."""
        try:
            self._prepare()
        except Exception as error:  # whatever it is, `finish` raises it where it can be reported
            self._error = error
        finally:
            self._looked_for.set()
            self._met.set()

    def look_for(self) -> None:
        """Wait until the model is known to be here, or somebody has been sent for it.

        Starting a process takes ten times as long beside an import, which rarely lets go of Python's lock.
        """
        self._looked_for.wait()

    def meet(self) -> None:
        """Wait until the ranks have met, and know what device they compute on."""
        self._met.wait()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until the weights are in memory."""
        self.join()
        if self._error is not None:
            raise self._error

    def end_products(self) -> None:
        """From here on products are computed by whoever wants them."""
        if self._products is not None:
            self._products.end()

    def _prepare(self) -> None:
        if self._ranks is not None:
            self._find_device()
            self._ranks.meet(self.device == "cuda")
            self._met.set()
        model, cache_dir = self._config.model, Path(self._config.cache_dir)
        directory = sources.locate(model, cache_dir)
        if directory is None:
            arrival = sources.arrive(model, cache_dir, self._fetched)
            self._looked_for.set()
            directory = arrival.directory
            self.model = read_model(directory)
            # Before the weights are here: what this raises ends the fetch.
            _check_size(self.model, self._config.world_size)
            if not arrival.ended and self._loaded_as_it_comes(arrival):
                return
            arrival.settle()
            self._mark("verified")
        self._looked_for.set()
        self.model = read_model(directory)
        self._load(directory, OPEN)

    def _loaded_as_it_comes(self, arrival: Arrival) -> bool:
        """Load while the model is being fetched; False if something wrong was loaded, and came again."""
        try:
            self._load(arrival.directory, arrival.gate)
        except Exception:
            # Bytes that were not verified yet may have been wrong; if not, the checkpoint itself is.
            if arrival.settle():
                raise
        else:
            if self._ranks is None and isinstance(self.model, Model):
                self.verification = Verification(arrival, self.weights)
                return True
            if arrival.settle():
                self._mark("verified")
                self.weights.gate = OPEN
                return True
        self.end_products()
        if self._arena is not None:
            self._arena.close()
        return False

    def _load(self, directory: Path, gate: Gate) -> None:
        """Plan, and bring the weights into memory as the gate lets their bytes through."""
        self.directory = directory
        tensors = read_checkpoint(directory, gate)
        _check_size(self.model, self._config.world_size)
        if isinstance(self.model, ForeignModel):
            self.plan = plan_all(tensors)
        else:
            self.plan = make_plan(self.model, tensors, self._config.rank, self._config.world_size)
        self._mark("plan")
        if gate is OPEN:
            self._send(Progress(phase="load", bytes_total=self.plan.read_bytes, directory=str(directory)))
        if self._ranks is None:
            self._find_device()
        driver = self.driver
        if driver is None:
            native.build()
        if driver is None or isinstance(self.model, ForeignModel):
            self.weights = MappedWeights(self.plan, gate)
        else:
            self.weights = self._arena = DeviceWeights(self.plan, driver, gate)
            self._products = Products(driver, self.plan, self._arena.address, native_parts.wait)
            self._products.start()
        self._mark("first_byte")
        self.weights.load(self._loaded if gate is OPEN else lambda done: None)
        self._mark("last_byte")

    def _find_device(self) -> None:
        if self._config.device != "cpu":
            self.driver = self._device.driver(self._config.device)
        if self.driver is not None:
            self._mark("device")
            self.device = "cuda"

    def _loaded(self, done: int) -> None:
        self._progress("load", done, self.weights.num_bytes)

    def _fetched(self, progress: sources.FetchProgress) -> None:
        found = None if progress.directory is None else str(progress.directory)
        self._progress(progress.phase, progress.bytes_done, progress.bytes_total, found)

    def _progress(self, phase: str, done: int, total: int, directory: str | None = None) -> None:
        now = time.monotonic()
        if directory is not None or now - self._last_sent >= _PROGRESS_INTERVAL_S or done == total:
            self._last_sent = now
            self._send(Progress(phase=phase, bytes_done=done, bytes_total=total, directory=directory))  # type: ignore[arg-type]

    def _mark(self, name: str) -> None:
        self.marks[name] = marks.since_exec()


def _check_size(model: Model | ForeignModel, world_size: int) -> None:
    """Refuse a tensor-parallel size that the model cannot be divided by."""
    if isinstance(model, Model):
        check_world_size(model.config, world_size)
    elif world_size > 1:
        raise FirstlightError(
            f"--tensor-parallel-size {world_size}: {model.architecture} is run through transformers' own "
            "class, on one device. Start with --tensor-parallel-size 1."
        )


def start(
    config: EngineConfig,
    send: Callable[[Event], None],
    ranks: Ranks | None = None,
    finding: FindingDevice | None = None,
) -> tuple[Engine, Ready, Sleeper, Verification | None]:
    """Load the model and build its engine, or with `ranks` this rank's part of it.

    `finding` may be under way already. Raises `FirstlightError` for what a person must mend, but
    `WrongWeights` for what another start will.
    """
    native.share_cores(config.world_size)
    finding = finding or FindingDevice()
    if config.device != "cpu":
        finding.begin()
    preparation = Preparation(config, send, ranks, finding)
    preparation.start()
    if ranks is None:
        preparation.look_for()
    import_torch()
    torch_imported = marks.since_exec()
    opening = _open(config, finding)
    from runtime.engine.build import build_engine
    from runtime.engine.sleeper import Sleeper

    group = None
    if ranks is not None:
        from runtime.parallel.entry import enter

        preparation.meet()
        group = enter(ranks, preparation.driver, _PATIENCE * config.stuck_after_s)
    if opening is not None:
        importlib.import_module("runtime.engine.gpu.runner")  # while weights are on their way
    preparation.finish()
    preparation.end_products()  # the memory that they take is counted from here on
    if ranks is not None and len(set(ranks.control.exchange(preparation.directory.name))) > 1:
        # Nobody has to mend this: started again, they most likely find the same.
        raise RuntimeError("The ranks have different versions of the model; it changed at its source.")
    memory = _memory(preparation, config.world_size)
    verification = preparation.verification
    try:
        engine, dtype = build_engine(
            config,
            preparation.directory,
            preparation.model,
            preparation.weights.tensors,
            preparation.device,
            memory,
            group,
        )
        if opening is not None:
            opening.join()
        sleeper = Sleeper(engine, memory, send)
    except Exception:
        if verification is not None:
            verification.judge()
        raise
    if verification is None and config.rank == 0:
        persist_meanwhile(preparation.directory)
    preparation.marks |= {"torch": torch_imported, "ready": marks.since_exec()}
    return engine, _ready(preparation, engine, str(dtype), ranks), sleeper, verification


def _open(config: EngineConfig, finding: FindingDevice) -> Opening | None:
    """Begin to enter the GPU, if there is one."""
    if config.device == "cpu" or not finding.found():
        return None
    from runtime.engine.gpu.opening import Opening

    opening = Opening()
    opening.start()
    return opening


def _ready(preparation: Preparation, engine: Engine, dtype: str, ranks: Ranks | None) -> Ready:
    """What there is to be said of an engine that takes requests."""
    blocks = engine.scheduler.blocks
    compiled = _kernels_compiled(preparation.device)
    return Ready(
        device=preparation.device,
        dtype=dtype.removeprefix("torch."),
        max_model_len=engine.max_model_len,
        vocab_size=engine.vocab_size,
        block_size=blocks.block_size,
        num_blocks=blocks.num_blocks,
        weight_bytes=preparation.plan.read_bytes,
        marks=preparation.marks,
        counters={**_bytes(preparation, ranks), "kernels_compiled": compiled},
        unverified=preparation.verification is not None,
    )


def _bytes(preparation: Preparation, ranks: Ranks | None) -> dict[str, int]:
    """What was read from files, by all ranks together, and what the most burdened device was sent of it."""
    read, sent = preparation.weights.num_bytes, preparation.plan.read_bytes
    if ranks is None:
        return {"bytes_read": read}
    everyone = ranks.control.exchange([read, sent])
    return {
        "bytes_read": sum(each[0] for each in everyone),
        "bytes_to_device": max(each[1] for each in everyone),
    }


def _kernels_compiled(device: str) -> int:
    """How many of the device's kernels had to be compiled for this start."""
    if device == "cpu":
        return 0  # they are compiled before the start, or with the first one of a machine
    from runtime.kernels.gpu.launch import num_compiled

    return num_compiled()


def _memory(preparation: Preparation, num_ranks: int) -> Memory:
    """What comes and goes with sleep."""
    weights, driver = preparation.weights, preparation.driver
    if driver is None:
        from runtime.engine.cpu.memory import HostMemory

        assert isinstance(weights, MappedWeights)
        return HostMemory(weights)
    from runtime.engine.gpu.memory import DeviceMemory

    return DeviceMemory(driver, weights if isinstance(weights, DeviceWeights) else None, num_ranks)
