"""Models on the Hugging Face Hub.

HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and the proxy settings mean what they mean to
`huggingface_hub`. The requests are our own: the bytes are read in ranges, because a client that was killed
must not start a file again, and importing the Hub's client takes longer than all that is asked before them.
The token goes to the Hub and to no other host.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from runtime.weights.sources import local
from runtime.weights.sources.cache import Entry, explained, model_dir, recall, remember
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.fetching import OnProgress, bring
from runtime.weights.sources.folder import holds_model
from runtime.weights.sources.reference import Reference
from runtime.weights.sources.selection import SAFETENSORS_INDEX, is_small, weight_files

_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json"}


def locate(reference: Reference, cache_dir: Path) -> Path | None:
    """The model's complete directory, in our cache or in the Hub client's own; no request is made."""
    ref = reference.revision or "main"
    ours = model_dir(cache_dir, "hub", _folder(reference))
    commit = ref if _is_commit(ref) else recall(ours, ref)
    if commit is not None:
        entry = _entry(reference, cache_dir, commit)
        if entry.complete():
            return entry.directory
    snapshot = _in_client_cache(reference, ref)
    return None if snapshot is None else local.locate(snapshot, cache_dir)


def fetch(reference: Reference, cache_dir: Path, on_progress: OnProgress) -> Path:
    """Bring what is missing of the model and return its directory; see `sources.fetch`."""
    ref = reference.revision or "main"
    pinned = _is_commit(ref)
    if pinned or _offline():
        if here := locate(reference, cache_dir):
            return here
        if found := _in_client_cache(reference, ref):
            return local.fetch(found, cache_dir, on_progress)
    if _offline():
        raise SourceError(
            "network",
            f"{reference.url} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it. Unset "
            "HF_HUB_OFFLINE, or fetch the model beforehand with `firstlight pull`.",
        )
    from runtime.weights.sources.hub_remote import HubRemote

    remote = HubRemote(reference)
    entry = _entry(reference, cache_dir, remote.commit)
    snapshot = None if entry.complete() else _in_client_cache(reference, remote.commit)
    if snapshot is None:
        directory = bring(remote, reference.url, entry, on_progress)
    else:
        directory = local.fetch(snapshot, cache_dir, on_progress)
    if not pinned:
        with explained(entry.model_dir):
            remember(entry.model_dir, ref, remote.commit)
    return directory


def _is_commit(ref: str) -> bool:
    return len(ref) == 40 and all(c in "0123456789abcdef" for c in ref)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _folder(reference: Reference) -> str:
    return reference.location.replace("/", "--")


def _entry(reference: Reference, cache_dir: Path, commit: str) -> Entry:
    return Entry(cache_dir, "hub", _folder(reference), commit)


def _in_client_cache(reference: Reference, ref: str) -> Reference | None:
    """A complete snapshot that the Hub's own client left in its cache, if there is one."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    repo = Path(os.path.expanduser(os.path.expandvars(hub))) / f"models--{_folder(reference)}"
    try:
        commit = ref if _is_commit(ref) else (repo / "refs" / ref).read_text().strip()
        snapshot = repo / "snapshots" / commit
        # A dangling link, as an interrupted download leaves, is no file.
        present = {name for name in os.listdir(snapshot) if (snapshot / name).is_file()}
    except OSError:
        return None
    listed = _client_listing(repo / "trees" / f"{commit}.json")
    if listed is None:
        # An older client kept no listing. A snapshot with these files was most likely taken whole.
        whole = "tokenizer_config.json" in present and bool(present & _TOKENIZERS)
        complete = whole and holds_model(snapshot)
    else:
        complete = _holds_needed(snapshot, present, listed)
    return Reference("local", str(snapshot)) if complete else None


def _client_listing(path: Path) -> set[str] | None:
    try:
        return {name for name in json.loads(path.read_bytes())["files"] if "/" not in name}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _holds_needed(directory: Path, present: set[str], listed: set[str]) -> bool:
    """Whether of the files that the Hub lists all that a model needs are present."""
    if not {name for name in listed if is_small(name)} <= present:
        return False
    index = (directory / SAFETENSORS_INDEX).read_bytes() if SAFETENSORS_INDEX in listed else None
    try:
        return set(weight_files(listed, index, str(directory))) <= present
    except SourceError:
        return False
