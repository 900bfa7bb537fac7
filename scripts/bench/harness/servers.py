"""The servers that are measured: this one, llama.cpp's, and any other with an OpenAI-shaped API."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import ROOT, BenchError, gguf_file
from harness.checkpoint import weight_files
from harness.process import ServerProcess, free_port

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Server:
    """How to start a server. `{port}` in its command stands for the port to listen on.

    `fields` are put into every request, `environment` into the server's. `lossy` says that its weights,
    which are in `weight_files`, hold less than the checkpoint's.
    """

    name: str
    command: tuple[str, ...]
    ready_path: str = "/health"
    fields: dict[str, object] = field(default_factory=dict)
    weight_files: list[Path] = field(default_factory=list)
    lossy: bool = False
    version: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> ServerProcess:
        port = free_port()
        command = [part.replace("{port}", str(port)) for part in self.command]
        return ServerProcess(self.name, command, port, self.environment)

    def greedy(self, prompt: list[int], max_tokens: int) -> dict[str, object]:
        """The body of a request for exactly `max_tokens` greedy tokens after a prompt of ids."""
        sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return {**self.fields, "prompt": prompt, **sampling}


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name the model and the servers to compare."""
    parser.add_argument(
        "--model", metavar="MODEL", help="as for `firstlight serve` (default: the default model)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument(
        "--serve-args", default="", metavar="ARGS", help="further arguments of `firstlight serve`, quoted"
    )
    parser.add_argument(
        "--peer-python",
        type=Path,
        metavar="PYTHON",
        help="a Python that has xllamacpp: llama.cpp's server is measured beside this one",
    )
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="another server to measure; {port} in COMMAND is replaced, {model} by the model's folder",
    )


def model_folder(model: str | None) -> Path:
    """The folder with the model's files, fetched into the cache where they are not there yet."""
    if model is not None and Path(model).is_dir():
        return Path(model).resolve()
    command = [sys.executable, "-m", "handler", "pull", *([model] if model else [])]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"`{shlex.join(command)}` failed, see above")
    return Path(done.stdout.strip().splitlines()[-1])


def chosen(options: argparse.Namespace, folder: Path) -> list[Server]:
    """The servers that the flags ask for, this project's first."""
    size = ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    servers = [firstlight(folder, options.device, [*size, *shlex.split(options.serve_args)])]
    if options.peer_python is not None:
        servers.extend(llamacpp(options.peer_python, folder))
    for text in options.server:
        name, separator, command = text.partition("=")
        if not separator:
            raise BenchError(f"--server {text}: write NAME=COMMAND")
        parts = shlex.split(command.replace("{model}", str(folder)))
        servers.append(
            Server(name, tuple(parts), fields={"model": str(folder)}, weight_files=weight_files(folder))
        )
    return servers


def firstlight(
    folder: Path, device: str, arguments: Sequence[str] = (), source: str | None = None, **others: str
) -> Server:
    """This project's server, as this clone has it; `others` are for its environment.

    `source` is where it has the model in `folder` from, if not from there.
    """
    command = (sys.executable, "-m", "handler", "serve", source or str(folder), "--port", "{port}")
    return Server(
        "firstlight",
        (*command, "--device", device, *arguments),
        ready_path="/health/ready",
        weight_files=weight_files(folder),
        version=_commit(),
        environment=others,
    )


def _commit() -> str | None:
    """The commit of this clone, and whether anything was changed since; None where git does not know."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def llamacpp(python: Path, folder: Path) -> list[Server]:
    """llama.cpp's server with the same weights at full accuracy (F16), and with its fastest type (Q4_0)."""
    ask = "import xllamacpp as x; print(x.__version__, x.get_system_info())"
    probe = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        raise BenchError(f"--peer-python {python}: {probe.stderr.strip().splitlines()[-1]}")
    servers = []
    for kind in ("F16", "Q4_0"):
        path = gguf_file.converted(folder, kind)
        command = (str(python), "-P", str(_HERE / "llamacpp_serve.py"), str(path), "{port}")
        version = probe.stdout.strip()
        servers.append(
            Server(f"llama.cpp {kind}", command, weight_files=[path], lossy=kind != "F16", version=version)
        )
    return servers
