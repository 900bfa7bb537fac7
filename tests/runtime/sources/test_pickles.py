"""Models that only have pickled weights, from the Hub, from its client's cache and from a folder."""

from __future__ import annotations

import asyncio
import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.client import EngineUnavailable
from runtime.errors import FirstlightError
from runtime.weights.sources import FetchProgress, fetch, locate
from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.models import contents, spec
from tests.runtime.sources.test_arrival import answer, answer_of, engine

__all__ = ["answer"]  # a fixture

SPEC = spec("hf://org/name")
SHARDS = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]


@pytest.fixture(scope="session")
def pickled_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its weights pickled, in two files."""
    directory = tmp_path_factory.mktemp("pickled") / "llama"
    shutil.copytree(tiny_model, directory)
    weights = directory / "model.safetensors"
    tensors = list(load_file(weights).items())
    weights.unlink()
    for number, name in enumerate(SHARDS):
        torch.save(dict(tensors[number::2]), directory / name)
    (directory / "pytorch_model.bin.index.json").write_text("{}")
    return directory


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    files = directory.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_weights(directory: Path, other: Path) -> bool:
    found, expected = weights_of(directory), weights_of(other)
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def test_they_are_converted_once_and_what_they_were_is_not_kept(
    hub: HubServer, pickled_model: Path, tiny_model: Path, cache_dir: Path
) -> None:
    hub.add_repo("org/name", pickled_model)
    told: list[FetchProgress] = []
    directory = fetch(SPEC, cache_dir, told.append)
    assert same_weights(directory, tiny_model)
    assert not list(cache_dir.rglob("*.bin"))
    assert {progress.phase for progress in told} == {"download", "convert"}
    assert locate(SPEC, cache_dir) == directory
    hub.requests.clear()
    assert fetch(SPEC, cache_dir) == directory
    assert hub.body_bytes("/storage/") == 0


def test_where_there_are_safetensors_they_stay_where_they_are(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo(
        "org/name", {"config.json": b"{}", "pytorch_model.bin": b"pickle", "model.safetensors": b"tensors"}
    )
    assert set(contents(fetch(SPEC, cache_dir))) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("source", ["hub", "folder"])
def test_an_engine_starts_from_them(
    hub: HubServer, pickled_model: Path, cache_dir: Path, answer: list[int], source: str
) -> None:
    hub.add_repo("org/name", pickled_model)

    async def test() -> None:
        for _ in range(2):
            async with engine(
                "hf://org/name" if source == "hub" else str(pickled_model), cache_dir
            ) as client:
                assert await answer_of(client) == answer

    asyncio.run(test())


class _Touches:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self._path}'",)


def test_an_engine_refuses_a_file_that_holds_a_program(
    hub: HubServer, pickled_model: Path, cache_dir: Path, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2), "b": _Touches(tmp_path / "it ran")}, buffer)
    files = {path.name: path.read_bytes() for path in pickled_model.iterdir()}
    hub.add_repo("org/name", files | {SHARDS[1]: buffer.getvalue()})

    async def test() -> None:
        async with engine("hf://org/name", cache_dir) as client:
            with pytest.raises(EngineUnavailable, match=r"-00002-of-00002\.bin cannot be used: it asks for"):
                await answer_of(client)

    asyncio.run(test())
    assert not (tmp_path / "it ran").exists()


def test_a_folder_is_converted_again_when_it_changes(
    pickled_model: Path, tiny_model: Path, tmp_path: Path, cache_dir: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(pickled_model, folder)
    model = spec(str(folder))
    assert locate(model, cache_dir) is None
    first = fetch(model, cache_dir)
    assert same_weights(first, tiny_model)
    assert locate(model, cache_dir) == first
    torch.save({"a": torch.ones(3)}, folder / SHARDS[1])
    assert locate(model, cache_dir) is None
    second = fetch(model, cache_dir)
    assert torch.equal(weights_of(second)["a"], torch.ones(3))


def test_a_snapshot_of_the_hubs_client_is_converted_and_not_fetched_again(
    hub: HubServer, pickled_model: Path, tiny_model: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    hub.add_repo("org/name", pickled_model)
    snapshot_download("org/name", endpoint=hub.url, cache_dir=cache_dir / "client")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache_dir / "client"))
    hub.requests.clear()
    directory = fetch(SPEC, cache_dir)
    assert same_weights(directory, tiny_model)
    assert hub.body_bytes("/storage/") == 0
    assert locate(SPEC, cache_dir) == directory


def test_an_interrupted_conversion_begins_again_without_a_download(
    hub: HubServer, pickled_model: Path, tiny_model: Path, cache_dir: Path
) -> None:
    hub.add_repo("org/name", pickled_model)

    class Interrupted(Exception):
        pass

    def interrupt(progress: FetchProgress) -> None:
        if progress.phase == "convert":
            raise Interrupted

    with pytest.raises(Interrupted):
        fetch(SPEC, cache_dir, interrupt)
    assert locate(SPEC, cache_dir) is None
    hub.requests.clear()
    assert same_weights(fetch(SPEC, cache_dir), tiny_model)
    assert hub.body_bytes("/storage/") == 0


def test_a_file_that_is_no_archive_is_said_to_be_none(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", {"config.json": b"{}", "pytorch_model.bin": pickle.dumps({})})
    with pytest.raises(FirstlightError, match=r"pytorch_model\.bin is no whole archive"):
        fetch(SPEC, cache_dir)
