"""What the benchmarks read from a checkpoint, and the GGUF file that they make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from harness import BenchError, answers, checkpoint, gguf_file
from harness.answers import Reference, References
from safetensors.numpy import load_file, save_file

from tests.conftest import CONFIG


def test_sizes_of_a_checkpoint(tiny_model: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    matrices = [tensor for name, tensor in tensors.items() if tensor.ndim == 2 and "embed" not in name]
    assert checkpoint.layer_parameters(tiny_model) == sum(matrix.size for matrix in matrices)
    assert checkpoint.weight_bytes(tiny_model) == (tiny_model / "model.safetensors").stat().st_size


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    for look in (checkpoint.config_of, checkpoint.weight_bytes):
        with pytest.raises(BenchError, match=tmp_path.name):
            look(tmp_path)


def references(folder: Path, lead: float) -> References:
    both = [Reference(name, [1], [5, 6], ["a", "b"], [lead, lead]) for name in ("explain", "count")]
    return References(checkpoint.fingerprint(folder), "by hand", *both)


class TestReferences:
    @pytest.fixture
    def folder(self, tiny_model: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_model, tmp_path / "model"))

    def test_found_beside_the_weights(self, folder: Path) -> None:
        references(folder, 1.0).write(folder / "reference.json")
        assert answers.find(folder) == references(folder, 1.0)

    def test_of_other_weights_they_are_no_references(self, folder: Path) -> None:
        references(folder, 1.0).write(folder / "reference.json")
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"][0, 0] += 1
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(BenchError, match=r"reference\.py --model"):
            answers.find(folder)

    def test_ties_prove_nothing(self, folder: Path) -> None:
        references(folder, 0.01).write(folder / "reference.json")
        with pytest.raises(BenchError, match="tie"):
            answers.find(folder)

    def test_bundled_ones_can_be_read(self) -> None:
        bundled = [answers.read(path) for path in answers.BUNDLED.glob("*.json")]
        assert bundled
        assert {len(found.count.prompt_token_ids) for found in bundled} == {128}
        assert min(found.explain.certain() for found in bundled) > 8


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_gguf_has_the_names_and_numbers_of_the_format(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file.tempfile, "gettempdir", lambda: str(tmp_path))
    path = gguf_file.converted(tiny_model, kind)
    assert gguf_file.converted(tiny_model, kind) == path
    reader = gguf.GGUFReader(path)
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG["num_hidden_layers"])
    tensors = load_file(tiny_model / "model.safetensors")
    assert {names.get_name(name, try_suffixes=(".weight",)) for name in tensors} == set(found)
    tolerance = 0.01 if kind == "F16" else 0.25
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        here = found[names.get_name(name, try_suffixes=(".weight",))]
        assert np.abs(here - tensors[name]).max() < tolerance


def test_interleaved_rows_turn_as_the_hubs_do() -> None:
    heads, head_dim = 3, 8
    random = np.random.default_rng(0)
    rows = random.standard_normal((heads * head_dim, 5))
    hidden, angles = random.standard_normal(5), random.standard_normal(head_dim // 2)
    hub = (rows @ hidden).reshape(heads, 2, head_dim // 2)
    pairs = (gguf_file.interleaved(rows, heads) @ hidden).reshape(heads, head_dim // 2, 2)
    cos, sin = np.cos(angles), np.sin(angles)
    turned_hub = np.stack([hub[:, 0] * cos - hub[:, 1] * sin, hub[:, 1] * cos + hub[:, 0] * sin], axis=-1)
    turned = np.stack(
        [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], -1
    )
    assert np.allclose(turned_hub, turned)


def test_other_architectures_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(BenchError, match="gpt2"):
        gguf_file.converted(Path(folder), "F16")
