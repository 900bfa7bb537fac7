"""Model folders with tokenizers of each kind, trained on the spot so that no test needs a download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.runtime.text.vocabularies import CORPUS, LLAMA3_PATTERN, VOCABULARIES, write


def train(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def chatml() -> tuple[Tokenizer, dict[str, Any]]:
    """As SmolLM2: byte-level, single digits, special tokens first in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet())
    # A token that is matched as a whole, but belongs to the text.
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return tokenizer, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def llama3() -> tuple[Tokenizer, dict[str, Any]]:
    """As Llama 3: byte-level with its own split, whole words first, special tokens last, bos in front."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, [], pre_tokenizers.ByteLevel.alphabet())
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer, {
        "bos_token": {"__type": "AddedToken", "content": bos, "special": True},
        "eos_token": "<|eot_id|>",
    }


def pieces() -> tuple[Tokenizer, dict[str, Any]]:
    """As Mistral: sentencepiece's spaces, a space in front of the text, bytes for what is unknown."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        # Too few letters for Chinese and emoji, so that those need bytes.
        limit_alphabet=80,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(data)), {"bos_token": "<s>", "eos_token": "</s>"}


KINDS: dict[str, Callable[[], tuple[Tokenizer, dict[str, Any]]]] = {
    "chatml": chatml,
    "llama3": llama3,
    "pieces": pieces,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer kind -> model folder."""
    found = {}
    for name, make in KINDS.items():
        tokenizer, config = make()
        found[name] = tmp_path_factory.mktemp(name)
        tokenizer.save(str(found[name] / "tokenizer.json"))
        content = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        (found[name] / "tokenizer_config.json").write_text(json.dumps(content))
    return found


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> the folder of a model whose vocabulary is in that family's own format."""
    return {name: write(make(), tmp_path_factory.mktemp(name)) for name, make in VOCABULARIES.items()}


@pytest.fixture(params=[*KINDS, "smollm2"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    """Each of them, and the real default model's."""
    if request.param == "smollm2":
        real: Path = request.getfixturevalue("default_model")
        return real
    return folders[request.param]
