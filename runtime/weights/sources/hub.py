"""Models on the Hugging Face Hub.

Requests are built by `huggingface_hub`, so HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and the
proxy settings mean what they mean there; the bytes are read in ranges of our own, because a client
that was killed must not start a file again. The token goes to the Hub and to no other host.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from runtime.weights.sources import retry
from runtime.weights.sources.cache import Entry, explained, model_dir, recall, remember
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.fetching import OnProgress, bring
from runtime.weights.sources.folder import holds_model
from runtime.weights.sources.headers import body_range, retry_after
from runtime.weights.sources.reference import Reference
from runtime.weights.sources.remote import RangeReply, RemoteFile, Transient
from runtime.weights.sources.selection import SAFETENSORS_INDEX, is_small, weight_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DEFAULT_ENDPOINT = "https://huggingface.co"
_MAX_REDIRECTS = 5
_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json"}


def locate(reference: Reference, cache_dir: Path) -> Path | None:
    """The model's complete directory, in our cache or in the Hub client's own; no request is made."""
    ref = reference.revision or "main"
    ours = model_dir(cache_dir, "hub", _folder(reference))
    commit = ref if _COMMIT.fullmatch(ref) else recall(ours, ref)
    if commit is not None:
        entry = _entry(reference, cache_dir, commit)
        if entry.complete():
            return entry.directory
    return _in_client_cache(reference, ref)


def fetch(reference: Reference, cache_dir: Path, on_progress: OnProgress) -> Path:
    """Bring what is missing of the model and return its directory; see `sources.fetch`."""
    ref = reference.revision or "main"
    pinned = _COMMIT.fullmatch(ref) is not None
    if (pinned or _offline()) and (here := locate(reference, cache_dir)):
        return here
    if _offline():
        raise SourceError(
            "network",
            f"{reference.url} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it. Unset "
            "HF_HUB_OFFLINE, or fetch the model beforehand with `firstlight pull`.",
        )
    remote = HubRemote(reference)
    entry = _entry(reference, cache_dir, remote.commit)
    directory = None if entry.complete() else _in_client_cache(reference, remote.commit)
    if directory is None:
        directory = bring(remote, reference.url, entry, on_progress)
    if not pinned:
        with explained(entry.model_dir):
            remember(entry.model_dir, ref, remote.commit)
    return directory


class HubRemote:
    """One commit of one Hub repository; a `Remote`. Making it asks the Hub for commit and listing."""

    connections = 8

    def __init__(self, reference: Reference) -> None:
        from huggingface_hub import HfApi, constants

        self._endpoint = _endpoint()
        self._repo = reference.location
        self.where = reference.url
        self._timeout = max(constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)
        # Where the Hub sent us for a file's bytes: a signed address on another host.
        self._locations: dict[str, str] = {}
        with self._explained():
            api = HfApi(endpoint=self._endpoint)
            self.commit = self._resolve(api, reference.revision or "main")
            self.files: Sequence[RemoteFile] = self._list(api)

    def _resolve(self, api: HfApi, revision: str) -> str:
        """The commit that a branch or tag stands for. A Hub that is merely busy is asked again."""
        from huggingface_hub.errors import HfHubHTTPError

        commit = None
        for tries in itertools.count(1):
            try:
                commit = api.model_info(self._repo, revision=revision, timeout=self._timeout).sha
                break
            except HfHubHTTPError as error:
                status, headers = error.response.status_code, error.response.headers
                if tries == retry.MAX_FRUITLESS_TRIES or not (status in (408, 429) or status >= 500):
                    raise
                time.sleep(retry.delay_s(tries, retry_after(headers)))
        if commit is None or not _COMMIT.fullmatch(commit):
            raise SourceError(
                "invalid", f"{self._endpoint} names no commit for {self.where}: is it a model hub?"
            )
        return commit

    def _list(self, api: HfApi) -> list[RemoteFile]:
        from huggingface_hub import RepoFile

        return [
            RemoteFile(
                name=item.path,
                size=item.lfs.size if item.lfs else item.size,
                tag=item.blob_id,
                sha256=item.lfs.sha256 if item.lfs else None,
                git_sha1=None if item.lfs else item.blob_id,
            )
            for item in api.list_repo_tree(self._repo, revision=self.commit)
            if isinstance(item, RepoFile) and "/" not in item.path
        ]

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, end: int) -> Iterator[RangeReply]:
        """Read [start, end) of a file: see `Remote.open_range`."""
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # lazy there

        with self._explained():
            try:
                with self._get(file, start, end) as response:
                    status = response.status_code
                    if status in (408, 429) or status >= 500:
                        raise Transient(f"HTTP status {status}", retry_after(response.headers))
                    if status >= 400 and self._locations.pop(file.name, None):
                        # Signed addresses expire; the Hub gives out a new one.
                        raise Transient(f"HTTP status {status} from the storage behind the Hub")
                    hf_raise_for_status(response)
                    offset, total = body_range(status, response.headers)
                    yield RangeReply(offset, total, response.iter_raw())
            except HfHubHTTPError:
                raise
            except _http_error() as error:
                raise Transient(str(error) or type(error).__name__) from error

    @contextmanager
    def _get(self, file: RemoteFile, start: int, end: int) -> Iterator[Any]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # lazy there

        resolve = hf_hub_url(self._repo, file.name, revision=self.commit, endpoint=self._endpoint)
        url = self._locations.get(file.name, resolve)
        for _ in range(_MAX_REDIRECTS):
            headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            if _origin(url) == _origin(self._endpoint):
                headers |= build_hf_headers()
            request = get_session().stream(
                "GET", url, headers=headers, follow_redirects=False, timeout=self._timeout
            )
            with request as response:
                location = response.headers.get("Location")
                if location is None or response.status_code not in (301, 302, 303, 307, 308):
                    yield response
                    return
            url = urljoin(url, location)
            if _origin(url) != _origin(self._endpoint):
                self._locations[file.name] = url
        raise Transient(f"more than {_MAX_REDIRECTS} redirects")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the client's errors into SourceErrors for people."""
        from huggingface_hub import errors

        try:
            yield
        except errors.GatedRepoError as error:
            raise SourceError(
                "gated",
                f"{self.where} is gated: its authors want its licence accepted first. Accept it on "
                f"{self._endpoint}/{self._repo}, then set HF_TOKEN to a token of that account.",
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise SourceError(
                "not_found",
                f"{self.where} was not found on {self._endpoint}. Check the spelling; if the repository is "
                "private, set HF_TOKEN to a token that may read it.",
            ) from error
        except errors.RevisionNotFoundError as error:
            raise SourceError(
                "revision",
                f"{self.where}: the repository exists, but this branch, tag or commit does not. See "
                f"{self._endpoint}/{self._repo}/commits/main, and mind that names are case-sensitive.",
            ) from error
        except errors.HFValidationError as error:
            raise SourceError("invalid", f"{self.where} is no name that the Hub accepts: {error}") from error
        except errors.HfHubHTTPError as error:
            raise self._by_status(error) from error
        except _http_error() as error:
            raise SourceError(
                "network",
                f"{self._endpoint} could not be reached for {self.where} ({error or type(error).__name__}). "
                "Check the network, HF_ENDPOINT and the proxy settings.",
            ) from error

    def _by_status(self, error: Any) -> SourceError:
        status = error.response.status_code
        if status in (401, 403):
            return SourceError(
                "gated",
                f"{self._endpoint} refuses access to {self.where} (HTTP status {status}). Set HF_TOKEN to a "
                "valid token that may read this repository.",
            )
        if status == 404:
            return SourceError("not_found", f"{self.where}: {error.response.url.path} was not found.")
        return SourceError(
            "network",
            f"{self._endpoint} failed on {self.where} (HTTP status {status}). Try again later.",
        )


def _http_error() -> type[Exception]:
    """The root of all errors of the HTTP library that the Hub's client is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", _DEFAULT_ENDPOINT).rstrip("/")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _folder(reference: Reference) -> str:
    return reference.location.replace("/", "--")


def _entry(reference: Reference, cache_dir: Path, commit: str) -> Entry:
    return Entry(cache_dir, "hub", _folder(reference), commit)


def _in_client_cache(reference: Reference, ref: str) -> Path | None:
    """A complete snapshot that the Hub's own client left in its cache, if there is one."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    repo = Path(os.path.expanduser(os.path.expandvars(hub))) / f"models--{_folder(reference)}"
    try:
        commit = ref if _COMMIT.fullmatch(ref) else (repo / "refs" / ref).read_text().strip()
        snapshot = repo / "snapshots" / commit
        # A dangling link, as an interrupted download leaves, is no file.
        present = {name for name in os.listdir(snapshot) if (snapshot / name).is_file()}
    except OSError:
        return None
    listed = _client_listing(repo / "trees" / f"{commit}.json")
    if listed is None:
        # An older client kept no listing. A snapshot with these files was most likely taken whole.
        whole = "tokenizer_config.json" in present and bool(present & _TOKENIZERS)
        return snapshot if whole and holds_model(snapshot) else None
    return snapshot if _holds_needed(snapshot, present, listed) else None


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
