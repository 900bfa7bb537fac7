"""GGUF files converted to Hub folders, against the gguf package's and transformers' own reading."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from runtime.weights.convert import convert_gguf
from runtime.weights.gguf import GGUFError, GGUFFile
from tests.runtime.gguf_files import CORPUS, Type, trained_tokenizer, write_gguf

DIMENSIONS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 448,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.tensor([[1, 7, 300, 42, 447, 5, 5, 80]])


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            # Norms and biases begin as ones and zeros, which would hide a mix-up of them.
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.2)
    return model


def numpy_state(model: Any) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def converted(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


class TestWeights:
    @pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
    def test_each_type_keeps_its_values(self, tmp_path: Path, kind: str) -> None:
        model = random_model(LlamaConfig(**DIMENSIONS, tie_word_embeddings=False))
        stored = write_gguf(tmp_path / "m.gguf", model.config, numpy_state(model), Type[kind])
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
        tensors = converted(tmp_path / "out")
        assert tensors.keys() == stored.keys()
        for name, tensor in tensors.items():
            exact = torch.from_numpy(stored[name])
            if kind.startswith("Q") and exact.ndim == 2:
                assert tensor.dtype == torch.float16
                torch.testing.assert_close(tensor, exact.half(), rtol=0, atol=0)
            else:
                torch.testing.assert_close(tensor.float(), exact, rtol=0, atol=0)

    @pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
    def test_k_quants_match_the_gguf_package(self, tmp_path: Path, kind: str) -> None:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
        rng = np.random.default_rng(0)
        raw = rng.integers(0, 256, (6, 2, block_bytes), dtype=np.uint8)
        # Random scales, but finite ones.
        for at in (208,) if kind == "Q6_K" else (0, 2):
            raw[..., at : at + 2] = rng.normal(size=(6, 2, 1)).astype("<f2").view(np.uint8)
        raw = raw.reshape(6, -1)
        writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
        writer.add_tensor("t", raw, raw_dtype=Type[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with GGUFFile(tmp_path / "k.gguf") as file:
            assert file.tensors["t"].shape == (6, 2 * block_size)
            values = np.concatenate([values for _, values in file.pieces(file.tensors["t"])])
        np.testing.assert_array_equal(values, gguf.quants.dequantize(raw, Type[kind]).reshape(-1))

    @pytest.mark.parametrize("tied", [True, False])
    def test_llama_logits_equal_transformers_own_reading(self, tmp_path: Path, tied: bool) -> None:
        model = random_model(LlamaConfig(**DIMENSIONS, tie_word_embeddings=tied))
        write_gguf(tmp_path / "m.gguf", model.config, numpy_state(model), Type.F16)
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
        assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in converted(tmp_path / "out")) is not tied
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(logits(tmp_path / "out"), reference.eval()(IDS).logits)

    def test_qwen2_logits_equal_the_original(self, tmp_path: Path) -> None:
        model = random_model(Qwen2Config(**DIMENSIONS, tie_word_embeddings=True))
        write_gguf(tmp_path / "m.gguf", model.config, numpy_state(model), pre="qwen2")
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
        with torch.no_grad():
            torch.testing.assert_close(logits(tmp_path / "out"), model(IDS).logits)

    def test_llama3_rope_scaling_is_recognised(self, tmp_path: Path) -> None:
        scaling = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        dimensions = {
            **DIMENSIONS,
            "rope_parameters": scaling,
            "head_dim": 128,
            "max_position_embeddings": 9000,
        }
        del dimensions["rope_theta"]
        model = random_model(LlamaConfig(**dimensions))
        plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
        state = numpy_state(model) | {"rope_freqs.weight": (plain / model.model.rotary_emb.inv_freq).numpy()}
        metadata = {"llama.attention.key_length": 128, "llama.attention.value_length": 128}
        write_gguf(tmp_path / "m.gguf", model.config, state, metadata=metadata)
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
        with torch.no_grad():
            torch.testing.assert_close(logits(tmp_path / "out"), model(IDS).logits)

    def test_tensors_can_be_used_in_place(self, tmp_path: Path) -> None:
        model = random_model(LlamaConfig(**DIMENSIONS))
        write_gguf(tmp_path / "m.gguf", model.config, numpy_state(model), Type.Q8_0)
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
        data = (tmp_path / "out/model.safetensors").read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
        assert {name: start % 64 for name, start in starts.items() if start % 64} == {}
        layer = "model.layers.0.self_attn."
        order = sorted(starts, key=starts.__getitem__)
        first = order.index(layer + "q_proj.weight")
        assert order[first : first + 3] == [layer + f"{part}_proj.weight" for part in "qkv"]

    def test_progress_counts_up_to_all_bytes(self, tmp_path: Path) -> None:
        model = random_model(LlamaConfig(**DIMENSIONS))
        write_gguf(tmp_path / "m.gguf", model.config, numpy_state(model))
        seen: list[tuple[int, int]] = []
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out", lambda done, total: seen.append((done, total)))
        total = sum(value.nbytes for value in numpy_state(model).values())
        assert seen == sorted(seen)
        assert seen[-1] == (total, total)


# The pre-tokenizers as the models' own tokenizer.json files have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


ORIGINALS = {
    "smollm": (None, None),
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "llama-bpe": (split_by(LLAMA3), None),
    "qwen2": (split_by(QWEN2), normalizers.NFC()),
}


class TestTokenizer:
    @pytest.fixture(params=ORIGINALS)
    def pair(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Path]:
        """An original tokenizer and the folder converted from a GGUF file that holds it."""
        pre_tokenizer, normalizer = ORIGINALS[request.param]
        original = trained_tokenizer(pre_tokenizer, normalizer)
        model = random_model(LlamaConfig(**DIMENSIONS))
        write_gguf(
            tmp_path / "m.gguf", model.config, numpy_state(model), tokenizer=original, pre=request.param
        )
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
        return original, tmp_path / "out"

    def test_ids_equal_the_original(self, pair: tuple[Tokenizer, Path]) -> None:
        original, folder = pair
        new = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in [
            *CORPUS,
            "<|im_start|>user\nHi<|im_end|>",
            "e\u0301 A\u030a",
            "123456 007  42",
            "",
            "\x00",
        ]:
            ids = original.encode(text, add_special_tokens=False).ids
            assert new.encode(text, add_special_tokens=False).ids == ids
            assert new.decode(ids, skip_special_tokens=False) == original.decode(
                ids, skip_special_tokens=False
            )

    def test_transformers_reads_the_folder(self, pair: tuple[Tokenizer, Path]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(pair[1])
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
        ids = tokenizer("Hi", add_special_tokens=False).input_ids
        assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == "Hi"

    def test_digits_are_single_for_smollm(self, tmp_path: Path) -> None:
        model = random_model(LlamaConfig(**DIMENSIONS))
        write_gguf(tmp_path / "m.gguf", model.config, numpy_state(model))
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
        tokens = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("  42").tokens
        assert tokens[-2:] == ["4", "2"]
        assert "".join(tokens[:-2]) == "ĠĠ"

    def test_llama_bpe_begins_with_bos(self, tmp_path: Path) -> None:
        model = random_model(LlamaConfig(**DIMENSIONS))
        write_gguf(tmp_path / "m.gguf", model.config, numpy_state(model), pre="llama-bpe")
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
        assert Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("Hi").ids[0] == 1


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound file with a small vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    model = random_model(LlamaConfig(**{**DIMENSIONS, "vocab_size": 288, "num_hidden_layers": 1}))
    write_gguf(path, model.config, numpy_state(model), Type.Q8_0, trained_tokenizer(vocab_size=288))
    return path.read_bytes()


def refusal(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(GGUFError) as caught:
        convert_gguf(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    return str(caught.value)


def row_of(data: bytes, name: str) -> int:
    """Where the part of a tensor's row begins that follows its name."""
    return data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


class TestBadFiles:
    def test_other_kinds_of_file(self, tmp_path: Path, good: bytes) -> None:
        assert "is empty" in refusal(tmp_path, b"")
        assert "not a GGUF file" in refusal(tmp_path, b"PK\x03\x04" + good[4:])
        assert "version 1 " in refusal(tmp_path, good[:4] + struct.pack("<I", 1) + good[8:])
        assert "big-endian" in refusal(tmp_path, good[:4] + struct.pack(">I", 3) + good[8:])

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(GGUFError, match="cannot be read"):
            convert_gguf(tmp_path / "nowhere.gguf", tmp_path / "out")

    def test_truncated_anywhere(self, tmp_path: Path, good: bytes) -> None:
        for end in [*range(1, len(good), 997), len(good) - 64]:
            refusal(tmp_path, good[:end])

    def test_counts_are_capped(self, tmp_path: Path, good: bytes) -> None:
        huge = struct.pack("<Q", 1 << 60)
        assert "tensors" in refusal(tmp_path, good[:8] + huge + good[16:])
        assert "metadata entries" in refusal(tmp_path, good[:16] + huge + good[24:])
        tokens = good.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
        assert "tokenizer.ggml.tokens" in refusal(tmp_path, good[:tokens] + huge + good[tokens + 8 :])

    def test_unknown_tensor_type(self, tmp_path: Path, good: bytes) -> None:
        at = row_of(good, "blk.0.attn_v.weight") + 4 + 2 * 8
        message = refusal(tmp_path, good[:at] + struct.pack("<I", 10) + good[at + 4 :])
        assert "'blk.0.attn_v.weight'" in message
        assert "type 10" in message

    def test_overlapping_tensors(self, tmp_path: Path, good: bytes) -> None:
        first = row_of(good, "blk.0.attn_q.weight") + 4 + 2 * 8 + 4
        second = row_of(good, "blk.0.attn_k.weight") + 4 + 2 * 8 + 4
        message = refusal(tmp_path, good[:second] + good[first : first + 8] + good[second + 8 :])
        assert "overlaps" in message

    def test_tensor_beyond_the_end(self, tmp_path: Path, good: bytes) -> None:
        at = row_of(good, "output_norm.weight") + 4 + 8 + 4
        message = refusal(tmp_path, good[:at] + struct.pack("<Q", 1 << 40) + good[at + 8 :])
        assert "'output_norm.weight'" in message

    def test_shape_that_contradicts_the_metadata(self, tmp_path: Path, good: bytes) -> None:
        at = row_of(good, "blk.0.attn_v.weight") + 4
        swapped = struct.pack("<QQ", 32, 64)
        message = refusal(tmp_path, good[:at] + swapped + good[at + 16 :])
        assert "[64, 32]" in message
        assert "[32, 64]" in message

    def test_missing_and_unknown_tensors(self, tmp_path: Path, good: bytes) -> None:
        renamed = good.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_op.weight")
        assert "'blk.0.ffn_up.weight' is missing" in refusal(tmp_path, renamed)
        model = random_model(LlamaConfig(**DIMENSIONS))
        state = numpy_state(model) | {"blk.0.attn_sinks": np.ones(4, dtype=np.float32)}
        write_gguf(tmp_path / "m.gguf", model.config, state)
        assert "'blk.0.attn_sinks' has no place" in refusal(tmp_path, (tmp_path / "m.gguf").read_bytes())

    def test_values_that_are_not_numbers(self, tmp_path: Path, good: bytes) -> None:
        # A block of Q8_0 is 34 bytes, its scale first, and the file ends with a whole one.
        bad = good[:-34] + np.float16(np.nan).tobytes() + good[-32:]
        assert "not numbers" in refusal(tmp_path, bad)

    def test_other_models(self, tmp_path: Path, good: bytes) -> None:
        assert "'lamma'" in refusal(
            tmp_path, good.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lamma")
        )
        assert "'spm2'" in refusal(
            tmp_path, good.replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0spm2")
        )
        assert "'smoll0'" in refusal(tmp_path, good.replace(b"smollm", b"smoll0"))

    @settings(max_examples=400, deadline=None)
    @given(data=st.data())
    def test_damage_is_refused_or_harmless(
        self, tmp_path_factory: pytest.TempPathFactory, good: bytes, data: st.DataObject
    ) -> None:
        """A wrong byte anywhere in the tables: either it does not matter, or it is named as damage."""
        folder = tmp_path_factory.mktemp("damaged")
        tables = good.index(b"output_norm.weight") + 64
        at = data.draw(st.integers(0, tables))
        byte = data.draw(st.integers(0, 255))
        (folder / "m.gguf").write_bytes(good[:at] + bytes([byte]) + good[at + 1 :])
        try:
            convert_gguf(folder / "m.gguf", folder / "out")
        except GGUFError as error:
            assert str(folder / "m.gguf") in str(error)  # noqa: PT017
