"""Answers that a JSON schema holds to a form, beside free ones: throughput, time per token, and the form.

    python scripts/bench/structured.py [--model FOLDER] [--device cuda] [--concurrency N] [--json PATH]
    python scripts/bench/structured.py --quick           a small version of it, for two cores

So many clients send one after the other, at temperature 1, and every answer has the same number of tokens:
the schema is that of a list without an end. All answers are free, all are held to the schema, or every
second one is; the free ones say what the machine can do. Then come as many answers at temperature 2, to a
schema that has an end, and there is no report if one of them is anything else than what it asks for.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, replace
from typing import Any

from harness import BenchError, answers, checkpoint, client, limits_cpu, load, machine, servers
from harness.contender import Contender, started
from harness.load import Job, Outcome
from harness.report import Report, make_parser, progress, run
from harness.service_level import Experience, Objective, experience
from harness.summary import ratios, summarize
from harness.table import number, spread
from harness.workload import random_ids

CONCURRENCY, QUICK_CONCURRENCY = 64, 4
TOKENS, QUICK_TOKENS = 256, 32
PROMPT_TOKENS = 128
ANSWERS_OF_A_CLIENT = 3
REFERENCE_TOKENS = 32
MOST_PROCESSES = 8
OBJECTIVE = Objective(2.0, 0.05)
# Near the end of a string that is bounded, masks take the longest.
NAME_LENGTH, TAG_LENGTH = 40, 20
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": NAME_LENGTH},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "user", "guest"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": TAG_LENGTH}, "maxItems": 4},
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "role", "tags", "active"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 1000}
KINDS = ("free", "held", "free beside held", "held beside free")
HEADERS = ("", "output tok/s", "of free", "TTFT p50", "TPOT p50", "TPOT p99", "longest gap p99", "errors")

Found = dict[str, list[Experience]]


def body(prompt: list[int], max_tokens: int, seed: int, schema: dict[str, Any] | None) -> dict[str, Any]:
    """A request for exactly so many tokens, or for less if the schema comes to an end."""
    held = {} if schema is None else {"guided_json": schema}
    sampling = {"temperature": 1, "seed": seed, "ignore_eos": True}
    return {"prompt": prompt, "max_tokens": max_tokens, **sampling, **held}


def send(contender: Contender, bodies: list[dict[str, Any]], concurrency: int) -> list[Outcome]:
    jobs = [Job(client.completion_request(one)) for one in bodies]
    processes = max(1, min(MOST_PROCESSES, limits_cpu.cores() // 2))
    outcomes = load.run(contender.process.port, jobs, concurrency, processes)
    contender.process.check_alive()
    return outcomes


@dataclass(frozen=True)
class Work:
    """So many answers of so many tokens, to prompts that no other answers are to: none is in the cache."""

    concurrency: int
    count: int
    tokens: int
    vocab_size: int

    def prompts(self, name: str) -> list[list[int]]:
        draw = random.Random(name)
        return [random_ids(draw, PROMPT_TOKENS, self.vocab_size) for _ in range(self.count)]


def measure(contender: Contender, work: Work, name: str) -> Found:
    """One round of each kind."""

    def answers_to(kind: str, held: range) -> list[Outcome]:
        bodies = [
            body(prompt, work.tokens, place, ENDLESS if place in held else None)
            for place, prompt in enumerate(work.prompts(f"{name} {kind}"))
        ]
        return send(contender, bodies, work.concurrency)

    def seen(outcomes: list[Outcome]) -> Experience:
        return experience(outcomes, [work.tokens] * len(outcomes), OBJECTIVE)

    free, held = answers_to("free", range(0)), answers_to("held", range(work.count))
    mixed = answers_to("mixed", range(1, work.count, 2))
    groups = (free, held, mixed[::2], mixed[1::2])
    return {kind: [seen(outcomes)] for kind, outcomes in zip(KINDS, groups, strict=True)}


def check_form(contender: Contender, work: Work) -> int:
    """Answers to a schema that has an end, at a temperature that knows none: how many had room for it.

    Raises BenchError if one that says that it has ended is no such thing.
    """
    bodies = [
        body(prompt, 1000, place, PERSON) | {"temperature": 2}
        for place, prompt in enumerate(work.prompts("form"))
    ]
    ended = 0
    for outcome in send(contender, bodies, work.concurrency):
        answer = outcome.answer
        if answer.error is not None:
            raise BenchError(f"{contender.name}: {answer.error}")
        if answer.finish_reason == "stop":
            ended += 1
            check_person(contender.name, answer.text)
    return ended


def check_person(who: str, text: str) -> None:
    """Raise BenchError for a text that is not what `PERSON` asks for."""
    try:
        found = json.loads(text)
        fits = (
            set(found) == set(PERSON["required"])
            and isinstance(found["name"], str)
            and len(found["name"]) <= NAME_LENGTH
            and type(found["age"]) is int
            and 0 <= found["age"] <= 150
            and found["role"] in ("admin", "user", "guest")
            and len(found["tags"]) <= 4
            and all(isinstance(tag, str) and len(tag) <= TAG_LENGTH for tag in found["tags"])
            and isinstance(found["active"], bool)
        )
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits:
        raise BenchError(f"{who} was held to a schema and said: {text[:500]}")


def row(kind: str, rounds: list[Experience], free: list[Experience]) -> list[str]:
    speeds = [one.tokens_per_second for one in rounds]

    def middle(values: list[float]) -> str:
        return number(summarize(values).median * 1e3)

    share = f"{ratios(speeds, [one.tokens_per_second for one in free]).median:.0%}" if kind == "held" else ""
    return [
        kind,
        spread(summarize(speeds)),
        share,
        middle([one.ttft["p50"] for one in rounds]),
        middle([one.tpot["p50"] for one in rounds]),
        middle([one.tpot["p99"] for one in rounds]),
        middle([one.longest_gap["p99"] for one in rounds]),
        str(sum(len(one.errors) for one in rounds)),
    ]


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    servers.add_server_flags(parser)
    parser.add_argument("--concurrency", type=int, metavar="N", help=f"default: {CONCURRENCY}")
    parser.add_argument("--tokens", type=int, metavar="N", help=f"of each answer; default: {TOKENS}")
    parser.add_argument("--quick", action="store_true", help="few short answers, for a CPU")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    return parser.parse_args()


def main() -> None:
    options = parse()
    concurrency = options.concurrency or (QUICK_CONCURRENCY if options.quick else CONCURRENCY)
    tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    folder = servers.model_folder(options.model)
    references = answers.find(folder)
    server = servers.firstlight(folder, machine.device(options.device), options.serve_args.split())
    report = Report("structured outputs through HTTP", options)
    report.add_servers([server])
    vocab_size = checkpoint.config_of(folder)["vocab_size"]
    work = Work(concurrency, concurrency * ANSWERS_OF_A_CLIENT, tokens, vocab_size)
    found: Found = {kind: [] for kind in KINDS}
    with started([server], references) as (contender,):
        contender.ask_reference(references.explain, REFERENCE_TOKENS)
        progress("the first round, not counted")
        measure(contender, replace(work, count=concurrency), "warm-up")
        for turn in range(options.rounds):
            progress(f"round {turn + 1} of {options.rounds}")
            for kind, rounds in measure(contender, work, f"round {turn}").items():
                found[kind] += rounds
        progress("to the end, at temperature 2")
        ended = check_form(contender, work)
        contender.ask_reference(references.explain, REFERENCE_TOKENS)
    report.add_table(
        f"{server.name}: {concurrency} clients, {tokens} tokens an answer; times in ms",
        HEADERS,
        [row(kind, rounds, found["free"]) for kind, rounds in found.items()],
    )
    report.add_note(f"{ended} of {work.count} answers at temperature 2 came to an end, and all of them fit")
    report.data |= {kind: [one.as_json() for one in rounds] for kind, rounds in found.items()}
    report.data["ended"] = ended
    report.finish()


if __name__ == "__main__":
    run(main)
