"""Device memory that can be given back and taken anew at the same address.

The addresses are reserved once, and what lies behind them comes and goes. So whatever holds an address
(a tensor, a CUDA graph) stays good, though nothing may touch it while the memory is away.

Source: the CUDA Driver API reference, "Virtual Memory Management".
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_ubyte, c_uint64, c_ulonglong, c_void_p

from runtime.weights.cuda_driver import Driver

_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED: ordinary memory of a device
_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("type", c_int), ("id", c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", c_int), ("handle_types", c_int), ("location", _Location), ("metadata", c_void_p),
        ("flags", c_ubyte * 8),
    ]  # fmt: skip


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", c_int)]


class VirtualMemory:
    """Some memory of the driver's device. It is there from the start; its content is undefined.

    `num_bytes` is what was asked for, rounded up to what the device can map.
    """

    def __init__(self, driver: Driver, num_bytes: int) -> None:
        self._driver = driver
        device = c_int()
        driver.call("cuCtxGetDevice", byref(device))
        location = _Location(_DEVICE, device.value)
        self._properties = _Properties(type=_PINNED, location=location)
        self._access = _Access(location, _READ_WRITE)
        granularity = c_size_t()
        driver.call("cuMemGetAllocationGranularity", byref(granularity), byref(self._properties), 0)
        self.num_bytes = -(-num_bytes // granularity.value) * granularity.value
        address = c_uint64()
        driver.call(
            "cuMemAddressReserve", byref(address), c_size_t(self.num_bytes), c_size_t(0), c_uint64(0),
            c_ulonglong(0),
        )  # fmt: skip
        self.address = address.value
        self.is_present = False
        self.take()

    def take(self) -> None:
        """Put memory behind the addresses, unless it is there. Raises `CudaError` if there is not enough."""
        if self.is_present:
            return
        call, size, address = self._driver.call, c_size_t(self.num_bytes), c_uint64(self.address)
        handle = c_uint64()
        call("cuMemCreate", byref(handle), size, byref(self._properties), c_ulonglong(0))
        try:
            call("cuMemMap", address, size, c_size_t(0), handle, c_ulonglong(0))
        finally:
            call("cuMemRelease", handle)  # from here on the mapping holds the memory
        call("cuMemSetAccess", address, size, byref(self._access), c_size_t(1))
        self.is_present = True

    def give_back(self) -> None:
        """Free the memory behind the addresses, if it is there; nothing on the device may be using it."""
        if self.is_present:
            self._driver.call("cuMemUnmap", c_uint64(self.address), c_size_t(self.num_bytes))
            self.is_present = False

    def close(self) -> None:
        """Give back the addresses, too."""
        self.give_back()
        self._driver.call("cuMemAddressFree", c_uint64(self.address), c_size_t(self.num_bytes))
