"""How much memory a served model takes, all processes together, after it has answered.

    python scripts/bench/memory.py [--peer-python PYTHON] [--rounds N] [--json PATH]

PSS: pages that several processes share are counted once, divided among them. Weights that are mapped
from their file are listed apart, because the kernel takes them back when it needs the room. The limit
is the size of the weights: no server can compute with less of them in memory. Run it with nothing else
about: pages that a foreign process maps as well (torch's libraries) are divided with that one too.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from harness import answers, checkpoint, pss, servers
from harness.contender import Contender, started
from harness.process import tree
from harness.pss import Memory
from harness.report import Report, make_parser, progress, run
from harness.summary import Summary, summarize
from harness.table import number, spread

STREAMS = 8
ANSWER_TOKENS = 32
PROMPT_TOKENS = 512
PARTS = ("all", "mapped weights", "the rest")


def serve(contender: Contender, vocab_size: int) -> None:
    """Let a server do what it does all day: one answer alone, several at once, a long prompt."""
    references = contender.references
    contender.ask_reference(references.explain, ANSWER_TOKENS)
    with ThreadPoolExecutor(STREAMS) as pool:
        asked = [
            pool.submit(contender.ask_reference, reference, ANSWER_TOKENS)
            for reference in (references.explain, references.count) * (STREAMS // 2)
        ]
        for future in asked:
            future.result()
    draw = random.Random("memory")
    contender.ask([draw.randrange(100, vocab_size - 100) for _ in range(PROMPT_TOKENS)], 1)


def measure(server: servers.Server, references: answers.References, vocab_size: int) -> list[Memory]:
    """The processes of one server after it has served, the first of them first."""
    with started([server], references) as (contender,):
        serve(contender, vocab_size)
        return [pss.measure(pid, server.weight_files) for pid in tree(contender.process.pid)]


def parts(processes: list[Memory]) -> dict[str, int]:
    """The three figures of one server, in bytes."""
    total = sum(process.total for process in processes)
    mapped = sum(process.mapped for process in processes)
    return dict(zip(PARTS, (total, mapped, total - mapped), strict=True))


def tabulate(report: Report, found: dict[str, list[list[Memory]]], folder: Path) -> None:
    """One row for each server, one for each of its processes, and the limit."""
    size = checkpoint.weight_bytes(folder)
    rows, figures = [], {}
    for name, rounds in found.items():
        totals = [parts(processes) for processes in rounds]
        figures[name] = {part: summarize(total[part] for total in totals) for part in PARTS}
        rows.append([name, *(megabytes(figures[name][part]) for part in PARTS)])
        for place, process in enumerate(rounds[-1]):
            own = parts([process])
            label = f"  process {place + 1} of {len(rounds[-1])}"
            rows.append([label, *(number(own[part] / 1e6) for part in PARTS)])
    rows.append(["limit: the checkpoint's weights", number(size / 1e6), "", ""])
    report.add_table("PSS in MB, median (lowest to highest); processes: last round", ["", *PARTS], rows)
    report.data |= {
        "bytes": {
            name: {part: value.as_json() for part, value in row.items()} for name, row in figures.items()
        },
        "processes": {
            name: [[asdict(one) for one in row] for row in rounds] for name, rounds in found.items()
        },
        "limit_bytes": size,
        "ratio_to_limit": {name: row["all"].median / size for name, row in figures.items()},
    }


def megabytes(value: Summary) -> str:
    return spread(summarize(size / 1e6 for size in value.values))


def main() -> None:
    parser = make_parser(__doc__)
    servers.add_server_flags(parser)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="starts of each (default: 3)")
    options = parser.parse_args()
    folder = servers.model_folder(options.model)
    references = answers.find(folder)
    vocab_size = checkpoint.config_of(folder)["vocab_size"]
    report = Report("memory of a served model", options)
    chosen = servers.chosen(options, folder)
    report.add_servers(chosen)
    found: dict[str, list[list[Memory]]] = {server.name: [] for server in chosen}
    for turn in range(options.rounds):
        progress(f"round {turn + 1} of {options.rounds}")
        for server in chosen:
            found[server.name].append(measure(server, references, vocab_size))
    tabulate(report, found, folder)
    report.finish()


if __name__ == "__main__":
    run(main)
