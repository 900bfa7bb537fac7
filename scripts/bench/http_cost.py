"""What HTTP costs beside the engine: time for each request, processor time for each token, memory.

    python scripts/bench/http_cost.py [--model FOLDER] [--streams N] [--idle N] [--rounds N] [--json PATH]

The server is the real handler, the engine a stub that computes nothing, so that all that is measured is
the handler's (the model lends its tokenizer and its chat template).

- A request for one token, over a connection that is open already, against the same request given to the
  engine's client without HTTP: the limit is the engine's own time.
- Many streams at once, each of which gets a token a step: the processor time of the handler for each
  token. The limit is what the kernel takes to send so many pieces from Python.
- Many streams that have begun and wait: the memory (PSS) of the handler process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from harness import ROOT, BenchError, client, load, pss, servers
from harness.process import ServerProcess, free_port
from harness.report import Report, make_parser, progress, run
from harness.summary import percentiles, summarize
from harness.table import number, spread

REQUESTS = 500
STEP_MS = 40.0
STREAM_TOKENS = 200
NEVER_MS = 3.6e6
READY_SECONDS = 60.0
MESSAGES = [{"role": "user", "content": "Explain in two sentences what a hash table is."}]
PROMPT = list(range(400, 432))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
    "chat, streamed": ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}),
    "completion": ("/v1/completions", {"prompt": PROMPT}),
    "completion, streamed": ("/v1/completions", {"prompt": PROMPT, "stream": True}),
}


@contextmanager
def served(folder: Path, step_ms: float) -> Iterator[ServerProcess]:
    """The handler with a stub behind it, ready."""
    port = free_port()
    command = [sys.executable, "-m", "scripts.bench.harness.stub_serve", str(folder), str(port), str(step_ms)]
    with ServerProcess("the handler", command, port) as process:
        process.wait_ready("/health/ready", READY_SECONDS)
        yield process


# ---- one token ---------------------------------------------------------------------------------


def one_token_times(port: int, path: str, body: dict[str, Any]) -> list[float]:
    """Seconds for each of many requests for one token, one after the other on one connection."""
    raw = json.dumps({**body, "max_tokens": 1}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    request = head.encode() + b"\r\n\r\n" + raw
    times = []
    with client.connect(port, READY_SECONDS) as connection:
        for _ in range(REQUESTS):
            began = time.perf_counter()
            connection.sendall(request)
            answer = read_answer(connection)
            times.append(time.perf_counter() - began)
            if b'"finish_reason":"length"' not in answer:
                raise BenchError(f"POST {path}: {answer[:500]!r}")
    return times[REQUESTS // 10 :]


def read_answer(connection: socket.socket) -> bytes:
    """A whole answer, which ends where its length says or with the last of its chunks."""
    answer = b""
    while not ends(answer):
        data = connection.recv(1 << 16)
        if not data:
            raise BenchError(f"the server hung up: {answer[:500]!r}")
        answer += data
    return answer


def ends(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        return body.endswith(b"\r\n0\r\n\r\n")
    length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return bool(length) and len(body) >= int(length)


def engine_times(folder: Path) -> list[float]:
    """The same without HTTP: the client of the engine alone, and the stub."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from runtime.protocol import SamplingParams, Submit
    from scripts.bench.harness.stub_client import StubClient

    async def measure() -> list[float]:
        engine = StubClient(folder, 0)
        life = asyncio.create_task(engine.run())
        await engine.wait_ready()
        times = []
        for turn in range(REQUESTS):
            began = time.perf_counter()
            sampling = SamplingParams(max_tokens=1)
            submit = Submit(request_id=str(turn), prompt_token_ids=PROMPT, sampling=sampling)
            async for _ in engine.submit(submit):
                pass
            times.append(time.perf_counter() - began)
        await engine.close(drain_seconds=1)
        await life
        return times[REQUESTS // 10 :]

    return asyncio.run(measure())


def measure_latency(folder: Path) -> dict[str, list[float]]:
    """Seconds by kind of request; "engine" is without HTTP."""
    found = {"engine": engine_times(folder)}
    with served(folder, 0) as process:
        for kind, (path, body) in KINDS.items():
            found[kind] = one_token_times(process.port, path, body)
    return found


# ---- many streams ------------------------------------------------------------------------------


def processor_seconds(pid: int) -> float:
    """What a process has used so far, its children aside."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_streams(folder: Path, kind: str, streams: int) -> tuple[float, float]:
    """The handler's processor seconds for each token, and how many tokens came with one event."""
    path, body = KINDS[kind]
    asked = {**body, "max_tokens": STREAM_TOKENS, "ignore_eos": True}
    jobs = [load.Job(client.completion_request(asked, path))] * streams
    with served(folder, STEP_MS) as process:
        load.run(process.port, jobs[:8], 8, 1)
        before = processor_seconds(process.pid)
        outcomes = load.run(process.port, jobs, streams, 1)
        used = processor_seconds(process.pid) - before
    for outcome in outcomes:
        if outcome.answer.error is not None or outcome.answer.completion_tokens != STREAM_TOKENS:
            raise BenchError(f"{kind}: {outcome.answer.error or outcome.answer.completion_tokens}")
    tokens = streams * STREAM_TOKENS
    return used / tokens, tokens / sum(len(outcome.answer.times) for outcome in outcomes)


def send_seconds(streams: int) -> float:
    """Processor seconds of sending one piece to one of so many sockets whose other ends are read."""
    rounds, piece = 50, b"x" * 260
    with ExitStack() as stack:
        pairs = [connected(stack) for _ in range(streams)]
        readers = [threading.Thread(target=read_all, args=(ends,)) for _, ends in pairs]
        for reader in readers:
            reader.start()
        used = 0.0
        for _ in range(rounds):
            began = time.thread_time()
            for ours, _ in pairs:
                ours.send(piece)
            used += time.thread_time() - began
            time.sleep(STEP_MS / 1e3)
        for ours, _ in pairs:
            ours.shutdown(socket.SHUT_RDWR)
        for reader in readers:
            reader.join()
    return used / (rounds * streams)


def connected(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection over the loopback device."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = stack.enter_context(socket.create_connection(server.getsockname()))
        ours = stack.enter_context(server.accept()[0])
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


def read_all(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


# ---- idle streams ------------------------------------------------------------------------------


def measure_memory(folder: Path, streams: int) -> tuple[int, int]:
    """Bytes of the handler process without any stream, and with so many that have begun and wait."""
    path, body = KINDS["chat, streamed"]
    request = client.completion_request({**body, "max_tokens": 1000}, path)
    with served(folder, NEVER_MS) as process, ExitStack() as stack:
        with client.connect(process.port, READY_SECONDS) as first:
            begin_stream(first, request)
        before = pss.measure(process.pid, []).total
        for _ in range(streams):
            begin_stream(stack.enter_context(client.connect(process.port, READY_SECONDS)), request)
        return before, pss.measure(process.pid, []).total


def begin_stream(connection: socket.socket, request: bytes) -> None:
    """Ask, and read up to the first event, which comes with the first token."""
    connection.sendall(request)
    answer = b""
    while b"data: " not in answer:
        data = connection.recv(1 << 16)
        if not data:
            raise BenchError(f"the server hung up: {answer[:500]!r}")
        answer += data


# ---- the report --------------------------------------------------------------------------------


def tabulate_latency(report: Report, rounds: list[dict[str, list[float]]]) -> None:
    rows, figures = [], {}
    for kind in rounds[0]:
        found = [percentiles(one[kind]) for one in rounds]
        beyond = [f["p50"] - percentiles(one["engine"])["p50"] for f, one in zip(found, rounds, strict=True)]
        cells = [spread(summarize(f[p] * 1e3 for f in found)) for p in ("p50", "p95")]
        if kind == "engine":
            rows.append(["limit: the engine's client alone", *cells, ""])
        else:
            rows.append([kind, *cells, spread(summarize(1e3 * value for value in beyond))])
        figures[kind] = {"percentiles": found, "p50_beyond_engine": beyond}
    report.add_table("A request for one token, ms", ["", "p50", "p95", "p50 beyond the engine"], rows)
    report.data["one_token_seconds"] = figures


def tabulate_streams(report: Report, found: dict[str, list[tuple[float, float]]], limit: list[float]) -> None:
    rows = []
    for kind, rounds in found.items():
        seconds = [one for one, _ in rounds]
        per_event = summarize(merged for _, merged in rounds)
        speed = summarize(1 / one for one in seconds)
        micro = summarize(1e6 * one for one in seconds)
        rows.append([kind, spread(micro), spread(speed), f"{per_event.median:.2f}"])
    rows.append(["limit: sending alone", spread(summarize(1e6 * one for one in limit)), "", ""])
    headers = ["", "µs a token", "tokens a processor second", "tokens an event"]
    report.add_table("The handler's processor time, many streams at once", headers, rows)
    report.data["streams"] = {
        "seconds_per_token": {kind: [one for one, _ in rounds] for kind, rounds in found.items()},
        "limit_seconds": limit,
    }


def tabulate_memory(report: Report, found: list[tuple[int, int]], streams: int) -> None:
    before, after = (summarize(size / 1e6 for size in sizes) for sizes in zip(*found, strict=True))
    each = summarize((full - empty) / streams / 1e3 for empty, full in found)
    row = [f"{streams} streams", spread(before), spread(after), spread(each)]
    headers = ["", "before, MB", "with all of them, MB", "kB a stream"]
    report.add_table("Memory of the handler process (PSS), streams that wait", headers, [row])
    report.data["memory_bytes"] = found


def repeated(rounds: int, what: str, measure: Callable[[], Any]) -> list[Any]:
    found = []
    for turn in range(rounds):
        progress(f"{what}, round {turn + 1} of {rounds}")
        found.append(measure())
    return found


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", metavar="FOLDER", help="whose tokenizer is used (default: the default's)")
    parser.add_argument("--streams", type=int, default=256, metavar="N", help="at once (default: 256)")
    parser.add_argument("--idle", type=int, default=1000, metavar="N", help="that wait (default: 1,000)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    return parser.parse_args()


def main() -> None:
    options = parse()
    folder = servers.model_folder(options.model)
    report = Report("what HTTP costs beside the engine", options)
    tabulate_latency(report, repeated(options.rounds, "one token", lambda: measure_latency(folder)))
    found = {
        kind: repeated(options.rounds, kind, lambda kind=kind: measure_streams(folder, kind, options.streams))
        for kind in ("chat", "completion")
    }
    limit = repeated(options.rounds, "sending alone", lambda: send_seconds(options.streams))
    tabulate_streams(report, found, limit)
    idle = repeated(options.rounds, "idle streams", lambda: measure_memory(folder, options.idle))
    tabulate_memory(report, idle, options.idle)
    report.add_note(
        f"{number(options.streams)} streams of {STREAM_TOKENS} tokens, a token every {STEP_MS:.0f} ms each"
    )
    report.finish()


if __name__ == "__main__":
    run(main)
