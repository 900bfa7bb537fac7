"""One commit of a Hub repository: its listing, and ranged reads of its files."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

import urllib3

from runtime.weights.sources import retry
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.headers import body_range, retry_after
from runtime.weights.sources.http_reads import Connections
from runtime.weights.sources.mover import Body
from runtime.weights.sources.reference import Reference
from runtime.weights.sources.remote import RangeReply, RemoteFile, Transient

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT = re.compile(r"[0-9a-f]{40}")
_DEFAULT_ENDPOINT = "https://huggingface.co"
_CONNECTIONS = 16
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)


class HubRemote:
    """One commit of one Hub repository; a `Remote`. Making it asks the Hub for commit and listing."""

    connections = _CONNECTIONS

    def __init__(self, reference: Reference) -> None:
        from huggingface_hub import HfApi, constants

        self.where = reference.url
        self._repo = reference.location
        self._endpoint = os.environ.get("HF_ENDPOINT", _DEFAULT_ENDPOINT).rstrip("/")
        self._timeout = max(constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)
        self._http = Connections(_CONNECTIONS, self._timeout)
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
                if tries == retry.MAX_FRUITLESS_TRIES or not _is_passing(error.response.status_code):
                    raise
                time.sleep(retry.delay_s(tries, retry_after(error.response.headers)))
        if commit is None or not COMMIT.fullmatch(commit):
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
        try:
            with self._get(file, start, end) as response:
                if _is_passing(response.status):
                    raise Transient(f"HTTP status {response.status}", retry_after(response.headers))
                if response.status >= 400:
                    if self._locations.pop(file.name, None) is None:
                        raise self._refused(response.status, response.headers, file.name)
                    # Signed addresses expire; the Hub gives out a new one.
                    raise Transient(f"HTTP status {response.status} from the storage behind the Hub")
                offset, total = body_range(response.status, response.headers)
                yield RangeReply(offset, total, Body(response, self._timeout))
        except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
            raise Transient(str(error) or type(error).__name__) from error

    @contextmanager
    def _get(self, file: RemoteFile, start: int, end: int) -> Iterator[urllib3.BaseHTTPResponse]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # lazy there

        resolve = hf_hub_url(self._repo, file.name, revision=self.commit, endpoint=self._endpoint)
        url = self._locations.get(file.name, resolve)
        for _ in range(_MAX_REDIRECTS):
            headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            # The token is for the Hub alone.
            if _origin(url) == _origin(self._endpoint):
                headers |= build_hf_headers()
            with self._http.get(url, headers) as response:
                location = response.headers.get("Location")
                if location is None or response.status not in _REDIRECTS:
                    yield response
                    return
            url = urljoin(url, location)
            if _origin(url) != _origin(self._endpoint):
                self._locations[file.name] = url
        raise Transient(f"more than {_MAX_REDIRECTS} redirects")

    # ---- errors for people ---------------------------------------------------------------------

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the client's errors into SourceErrors."""
        from huggingface_hub import errors

        # The root of all errors of the HTTP library that the client is built on, whichever it is.
        http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
        try:
            yield
        except errors.HFValidationError as error:
            raise SourceError("invalid", f"{self.where} is no name that the Hub accepts: {error}") from error
        except errors.HfHubHTTPError as error:
            response = error.response
            raise self._refused(response.status_code, response.headers, response.url.path) from error
        except http_error as error:
            raise SourceError(
                "network",
                f"{self._endpoint} could not be reached for {self.where} ({error or type(error).__name__}). "
                "Check the network, HF_ENDPOINT and the proxy settings.",
            ) from error

    def _refused(self, status: int, headers: Mapping[str, str], what: str) -> SourceError:
        """What the Hub means by an answer that is final."""
        page = f"{self._endpoint}/{self._repo}"
        code = headers.get("X-Error-Code")
        if code == "GatedRepo":
            return SourceError(
                "gated",
                f"{self.where} is gated: its authors want its licence accepted first. Accept it on {page}, "
                "then set HF_TOKEN to a token of that account.",
            )
        if code == "RevisionNotFound":
            return SourceError(
                "revision",
                f"{self.where}: the repository exists, but this branch, tag or commit does not. See "
                f"{page}/commits/main, and mind that names are case-sensitive.",
            )
        # Without a token the Hub answers 401 for what is private and for what does not exist alike.
        if code == "RepoNotFound" or (status == 401 and code is None):
            return SourceError(
                "not_found",
                f"{self.where} was not found on {self._endpoint}. Check the spelling; if the repository is "
                "private, set HF_TOKEN to a valid token that may read it.",
            )
        if status in (401, 403):
            return SourceError(
                "gated",
                f"{self._endpoint} refuses access to {self.where} (HTTP status {status}). Set HF_TOKEN to a "
                "valid token that may read this repository.",
            )
        if status == 404:
            return SourceError("not_found", f"{self.where}: {what} was not found on {self._endpoint}.")
        return SourceError(
            "network", f"{self._endpoint} failed on {self.where} (HTTP status {status}). Try again later."
        )


def _is_passing(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()
