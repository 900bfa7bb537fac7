"""Compiling kernels for a GPU that is not there: they go to Triton's cache, with what launches them.

Inside `compiling_for`, launching a kernel compiles and keeps it and does nothing else, so its arguments may
be tensors without data. Their dtypes and offsets decide what is compiled.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
import triton.runtime.build
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from runtime.kernels.gpu import binaries, cache, launch
from runtime.kernels.gpu.binaries import Binary
from runtime.kernels.gpu.hopper import product
from runtime.kernels.gpu.hopper.nvrtc import CannotCompile


@contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Compile for GPUs of a compute capability, 90 for 9.0; kernels do not depend on how large a GPU is.

    Needs a C compiler and Python's headers.

    Fill a cache in a process of its own: what it has compiled is taken for launched.
    """
    cache.prepare()
    properties = SimpleNamespace(multi_processor_count=1)
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler found: Triton needs one to make what launches its kernels")
    with tempfile.TemporaryDirectory() as folder, triton.knobs.nvidia.scope(), triton.knobs.build.scope():
        # Launchers are linked against the driver, which need not be there: one without content will do, if
        # the linker is told to note a library that it finds nothing in.
        empty, library, linking = (Path(folder) / name for name in ("empty.c", "libcuda.so.1", "cc"))
        empty.touch()
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, empty], check=True
        )
        linking.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} -Wl,--no-as-needed "$@"\n')
        linking.chmod(0o755)
        triton.knobs.nvidia.libcuda_path = folder
        triton.knobs.build.cc = str(linking)
        with (
            mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(capability, 10)),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
            mock.patch.object(triton.runtime.build, "_load_module_from_path", _not_loaded),
            mock.patch.object(JITFunction, "run", _compile),
            mock.patch.object(launch.Kernel, "_launch", _compile_only),
            mock.patch.object(product, "suits", _suits_where_compiled),
            mock.patch.object(product.WideProduct, "__call__", _product_left_out),
        ):
            from triton.backends.nvidia.driver import CudaUtils

            driver.set_active(_AbsentDevice(capability, CudaUtils()))
            yield


class _AbsentDevice:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int, utils: Any) -> None:
        self.utils = utils
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Argument:
    """What Triton looks at of a tensor argument."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self._offset = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        """An address that is aligned as the tensor's is: storages begin at multiples of 512."""
        return self._offset

    def ptr_range(self) -> int:
        """The bytes that can be reached from there: as with CUDA, nobody asks."""
        return 0


class _Unloaded(ModuleType):
    """A module of which only the file is wanted."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


def _suits_where_compiled(weight: torch.Tensor) -> bool:
    """As `product.suits`; what it is about is compiled, if there is what compiles it."""
    if not product.fits(weight):
        return False
    try:
        return product.num_compiled() > 0 or product.compile_all(weight.dtype) > 0
    except CannotCompile:
        return False


def _product_left_out(self: product.WideProduct, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out


def _not_loaded(name: str, path: str) -> ModuleType:
    return _Unloaded(name)


def _compile_only(kernel: launch.Kernel, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    described = tuple(_Argument(each) if isinstance(each, torch.Tensor) else each for each in arguments)
    capability = driver.active.get_current_target().arch
    key = kernel.key(described, constants)
    if (capability, key) in _compiled:
        return
    _compiled.add((capability, key))
    binary = Binary.of(kernel.compile(grid, described, constants), len(described))
    if binary is not None:
        binaries.keep(Path(triton.knobs.cache.dir), capability, kernel.name, key, binary)


_run = JITFunction.run
_compiled: set[tuple[int, str]] = set()


def _compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
    from triton.backends.nvidia.driver import CudaLauncher

    kernel = _run(self, *arguments, grid=grid, warmup=True, **named)
    CudaLauncher(kernel.src, kernel.metadata)
    return kernel
