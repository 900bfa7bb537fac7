"""Every kind of tokenizer's vocabulary, as grammars see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from runtime.engine.grammar.grammars import GrammarError, Grammars
from runtime.engine.grammar.vocabulary import Vocabulary, read_vocabulary
from runtime.protocol import Grammar
from runtime.text import grammar
from runtime.text.detokenizer import Detokenizer
from runtime.text.tokenizer import Tokenizer
from tests.conftest import write_tokenizer
from tests.runtime.text.vocabularies import CORPUS, VOCABULARIES, write

SIZE = 1024  # of the model's logits: more than any of the tokenizers has tokens
KINDS = ["tokenizer.json", *VOCABULARIES]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["München 東京", "a\tb", "The quick brown fox", "𝄞 ½"]},
        "size": {"type": "integer"},
        "text": {"type": "string", "maxLength": 12},
    },
    "required": ["name", "size", "text"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vocabulary")
    if request.param == "tokenizer.json":
        write_tokenizer(directory)
        return directory
    return write(VOCABULARIES[request.param](), directory)


def read(directory: Path) -> Vocabulary:
    found: list[Vocabulary] = []

    def parts() -> Iterator[None]:
        found.append((yield from read_vocabulary(directory, SIZE)))

    for _ in parts():
        pass
    return found[0]


@pytest.fixture(scope="module")
def vocabulary(directory: Path) -> LLTokenizer:
    return read(directory).tokens


def test_whatever_is_written_by_the_grammar_reads_so(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    grammars = Grammars(directory, SIZE)
    source = grammar.source(grammar.json_schema(SCHEMA))
    for seed in range(8):
        draw, matcher = Random(seed), grammars.matcher(Grammar(source, "x")).matcher
        ids: list[int] = []
        while not matcher.is_stopped():
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little", count=SIZE)).tolist()
            ids.append(draw.choice(allowed))
            assert matcher.consume_token(ids[-1])
        assert not tokenizer.special_ids.intersection(ids)
        reader = Detokenizer(
            tokenizer,
            skip_special_tokens=True,
            prompt_ids=tokenizer.encode("Hello?"),
            shown_ids=frozenset(),
        )
        found = json.loads(reader.push(ids) + reader.flush())
        assert set(found) == {"name", "size", "text"}
        assert found["name"] in SCHEMA["properties"]["name"]["enum"]  # type: ignore[index]
        assert len(found["text"]) <= 12


@given(text=st.text(max_size=30) | st.sampled_from(CORPUS))
@settings(max_examples=40, deadline=None)
def test_a_text_that_is_forced_is_spelled_exactly(vocabulary: LLTokenizer, text: str) -> None:
    assert vocabulary.decode_bytes(vocabulary.tokenize_str(text)) == text.encode()


def test_it_is_spelled_as_the_model_would(tmp_path: Path) -> None:
    """Where the tokenizer puts a space in front of everything, without that space."""
    directory = write(VOCABULARIES["llama2"](), tmp_path)
    tokenizer, vocabulary = Tokenizer.load(directory), read(directory).tokens
    (ids,) = [tokenizer.encode("\nThe quick brown fox", add_special_tokens=False)]
    spelled = [tokenizer.token_bytes(index) for index in ids]
    assert spelled[:2] == [b" ", b"\n"]
    assert vocabulary.tokenize_str("The quick brown fox") == ids[2:]


@pytest.mark.parametrize("parts", [0, 1, 2, 100])
def test_what_the_first_grammar_takes_is_read_ahead_where_there_is_time(tmp_path: Path, parts: int) -> None:
    write_tokenizer(tmp_path)
    grammars = Grammars(tmp_path, SIZE)
    for _ in range(parts):
        grammars.read_ahead()
    if not grammars.read_ahead():
        (tmp_path / "tokenizer.json").unlink()  # nobody needs it any more
    matcher = grammars.matcher(Grammar(grammar.source(grammar.choice(["a"])), "x")).matcher
    assert matcher.compute_ff_bytes() == b"a"
    assert not grammars.read_ahead()


def test_a_model_without_a_tokenizer_has_no_grammars(tmp_path: Path) -> None:
    grammars = Grammars(tmp_path, SIZE)
    while grammars.read_ahead():
        pass
    with pytest.raises(GrammarError, match="no tokenizer"):
        grammars.matcher(Grammar(grammar.source(grammar.choice(["a"])), "x"))
