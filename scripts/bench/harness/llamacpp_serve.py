"""Runs llama.cpp's own server through the wheel xllamacpp: llamacpp_serve.py MODEL.gguf PORT.

For the peer's Python, which need not have anything but that wheel.
"""

from __future__ import annotations

import os
import signal
import sys

import xllamacpp

SLOTS = 8
# Together as much as the default model's longest context.
CONTEXT_PER_SLOT = 1024


def main() -> None:
    path, port = sys.argv[1], int(sys.argv[2])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.port = port
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * CONTEXT_PER_SLOT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    # No prompt comes twice, so keeping finished ones would only cost time.
    params.cache_ram_mib = 0
    params.verbosity = 1
    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    # Its threads need not be waited for: there is nothing to save.
    os._exit(0)


if __name__ == "__main__":
    main()
