"""How a rank enters the group of all ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch._C import _distributed_c10d as c10d

from runtime.parallel.control import listen
from runtime.parallel.group import Group
from runtime.parallel.ranks import Ranks

if TYPE_CHECKING:
    from runtime.parallel.peers import Driver


def enter(ranks: Ranks, driver: Driver | None, timeout_s: float) -> Group:
    """Join the group, on a GPU if there is its `driver`, else on the CPU. All ranks must do this together.

    What takes the others longer than `timeout_s` is an error.
    """
    store = _store(ranks, timedelta(seconds=timeout_s))
    interface = "lo" if ranks.meeting.local else None
    # Who does not know the token does not find the keys.
    keys = c10d.PrefixStore(ranks.meeting.token, store)
    device = "cpu" if driver is None else "cuda"
    backend = _backend(keys, ranks, device, timedelta(seconds=timeout_s), interface)
    if driver is None or not ranks.meeting.local:
        return Group(backend, ranks)
    from runtime.parallel.peers import PeerGroup

    return PeerGroup(backend, ranks, driver)


def _store(ranks: Ranks, timeout: timedelta) -> c10d.Store:
    """Rank 0's store, on a port of its own, which the others hear of once it is served."""
    address, size = ranks.meeting.address, ranks.world_size
    if ranks.rank:
        port = ranks.control.exchange(0)[0]
        return c10d.TCPStore(address, port, size, timeout=timeout, wait_for_workers=False)
    listener = listen(address)
    port = listener.getsockname()[1]
    store = c10d.TCPStore(
        address, port, size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    ranks.control.exchange(port)
    return store


def _backend(
    store: c10d.Store, ranks: Ranks, device: str, timeout: timedelta, interface: str | None
) -> c10d.Backend:
    """NCCL or gloo among the ranks that share a store, over a network interface, None for any."""
    if device == "cuda":
        if interface is not None:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        settings = c10d.ProcessGroupNCCL.Options()
        settings._timeout = timeout
        return c10d.ProcessGroupNCCL(store, ranks.rank, ranks.world_size, settings)
    options: Any = c10d.ProcessGroupGloo.__dict__["_Options"]()
    options._timeout = timeout
    if interface is None:
        gloo = c10d.ProcessGroupGloo.create_default_device()
    else:
        gloo = c10d.ProcessGroupGloo.create_device(interface=interface)
    options._devices = [gloo]
    return c10d.ProcessGroupGloo(store, ranks.rank, ranks.world_size, options)
