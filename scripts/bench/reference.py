"""Makes a model's reference answers with transformers, for the other benchmarks to check against.

    python scripts/bench/reference.py --model FOLDER [--device cuda|auto|cpu] [--out FILE]

Greedy tokens in float32, computed anew over the whole text at every step, without any cache. A text that is
computed in the checkpoint's own number format, too, shows how far 16 bits are off: a token counts as certain
if it leads by more than three times that. The file is written beside the weights; for a folder that cannot be
written, name another one with --out.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

from harness.answers import TIE, Reference, References
from harness.checkpoint import fingerprint
from harness.report import progress, run
from harness.servers import model_folder

ANSWER_TOKENS = 32
COUNT_TOKENS = 128
# The first whose answer is certain for this long is taken, else the one that is for longest.
ENOUGH_TOKENS = 8
THINGS = (
    *("a hash table", "a lighthouse", "a glacier", "an election", "a violin", "a prime number"),
    *("a river", "a loan", "an alphabet", "a magnet", "a season", "a bridge"),
)
STARTS = range(1, 121, 10)


def make(folder: Path, device: str, dtype: str) -> References:
    """The references of the model in `folder`; device "auto" spreads it over all GPUs (with accelerate)."""
    import torch
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    placed = {"device_map": "auto"} if device == "auto" else {}
    formats = dict.fromkeys((getattr(torch, dtype), transformers.AutoConfig.from_pretrained(folder).dtype))
    models: list[Any] = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=number_format, **placed)
        for number_format in formats
    ]
    if not placed:
        models = [model.to(device) for model in models]
    questions = [_question(tokenizer, thing) for thing in THINGS]
    countings = [_counting(tokenizer, start) for start in STARTS]
    version = f"transformers {transformers.__version__}, {dtype}, {device}"
    tie = round(max(TIE, 3 * _noise(models, countings[0])), 3)
    return References(
        fingerprint(folder),
        version,
        explain=_most_certain("explain", models[0], tokenizer, questions, tie),
        count=_most_certain("count", models[0], tokenizer, countings, tie),
    )


def _noise(models: list[Any], ids: list[int]) -> float:
    """How far the leads of the first model's favourites are from that where the last one computes them, which
    does so with fewer bits: the root of the mean square over a text."""
    import torch

    with torch.no_grad():
        logits, others = (
            model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
            for model in (models[0], models[-1])
        )
    best = logits.topk(2)
    leads = (best.values[:, 0] - best.values[:, 1]) / logits.std(1)
    favourites = best.indices[:, :1].to(others.device)
    next_best = others.scatter(1, favourites, float("-inf")).amax(1)
    found = (others.gather(1, favourites)[:, 0] - next_best) / others.std(1)
    return float((found.cpu() - leads.cpu()).square().mean().sqrt())


def _question(tokenizer: Any, thing: str) -> list[int]:
    question = f"Explain in two sentences what {thing} is."
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": question}]
        question = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(question, add_special_tokens=False)
    return ids


def _counting(tokenizer: Any, start: int) -> list[int]:
    text = "Numbers, in order, separated by commas: " + ", ".join(map(str, range(start, start + 200)))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)[:COUNT_TOKENS]
    return ids


def _most_certain(name: str, model: Any, tokenizer: Any, prompts: list[list[int]], tie: float) -> Reference:
    """A random model hesitates here and there: not every prompt proves much."""
    best: Reference | None = None
    for prompt in prompts:
        answer = _answer(model, tokenizer, name, prompt, tie)
        if best is None or answer.certain() > best.certain():
            best = answer
        if best.certain() >= ENOUGH_TOKENS:
            break
    assert best is not None
    return best


def _answer(model: Any, tokenizer: Any, name: str, prompt: list[int], tie: float) -> Reference:
    """The greedy answer up to the first tie: what follows one proves nothing."""
    import torch

    ids, leads = list(prompt), [math.inf]
    while len(leads) <= ANSWER_TOKENS and leads[-1] >= tie:
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
        best = logits.topk(2)
        leads.append(round(float((best.values[0] - best.values[1]) / logits.std()), 3))
        ids.append(int(best.indices[0]))
    answer = ids[len(prompt) :]
    texts = [tokenizer.decode(answer[:n], skip_special_tokens=True) for n in range(len(answer) + 1)]
    pieces = [longer[len(shorter) :] for shorter, longer in itertools.pairwise(texts)]
    return Reference(name, prompt, answer, pieces, leads[1:], tie)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="MODEL", help="a folder, or as for `firstlight serve`")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or auto: over all GPUs (default: cpu)")
    parser.add_argument("--dtype", default="float32", help="what to compute in (default: float32)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: reference.json beside the weights")
    options = parser.parse_args()
    folder = model_folder(options.model)
    references = make(folder, options.device, options.dtype)
    path = options.out or folder / "reference.json"
    references.write(path)
    for reference in (references.explain, references.count):
        certain = reference.certain()
        progress(f"{reference.name}: {certain} certain tokens: {''.join(reference.pieces[:certain])!r}")
    print(path)


if __name__ == "__main__":
    run(main)
