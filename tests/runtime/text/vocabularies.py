"""Model folders whose vocabularies are in tiktoken's and sentencepiece's formats, as each family has them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

# What the vocabularies are trained on: enough scripts that all of them have pieces of some length.
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's 1234 times they'll say they've done so.\n",
    "def hash(key):\n    return key % 97\n\n\n  42 is the answer; Don't WE'RE know?\t\ttabs\r\n",
    "Grüße aus München – naïve café, 東京は日本の首都です。 你好，世界！ Привет мир 🎉👩‍👩‍👧‍👦 ½ ٣",
    "user\nassistant\nsystem\nWhat is <b>bold</b> | [1, 2] in HTML? end im start INST aaaaaaaa        ====",
]
# The rules as the families' code has them.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def train_ranks(pattern: str) -> bytes:
    """A vocabulary in tiktoken's format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    lines = []
    for token, rank in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        raw = bytes(byte_of[character] for character in token)
        lines.append(base64.b64encode(raw) + b" " + str(rank).encode())
    return b"\n".join(lines) + b"\n"


def train_pieces(**options: Any) -> bytes:
    """A vocabulary in sentencepiece's format: Llama 2's, but for what the options say."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 620,
        "byte_fallback": True,
        # Not all letters, so that some need bytes.
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(CORPUS).splitlines() * 20),
        model_writer=model,
        minloglevel=2,
        **settings | options,
    )
    return model.getvalue()


def qwen() -> dict[str, Any]:
    ranks = train_ranks(QWEN_PATTERN)
    end_of_text = ranks.count(b"\n")
    return {
        "qwen.tiktoken": ranks,
        "config.json": {"model_type": "qwen", "vocab_size": 1024},
        "tokenizer_config.json": {
            "tokenizer_class": "QWenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        },
        "generation_config.json": {
            "chat_format": "chatml",
            "eos_token_id": end_of_text,
            "pad_token_id": end_of_text,
            "max_window_size": 6144,
            "max_new_tokens": 512,
            "do_sample": True,
            "top_k": 0,
            "top_p": 0.8,
            "repetition_penalty": 1.1,
        },
    }


def llama3() -> dict[str, Any]:
    return {"tokenizer.model": train_ranks(LLAMA3_PATTERN), "config.json": {"model_type": "llama"}}


def llama2() -> dict[str, Any]:
    return {
        "tokenizer.model": train_pieces(),
        "config.json": {
            "model_type": "llama",
            "_name_or_path": "meta-llama/Llama-2-7b-chat-hf",
            "eos_token_id": 2,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": {"__type": "AddedToken", "content": "<s>"},
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "unk_token": {"__type": "AddedToken", "content": "<unk>"},
            "add_bos_token": True,
            "add_eos_token": False,
        },
    }


def mistral() -> dict[str, Any]:
    return {
        "tokenizer.model": train_pieces(control_symbols=["[INST]", "[/INST]"]),
        "config.json": {"model_type": "mistral", "eos_token_id": 2},
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "legacy": False,
        },
    }


def _baichuan(user: str, assistant: str, vocab_size: int) -> dict[str, Any]:
    return {
        "tokenizer.model": train_pieces(user_defined_symbols=[user, assistant]),
        "config.json": {"model_type": "baichuan", "vocab_size": vocab_size, "eos_token_id": 2},
        "tokenizer_config.json": {
            "tokenizer_class": "BaichuanTokenizer",
            "add_bos_token": False,
            "bos_token": {"__type": "AddedToken", "content": "<s>"},
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
        },
        "generation_config.json": {
            "user_token_id": 3,
            "assistant_token_id": 4,
            "eos_token_id": 2,
            "temperature": 0.3,
            "top_k": 5,
            "top_p": 0.85,
        },
    }


def baichuan() -> dict[str, Any]:
    return _baichuan("<reserved_102>", "<reserved_103>", 64000)


def baichuan2() -> dict[str, Any]:
    return _baichuan("<reserved_106>", "<reserved_107>", 125696)


def internlm2() -> dict[str, Any]:
    # The vocabulary's own pieces at the chat tokens' ids are placeholders, which a text may contain.
    names = {"3": "<|im_end|>", "4": "<|im_start|>"}
    return {
        "tokenizer.model": train_pieces(user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"]),
        "config.json": {"model_type": "internlm2", "eos_token_id": 2},
        "generation_config.json": {"eos_token_id": [2, 3]},
        "tokenizer_config.json": {
            "tokenizer_class": "InternLM2Tokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "added_tokens_decoder": {
                index: {"content": name, "special": True, "normalized": False}
                for index, name in names.items()
            },
        },
    }


def chatglm3() -> dict[str, Any]:
    return {
        "tokenizer.model": train_pieces(normalization_rule_name="nmt_nfkc"),
        "config.json": {"model_type": "chatglm", "eos_token_id": 2},
        "tokenizer_config.json": {"tokenizer_class": "ChatGLMTokenizer", "padding_side": "left"},
    }


def gemma2() -> dict[str, Any]:
    return {
        "tokenizer.model": train_pieces(
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            bos_piece="<bos>",
            eos_piece="<eos>",
            add_dummy_prefix=False,
            user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n\n", "<b>", "</b>"],
        ),
        "config.json": {"model_type": "gemma2", "eos_token_id": 1},
        "tokenizer_config.json": {
            "tokenizer_class": "GemmaTokenizer",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "add_bos_token": True,
        },
    }


def unigram() -> dict[str, Any]:
    return {
        "tokenizer.model": train_pieces(model_type="unigram", normalization_rule_name="nfkc", vocab_size=370),
        "config.json": {"model_type": "llama"},
    }


VOCABULARIES: dict[str, Callable[[], dict[str, Any]]] = {
    make.__name__: make
    for make in (
        *(qwen, llama3, llama2, mistral, baichuan, baichuan2),
        *(internlm2, chatglm3, gemma2, unigram),
    )
}


def write(files: dict[str, Any], directory: Path) -> Path:
    """Write a model's files, JSON values as such, and return their folder."""
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / name).write_bytes(raw)
    return directory
