"""Decode and prefill on a CPU, over HTTP, beside llama.cpp's server with the same model.

    python scripts/bench/cpu.py [--peer-python PYTHON] [--rounds N] [--json PATH]

The servers are started together and measured in turn, so that what the machine does meanwhile hits all
of them; each round also measures how fast memory is read and what a float32 matrix product reaches.

  one stream   tokens per second of one answer, from its first token to its last
  8 streams    tokens of 8 answers together, from the first token of any to the last of all
  prefill      tokens of a prompt of 512, by the time to the first token
"""

from __future__ import annotations

import argparse
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import BenchError, answers, checkpoint, limits_cpu, servers
from harness.contender import Contender, started
from harness.report import Report, make_parser, progress, run
from harness.summary import Summary, ratios, summarize
from harness.table import number, spread
from tokenizers import Tokenizer

STREAMS = 8
PREFILL_TOKENS = 512
MEASURES = ("one stream", f"{STREAMS} streams", "prefill")
MEMORY, PRODUCT = "memory read, B/s", "float32 matrix product, op/s"
BEGINNINGS = (
    "The lighthouse keeper climbed the stairs as he had done every evening for thirty years, and",
    "In the morning the market was full of people who had come from the villages to sell",
    "A river begins as rain in the mountains, and on its long way to the sea it",
    "The first rule of the old library was that nobody should ever read a book that",
    "When the train stopped in the middle of the night, the passengers looked at each other and",
    "Bread is made of flour, water, salt and time, and the baker who has no time",
    "She had learned to play the violin from her grandfather, who always told her that",
)

Speeds = dict[str, dict[str, list[float]]]
"""Tokens per second, or the unit of a limit: by server (or "limits") and measure, one value a round."""


def one_stream(contender: Contender, tokens: int) -> float:
    """Tokens per second of one answer."""
    answer = contender.ask_reference(contender.references.explain, tokens)
    return (tokens - 1) / (answer.last - answer.first)


def many_streams(contender: Contender, tokens: int, others: list[list[int]]) -> float:
    """Tokens per second of several answers at once, one of which is checked."""
    with ThreadPoolExecutor(1 + len(others)) as pool:
        known = pool.submit(contender.ask_reference, contender.references.explain, tokens)
        asked = [known, *(pool.submit(contender.ask, prompt, tokens) for prompt in others)]
        answers = [future.result() for future in asked]
    seconds = max(answer.last for answer in answers) - min(answer.first for answer in answers)
    return len(answers) * (tokens - 1) / seconds


def prefill(contender: Contender, prompt: list[int]) -> float:
    """Prompt tokens per second, by the time from sending the request to its first token."""
    answer = contender.ask(prompt, 1)
    if answer.cached_tokens:
        raise BenchError(f"{contender.name} had {answer.cached_tokens} tokens of a new prompt in its cache")
    return len(prompt) / (answer.first - answer.sent)


def measure(contenders: list[Contender], folder: Path, rounds: int, tokens: int) -> Speeds:
    """All measurements, in rounds that each begin with another server."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    others = [tokenizer.encode(text, add_special_tokens=False).ids for text in BEGINNINGS]
    vocab_size = tokenizer.get_vocab_size()
    found: Speeds = {contender.name: {name: [] for name in MEASURES} for contender in contenders}
    found["limits"] = {MEMORY: [], PRODUCT: []}
    progress("warming up")
    measure_round(contenders, others, tokens, new_prompt("warm-up", vocab_size))
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        start = turn % len(contenders)
        order = contenders[start:] + contenders[:start]
        speeds = measure_round(order, others, tokens, new_prompt(f"round {turn}", vocab_size))
        speeds["limits"] = {
            MEMORY: limits_cpu.memory_read(limits_cpu.cores()),
            PRODUCT: limits_cpu.matrix_product(),
        }
        for name, row in speeds.items():
            for measure, speed in row.items():
                found[name][measure].append(speed)
    return found


def new_prompt(seed: str, vocab_size: int) -> list[int]:
    """Token ids that no server has seen before."""
    draw = random.Random(seed)
    return [draw.randrange(100, vocab_size - 100) for _ in range(PREFILL_TOKENS)]


def measure_round(
    order: list[Contender], others: list[list[int]], tokens: int, prompt: list[int]
) -> dict[str, dict[str, float]]:
    """Every server once, in the order given."""
    speeds = {}
    for contender in order:
        values = (
            one_stream(contender, tokens),
            many_streams(contender, tokens, others),
            prefill(contender, prompt),
        )
        speeds[contender.name] = dict(zip(MEASURES, values, strict=True))
    return speeds


def speed_limits(limits: dict[str, list[float]], folder: Path) -> dict[str, Summary]:
    """What each measure would be if reading the weights, or multiplying by them, were all there is to do."""
    size = checkpoint.weight_bytes(folder)
    operations = 2 * checkpoint.layer_parameters(folder)
    return {
        MEASURES[0]: summarize(speed / size for speed in limits[MEMORY]),
        MEASURES[1]: summarize(STREAMS * speed / size for speed in limits[MEMORY]),
        MEASURES[2]: summarize(speed / operations for speed in limits[PRODUCT]),
    }


def tabulate(report: Report, found: Speeds, folder: Path) -> None:
    """The table of speeds, and that of this project's ratios to the limits and to the peers."""
    raw_limits = found.pop("limits")
    limit = speed_limits(raw_limits, folder)
    speeds = {name: {measure: summarize(row[measure]) for measure in MEASURES} for name, row in found.items()}
    ours, *peers = speeds
    shown = {**speeds, "limit at the checkpoint's size": limit}
    report.add_table(
        "tokens per second, median (lowest to highest)",
        ["", *MEASURES],
        [[name, *(spread(row[measure]) for measure in MEASURES)] for name, row in shown.items()],
    )
    against = {"the limit": limit, **{peer: speeds[peer] for peer in peers}}
    multiples = {
        name: {m: ratios(speeds[ours][m].values, row[m].values) for m in MEASURES}
        for name, row in against.items()
    }
    report.add_table(
        f"{ours} in multiples of …, round by round",
        ["", *MEASURES],
        [[name, *(spread(row[measure]) for measure in MEASURES)] for name, row in multiples.items()],
    )
    memory, product = (summarize(raw_limits[name]).median / 1e9 for name in (MEMORY, PRODUCT))
    report.add_note(
        f"memory read by {limits_cpu.cores()} threads: {number(memory)} GB/s; "
        f"float32 matrix product: {number(product)} GFLOP/s"
    )
    report.data |= {
        "tokens_per_second": as_json(shown),
        "limits": raw_limits,
        "ratios": as_json(multiples),
    }


def as_json(rows: dict[str, dict[str, Summary]]) -> dict[str, Any]:
    return {name: {m: value.as_json() for m, value in row.items()} for name, row in rows.items()}


def main() -> None:
    parser = make_parser(__doc__)
    servers.add_server_flags(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each answer (default: 64)")
    parser.set_defaults(device="cpu")
    options: argparse.Namespace = parser.parse_args()
    folder = servers.model_folder(options.model)
    references = answers.find(folder)
    report = Report("decode and prefill over HTTP", options)
    chosen = servers.chosen(options, folder)
    report.add_servers(chosen)
    with started(chosen, references) as contenders:
        found = measure(contenders, folder, options.rounds, options.tokens)
    tabulate(report, found, folder)
    report.finish()


if __name__ == "__main__":
    run(main)
