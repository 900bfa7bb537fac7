"""The tokenizer inside a GGUF file, written as the files of a Hub repository.

GGUF names a pre-tokenizer in one word (`tokenizer.ggml.pre`); here that word becomes the rules that
the model's own tokenizer.json spells out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.weights.gguf import GGUFError

# tokenizer.ggml.token_type: which vocabulary entries are matched in the text before anything else.
_CONTROL, _USER_DEFINED = 3, 4

Rules = dict[str, Any]

_BYTE_LEVEL: Rules = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES_ONLY: Rules = _BYTE_LEVEL | {"use_regex": False}
_DIGITS: Rules = {"type": "Digits", "individual_digits": True}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _regex(digits: str) -> Rules:
    """Split by the pattern that Llama 3 and Qwen 2 share but for how many digits make one piece."""
    pattern = "|".join((_CONTRACTIONS, _WORDS, digits, _REST))
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: Rules) -> Rules:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# What each name stands for: tokenizer.json's normalizer and pre-tokenizer, whether a piece that is in
# the vocabulary as a whole skips the merges, and whether prompts begin with the bos token by default.
_GPT2 = (None, _BYTE_LEVEL, False, False)
_PRE_TOKENIZERS: dict[str, tuple[Rules | None, Rules, bool, bool]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": (None, _sequence(_DIGITS, _BYTE_LEVEL), False, False),
    "llama-bpe": (None, _sequence(_regex(r"\p{N}{1,3}"), _BYTES_ONLY), True, True),
    "qwen2": ({"type": "NFC"}, _sequence(_regex(r"\p{N}"), _BYTES_ONLY), False, False),
}


def tokenizer_files(metadata: dict[str, Any], path: Path, vocab_size: int) -> dict[str, Any]:
    """The contents of tokenizer.json and tokenizer_config.json, by file name.

    `vocab_size` is the number of rows of the embedding, which each token must have one of. Raises
    GGUFError if the file holds no tokenizer, or one of a kind that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise GGUFError(
            f"{path}: tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) can be converted. "
            "Use the model's original repository instead of the GGUF file"
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in _PRE_TOKENIZERS:
        raise GGUFError(
            f"{path}: tokenizer.ggml.pre is {name!r}; known are {', '.join(_PRE_TOKENIZERS)}. "
            "Use the model's original repository instead of the GGUF file"
        )
    normalizer, pre_tokenizer, ignore_merges, adds_bos = _PRE_TOKENIZERS[name]
    tokens, types = _vocabulary(metadata, path)
    if len(tokens) > vocab_size:
        raise GGUFError(f"{path}: {len(tokens)} tokens, but only {vocab_size} rows in the embedding")
    special = _special_tokens(metadata, tokens, path)
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)) and "bos_token" in special
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _begin_with(special["bos_token"], tokens) if adds_bos else _BYTES_ONLY,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        **special,
        **_chat_template(metadata, path),
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _vocabulary(metadata: dict[str, Any], path: Path) -> tuple[list[str], list[int]]:
    """Tokens and their types by id, checked to be lists of equal length without duplicates."""
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        value = metadata.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise GGUFError(f"{path}: {key} is missing or is not a list of strings")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise GGUFError(f"{path}: tokenizer.ggml.token_type and tokenizer.ggml.tokens differ in length")
    if len(set(tokens)) != len(tokens):
        raise GGUFError(f"{path}: tokenizer.ggml.tokens holds a token twice")
    return tokens, types


def _special_tokens(metadata: dict[str, Any], tokens: list[str], path: Path) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token as text, as far as the file names them."""
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise GGUFError(
                f"{path}: tokenizer.ggml.{key}_token_id is {index}, outside the {len(tokens)} tokens"
            )
        found[f"{name}_token"] = tokens[index]
    return found


def _added_tokens(tokens: list[str], types: list[int]) -> list[Rules]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": token, **flags, "special": kind == _CONTROL}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _begin_with(bos: str, tokens: list[str]) -> Rules:
    """A post-processor that puts the bos token before every text."""
    token: Rules = {"SpecialToken": {"id": bos, "type_id": 0}}
    first: Rules = {"Sequence": {"id": "A", "type_id": 0}}
    second: Rules = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
        "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
    }


def _chat_template(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """The chat template; a list of named ones where the file holds several; nothing where it has none."""
    prefix = "tokenizer.chat_template"
    found = {key: text for key, text in metadata.items() if key == prefix or key.startswith(prefix + ".")}
    for key, text in found.items():
        if not isinstance(text, str):
            raise GGUFError(f"{path}: {key} is not a text")
    default = found.pop(prefix, None)
    if not found:
        return {} if default is None else {"chat_template": default}
    templates = ({} if default is None else {"default": default}) | {
        key.removeprefix(prefix + "."): text for key, text in found.items()
    }
    return {"chat_template": [{"name": name, "template": text} for name, text in templates.items()]}
