"""How long live traffic waits for what a server puts off until after its first token.

    python scripts/bench/stalls.py [--model FOLDER] [--device cuda] [--json PATH]

One stream runs from the moment that a cold server listens, and every so often further requests join it, a
few more each time, so that steps of ever more sequences come for the first time: their graphs are captured
while the stream waits for its next token. When nothing is put off any more, the same is done again. What
the longest wait between two of the stream's tokens is longer than then, a capture took.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time

from harness import BenchError, client, servers
from harness.contender import require_complete
from harness.process import ServerProcess
from harness.report import Report, make_parser, progress, run
from harness.servers import Server
from harness.sse import Answer
from harness.summary import summarize

STREAM_TOKENS = 1000
JOIN = (1, 2, 4, 8, 8, 8)
JOIN_TOKENS = 150
PROMPT_TOKENS = 32
PAUSE_SECONDS = 0.6
QUIET_SECONDS = 60.0


def prompt_of(rnd: random.Random) -> list[int]:
    return [rnd.randint(100, 900) for _ in range(PROMPT_TOKENS)]


def first_connection(process: ServerProcess) -> None:
    """Wait until the server listens."""
    while time.monotonic() - process.t0 < QUIET_SECONDS:
        try:
            client.connect(process.port, 1.0).close()
        except OSError:
            process.check_alive()
            time.sleep(0.001)
        else:
            return
    raise BenchError(f"{process.name} does not listen.\n{process.log()}")


def one_pass(server: Server, process: ServerProcess, seed: int) -> Answer:
    """The stream that others join. Raises BenchError unless all answers are whole."""
    rnd = random.Random(seed)
    answers: list[Answer] = []

    def ask(prompt: list[int], tokens: int) -> None:
        answer = client.stream(process.port, server.greedy(prompt, tokens))
        answers.append(answer)
        require_complete(server.name, answer, PROMPT_TOKENS, tokens)

    threads = [threading.Thread(target=ask, args=(prompt_of(rnd), STREAM_TOKENS))]
    threads[0].start()
    for count in JOIN:
        time.sleep(PAUSE_SECONDS)
        threads += [threading.Thread(target=ask, args=(prompt_of(rnd), JOIN_TOKENS)) for _ in range(count)]
        for thread in threads[-count:]:
            thread.start()
    for thread in threads:
        thread.join()
    if len(answers) != len(threads) or any(answer.error for answer in answers):
        raise BenchError(f"not every request was answered: {[each.error for each in answers]}")
    return next(answer for answer in answers if answer.completion_tokens == STREAM_TOKENS)


def wait_for_graphs(process: ServerProcess) -> None:
    """Until the server says that nothing is left to be captured."""
    deadline = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < deadline:
        status, body = client.get(process.port, "/status")
        if status == 200 and "graphs" in json.loads(body)["marks"]:
            return
        time.sleep(0.2)
    raise BenchError(f"graphs were still being captured after {QUIET_SECONDS:.0f} s")


def waits_of(answer: Answer) -> list[float]:
    """Milliseconds between each two of a stream's events."""
    return [1e3 * (after - before) for before, after in itertools.pairwise(answer.times)]


def main() -> None:
    parser = make_parser(__doc__)
    servers.add_server_flags(parser)
    options = parser.parse_args()
    folder = servers.model_folder(options.model)
    report = Report("what live traffic waits for captures of graphs", options)
    (server, *_) = servers.chosen(options, folder)
    report.add_servers([server])
    with server.start() as process:
        first_connection(process)
        progress("once to warm up: kernels are compiled once for all servers")
        one_pass(server, process, 2)
    with server.start() as process:
        first_connection(process)
        progress("the first requests of a cold server")
        cold = waits_of(one_pass(server, process, 0))
        if options.device == "cuda":
            progress("waiting until all graphs are there")
            wait_for_graphs(process)
        progress("the same again")
        warm = waits_of(one_pass(server, process, 1))
    rows = []
    for name, waits in (("first", cold), ("again", warm)):
        ordered = sorted(waits)
        report.data[name] = {"worst_ms": ordered[-1], "waits_ms": waits}
        rows.append([name, *(f"{value:.1f}" for value in (summarize(waits).median, *ordered[-4:][::-1]))])
    report.data["stall_ms"] = max(cold) - max(warm)
    report.add_table(
        "milliseconds between two tokens of a stream", ["", "median", "longest", "2nd", "3rd", "4th"], rows
    )
    report.add_note(f"the worst stall by a capture: {max(0.0, max(cold) - max(warm)):.1f} ms")
    report.finish()


if __name__ == "__main__":
    run(main)
