"""One commit of a Hub repository: its listing, and ranged reads of its files."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import urllib3

from runtime.weights.sources import hub_token, retry
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.headers import body_range, retry_after
from runtime.weights.sources.http_reads import Connections
from runtime.weights.sources.mover import Body
from runtime.weights.sources.reference import Reference
from runtime.weights.sources.remote import RangeReply, RemoteFile, Transient

COMMIT = re.compile(r"[0-9a-f]{40}")
_NEXT = re.compile(r'<([^>]+)>; *rel="next"')
_DEFAULT_ENDPOINT = "https://huggingface.co"
_CONNECTIONS = 16
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)


class HubRemote:
    """One commit of one Hub repository; a `Remote`. Making it asks the Hub for commit and listing."""

    connections = _CONNECTIONS

    def __init__(self, reference: Reference) -> None:
        from huggingface_hub import constants

        self.where = reference.url
        self._repo = reference.location
        self._endpoint = (os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT).rstrip("/")
        self._timeout = max(constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)
        self._http = Connections(_CONNECTIONS, self._timeout)
        # Where the Hub sent us for a file's bytes: a signed address on another host.
        self._locations: dict[str, str] = {}
        self.commit = self._resolve(reference.revision or "main")
        self.files: Sequence[RemoteFile] = self._list()

    def _resolve(self, revision: str) -> str:
        """The commit that a branch or tag stands for."""
        description, _ = self._ask(f"{self._api}/revision/{quote(revision, safe='')}")
        commit = description.get("sha") if isinstance(description, dict) else None
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise SourceError(
                "invalid", f"{self._endpoint} names no commit for {self.where}: is it a model hub?"
            )
        return commit

    def _list(self) -> list[RemoteFile]:
        files: list[RemoteFile] = []
        page: str | None = f"{self._api}/tree/{self.commit}"
        while page is not None:
            items, page = self._ask(page)
            files += [_listed(item) for item in items if item["type"] == "file" and "/" not in item["path"]]
        return files

    @property
    def _api(self) -> str:
        return f"{self._endpoint}/api/models/{self._repo}"

    def _ask(self, url: str) -> tuple[Any, str | None]:
        """What the Hub answers in JSON, and where it goes on. A Hub that is merely busy is asked again."""
        for tries in itertools.count(1):
            try:
                with self._http.get(url, hub_token.headers()) as response:
                    body = response.read()
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise SourceError(
                    "network",
                    f"{self._endpoint} could not be reached for {self.where} "
                    f"({str(error) or type(error).__name__}). Check the network, HF_ENDPOINT and the proxy "
                    "settings.",
                ) from error
            location = response.headers.get("Location")
            if response.status in _REDIRECTS and location is not None and tries < _MAX_REDIRECTS:
                url = self._moved(urljoin(url, location))
            elif response.status == 200:
                return self._decoded(body), _next_page(response.headers)
            elif tries == retry.MAX_FRUITLESS_TRIES or not _is_passing(response.status):
                raise self._refused(response.status, response.headers, urlsplit(url).path)
            else:
                time.sleep(retry.delay_s(tries, retry_after(response.headers)))
        raise AssertionError("the last try returns or raises")

    def _moved(self, url: str) -> str:
        """Where a renamed repository is now: at the Hub, or it is not followed."""
        if _origin(url) != _origin(self._endpoint):
            raise SourceError("network", f"{self._endpoint} sends us to {url} for {self.where}.")
        return url

    def _decoded(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError as error:
            raise SourceError(
                "invalid", f"{self._endpoint} does not answer as a model hub does for {self.where}."
            ) from error

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
        resolve = f"{self._endpoint}/{self._repo}/resolve/{self.commit}/{quote(file.name)}"
        url = self._locations.get(file.name, resolve)
        for _ in range(_MAX_REDIRECTS):
            headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            # The token is for the Hub alone.
            if _origin(url) == _origin(self._endpoint):
                headers |= hub_token.headers()
            with self._http.get(url, headers) as response:
                location = response.headers.get("Location")
                if location is None or response.status not in _REDIRECTS:
                    yield response
                    return
            url = urljoin(url, location)
            if _origin(url) != _origin(self._endpoint):
                self._locations[file.name] = url
        raise Transient(f"more than {_MAX_REDIRECTS} redirects")

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


def _listed(item: dict[str, Any]) -> RemoteFile:
    """One entry of the Hub's listing. LFS files are listed with their SHA-256, others by git's object id."""
    lfs = item.get("lfs")
    return RemoteFile(
        name=item["path"],
        size=lfs["size"] if lfs else item["size"],
        tag=item["oid"],
        sha256=lfs["oid"] if lfs else None,
        git_sha1=None if lfs else item["oid"],
    )


def _next_page(headers: Mapping[str, str]) -> str | None:
    found = _NEXT.search(headers.get("Link") or "")
    return found[1] if found else None


def _is_passing(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()
