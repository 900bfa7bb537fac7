"""Sampling from real vocabularies: against the plain twin, the distribution, and itself in other company."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from runtime.engine.sampler import token_logprobs as engines_logprobs
from runtime.engine.sampler import uniform
from runtime.kernels.gpu.sampling.logprobs import token_logprobs
from runtime.kernels.gpu.sampling.sampler import kept_torch
from runtime.protocol import SamplingParams
from tests.runtime.kernels.sampling_requests import HIGHEST, Requests, asking, seed_for

pytestmark = pytest.mark.gpu
LENGTH = 1000
CHUNK = 4096
ASKED = [
    asking(),
    asking(temperature=1.0),
    asking(temperature=0.7, top_p=0.9),
    asking(temperature=1.0, top_k=50),
    asking(temperature=1.3, top_k=200, top_p=0.95),
    asking(temperature=1.0, min_p=0.02),
    asking(temperature=0.9, top_p=0.99, min_p=0.001),
    asking(temperature=2.0, top_k=100000),
]


def peaked(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """Logits with a few likely tokens and a long tail, as a model's are."""
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator, device="cuda") * 2.5
    likely = torch.randint(vocab_size, (rows, 40), generator=generator, device="cuda")
    return logits.scatter_add_(1, likely, torch.rand(rows, 40, generator=generator, device="cuda") * 12)


def assert_drawn(logits: torch.Tensor, sampling: SamplingParams, seed: int, token: int) -> None:
    """The token is where the request's uniform number falls in the twin's cumulative distribution, give or
    take a millionth: probabilities are computed to 22 bits, and a vocabulary of them is added up."""
    if sampling.temperature == 0:
        assert token == int((logits == logits.max()).nonzero()[0])
        return
    share = kept_torch(logits, sampling).double()
    share /= share.sum()
    end = float(share[: token + 1].sum())
    assert end - float(share[token]) - 1e-6 <= uniform(seed, LENGTH) <= end + 1e-6
    assert share[token] > 0


@pytest.mark.parametrize("vocab_size", [32000, 128256, 151643, 256000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_where_the_twin_would_draw_them(vocab_size: int, dtype: torch.dtype) -> None:
    asked = ASKED * 4
    logits = peaked(len(asked), vocab_size).to(dtype)
    seeds = [17 * index for index in range(len(asked))]

    tokens = Requests(asked, seeds, vocab_size, CHUNK).tokens(logits, LENGTH)

    for row in zip(logits, asked, seeds, tokens, strict=True):
        assert_drawn(*row)


def test_padded_rows_of_logits() -> None:
    logits = peaked(len(ASKED), 128256)
    padded = torch.full((len(ASKED), 128512), 99.0, device="cuda")
    padded[:, :128256] = logits

    first, second = (
        Requests(ASKED, range(len(ASKED)), 128256, CHUNK).tokens(rows, LENGTH)
        for rows in (logits, padded[:, :128256])
    )

    assert first == second


@pytest.mark.parametrize(
    ("cut", "warper"),
    [({"top_k": k}, TopKLogitsWarper(k)) for k in (1, 2, 50, 1000, 128000)]
    + [({"top_p": p}, TopPLogitsWarper(p)) for p in (0.1, 0.5, 0.9, 0.99)],
)
def test_as_many_tokens_are_kept_as_transformers_keeps(cut, warper) -> None:
    """The logits fall with the token's id, so the highest number draws the last token that is kept."""
    logits = (torch.randn(4, 128256, generator=torch.Generator().manual_seed(1)) * 2).cuda()
    logits = logits.sort(descending=True).values
    requests = Requests([asking(temperature=1.0, **cut)] * 4, [seed_for(HIGHEST, LENGTH)] * 4, 128256, CHUNK)

    last = torch.tensor(requests.tokens(logits, LENGTH))

    # Where thousands of tokens weigh next to nothing, the sums' rounding moves the cut by a few of them.
    kept = (warper(None, logits.double()) > -torch.inf).sum(-1).cpu()
    slack = 0 if "top_k" in cut else 2 + kept // 2000
    assert ((last + 1 - kept).abs() <= slack).all(), (last + 1, kept)


def test_penalties_bias_and_minimum() -> None:
    asked = [
        asking(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
        asking(temperature=1.0, top_p=0.9, logit_bias={token * 300: -50.0 for token in range(400)}),
        asking(temperature=1.0, min_tokens=2000, stop_token_ids=tuple(range(0, 128000, 1000))),
        asking(temperature=1.0),
    ]
    generated = torch.randint(128256, (500,), generator=torch.Generator().manual_seed(3)).tolist()
    logits = peaked(4, 128256).bfloat16()
    requests = Requests(asked, range(4), 128256, CHUNK, generated)
    expected = logits.float()
    counts = torch.bincount(torch.tensor(generated), minlength=128256).cuda()
    seen = counts.bool()
    seen[[1, 2, 3]] = True
    x = expected[0]
    expected[0] = (
        torch.where(seen, torch.where(x > 0, x / 1.2, x * 1.2), x) - counts * 0.3 - counts.bool() * 0.5
    )
    expected[1, : 400 * 300 : 300] -= 50.0
    expected[2, 0:128000:1000] = -torch.inf

    adjusted = requests.sampler.adjust(requests.batch(logits, LENGTH))
    tokens = requests.tokens(logits, LENGTH)

    torch.testing.assert_close(adjusted[:3], expected[:3])
    for row in zip(expected, asked, range(4), tokens, strict=True):
        assert_drawn(*row)


def test_a_rows_token_depends_on_nothing_else() -> None:
    asked = ASKED * 32
    logits = peaked(256, 128256)
    whole = Requests(asked, range(256), 128256, CHUNK).tokens(logits, LENGTH)

    for row in range(0, 256, 13):
        alone = Requests([asked[row]], [row], 128256, CHUNK).tokens(logits[row : row + 1], LENGTH)
        assert alone == [whole[row]], row


@pytest.mark.parametrize("sampling", [asking(temperature=0.8), asking(temperature=1.2, top_k=20, top_p=0.9)])
def test_draws_follow_the_distribution(sampling) -> None:
    """Pearson's chi-square stays below its mean plus five standard deviations; the seeds are fixed."""
    steps, rows, vocab_size = 400, 256, 5000
    logits = peaked(1, vocab_size, seed=5)
    requests = Requests([sampling] * rows, range(rows), vocab_size, CHUNK)
    drawn = torch.tensor([requests.tokens(logits.expand(rows, -1), length) for length in range(steps)])

    mass = kept_torch(logits[0], sampling).double().cpu()
    expected = mass / mass.sum() * steps * rows
    counts = torch.bincount(drawn.flatten(), minlength=vocab_size).double()
    assert not counts[mass == 0].any()
    frequent = expected >= 20
    rest = torch.stack((counts[~frequent].sum(), expected[~frequent].sum()))
    found = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
    if rest[1] > 20:
        found += (rest[0] - rest[1]) ** 2 / rest[1]
    freedom = int(frequent.sum())
    assert found < freedom + 5 * (2 * freedom) ** 0.5


def test_a_graph_replays_the_step() -> None:
    """What is captured once goes on drawing, as the requests' state moves on in the graph itself."""
    requests = Requests(ASKED, range(len(ASKED)), 128256, CHUNK)
    logits = peaked(len(ASKED), 128256)
    tokens = torch.zeros(len(ASKED), dtype=torch.int32, device="cuda")
    batch = requests.batch(logits, LENGTH)

    def step() -> None:
        requests.sampler.sample(batch, requests.stages, tokens, requests.last_token, requests.seq_len)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for length in range(LENGTH, LENGTH + 5):
        batch.lengths.fill_(length)
        graph.replay()
        assert tokens.tolist() == requests.tokens(logits, length)
        assert requests.seq_len[requests.slots].tolist() == [length] * len(ASKED)
        assert requests.last_token[requests.slots].tolist() == tokens.tolist()


def test_logprobs() -> None:
    logits = peaked(16, 128256)
    ids = torch.randint(128256, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    ids[:8] = logits[:8].argmax(-1).tolist()

    found = token_logprobs(logits, torch.tensor(ids, dtype=torch.int32, device="cuda"), 5)

    expected = engines_logprobs(logits.double().cpu(), ids, 5)
    for row, entry in enumerate(expected):
        assert found.ranks[row] == entry.rank
        assert float(found.chosen[row]) == pytest.approx(entry.logprob, abs=1e-4)
        assert found.top_ids[row].tolist() == [token for token, _ in entry.top]
        assert found.top[row].tolist() == pytest.approx([value for _, value in entry.top], abs=1e-4)
