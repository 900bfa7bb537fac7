"""Models under a prefix of an S3 bucket, or of any server that speaks S3.

Credentials, region, profiles and AWS_ENDPOINT_URL_S3 / AWS_ENDPOINT_URL mean what they mean to boto3;
a custom endpoint is addressed path-style. Two settings are read from the environment besides:

    FIRSTLIGHT_S3_REQUEST_PAYER=requester   pay for the requests to a requester-pays bucket
    FIRSTLIGHT_S3_ANONYMOUS=1               send no credentials (so it is, too, where there are none)

`s3://bucket/prefix` is the folder of a model. `s3://bucket/prefix/model.safetensors?versionId=…` is a
model whose weights are exactly that object, at that version if one is given, with the other files
beside it.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.weights.sources.cache import Entry, explained, model_dir, recall, remember
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.fetching import OnProgress, bring
from runtime.weights.sources.headers import body_range, retry_after
from runtime.weights.sources.mover import Body
from runtime.weights.sources.reference import Reference
from runtime.weights.sources.remote import RangeReply, RemoteFile, SourceChanged, Transient
from runtime.weights.sources.selection import SAFETENSORS_INDEX, is_small, is_weight_candidate

_CONNECTIONS = 32
_LATEST = "latest"
# A source that is rewritten again and again while it is read is given up on.
_MAX_LISTINGS = 3
_MAX_ATTEMPTS = 3
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 10
_NOT_FOUND = {"NoSuchBucket", "NoSuchKey", "404", "NotFound", "NoSuchAccessPoint"}
_DENIED = {
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "401",
    "403",
}


def locate(reference: Reference, cache_dir: Path) -> Path | None:
    """The complete directory of what the prefix held when it was last fetched; no request is made."""
    name = _folder(reference)
    version = recall(model_dir(cache_dir, "s3", name), _LATEST)
    if version is None:
        return None
    entry = Entry(cache_dir, "s3", name, version)
    return entry.directory if entry.complete() else None


def fetch(reference: Reference, cache_dir: Path, on_progress: OnProgress) -> Path:
    """Bring what the prefix holds now and return its directory; see `sources.fetch`.

    Every read names the ETag that was listed, so files of two uploads are never mixed: when one is
    replaced meanwhile, the prefix is listed and fetched anew.
    """
    for listing in range(1, _MAX_LISTINGS + 1):
        remote = S3Remote(reference)
        entry = Entry(cache_dir, "s3", _folder(reference), remote.version)
        try:
            directory = bring(remote, reference.url, entry, on_progress)
        except SourceChanged:
            if listing == _MAX_LISTINGS:
                raise
            continue
        with explained(entry.model_dir):
            remember(entry.model_dir, _LATEST, remote.version)
        return directory
    raise AssertionError("the last listing returns or raises")


class S3Remote:
    """What a prefix holds now; a `Remote`. Making it lists the prefix."""

    connections = _CONNECTIONS

    def __init__(self, reference: Reference) -> None:
        self.where = reference.url
        self._bucket = reference.bucket
        folder, _, single = reference.key.rpartition("/")
        self._single = single if single.endswith(".safetensors") else None
        if reference.version_id and not self._single:
            raise SourceError(
                "invalid",
                f"{self.where}: a versionId belongs to one object. Name the .safetensors object, or leave "
                "the versionId out to take the newest version of everything under the prefix.",
            )
        self._version_id = reference.version_id
        folder = folder if self._single else reference.key
        self._prefix = folder if not folder or folder.endswith("/") else folder + "/"
        self._payer = (
            {"RequestPayer": "requester"}
            if os.environ.get("FIRSTLIGHT_S3_REQUEST_PAYER") == "requester"
            else {}
        )
        with self._explained():
            self._client = _client()
            self.files: Sequence[RemoteFile] = self._list()
        if not self.files:
            raise SourceError(
                "not_found",
                f"Nothing lies under {self.where}. Check bucket and prefix; both are case-sensitive.",
            )
        needed = (f for f in self.files if is_small(f.name) or is_weight_candidate(f.name))
        self.version = _digest(*(f"{f.name} {f.size} {f.tag}" for f in needed), length=40)

    def _list(self) -> list[RemoteFile]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix, Delimiter="/", **self._payer
        )
        items = {
            item["Key"][len(self._prefix) :]: item
            for page in pages
            for item in page.get("Contents", ())
            if item["Key"].startswith(self._prefix)
        }
        files = {name: RemoteFile(name, item["Size"], item["ETag"]) for name, item in items.items()}
        if self._single is not None:
            small = [file for file in files.values() if is_small(file.name)]
            return [*(f for f in small if f.name != SAFETENSORS_INDEX), self._head(self._single)]
        digested = [
            name
            for name, item in items.items()
            if is_weight_candidate(name) and "SHA256" in item.get("ChecksumAlgorithm", ())
        ]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            for head in pool.map(self._head, digested):
                if head.tag != files[head.name].tag:
                    raise self._changed(head)
                files[head.name] = head
        return list(files.values())

    def _head(self, name: str) -> RemoteFile:
        """What the object itself says, its digest included if its uploader had one made of the whole."""
        version = {"VersionId": self._version_id} if self._version_id else {}
        head = self._client.head_object(
            Bucket=self._bucket, Key=self._prefix + name, ChecksumMode="ENABLED", **version, **self._payer
        )
        digest = head.get("ChecksumSHA256", "")
        # Of an upload in parts there is a digest of the parts' digests, with their number after it.
        sha256 = None if not digest or "-" in digest else base64.b64decode(digest).hex()
        return RemoteFile(name, head["ContentLength"], head["ETag"], sha256)

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, end: int) -> Iterator[RangeReply]:
        """Read [start, end) of an object: see `Remote.open_range`."""
        from botocore.exceptions import ClientError, HTTPClientError
        from botocore.exceptions import ConnectionError as ConnectError
        from urllib3.exceptions import HTTPError

        wanted: dict[str, str] = {"IfMatch": file.tag, "Range": f"bytes={start}-{end - 1}", **self._payer}
        if self._version_id and file.name == self._single:
            wanted["VersionId"] = self._version_id
        with self._explained():
            try:
                reply = self._client.get_object(Bucket=self._bucket, Key=self._prefix + file.name, **wanted)
                with reply["Body"] as body:
                    # Not every server knows If-Match.
                    if reply.get("ETag") != file.tag:
                        raise self._changed(file)
                    meta = reply["ResponseMetadata"]
                    offset, total = body_range(meta["HTTPStatusCode"], _capitalised(meta["HTTPHeaders"]))
                    yield RangeReply(offset, total, Body(body, _READ_TIMEOUT_S))
            except ClientError as error:
                meta = error.response.get("ResponseMetadata", {})
                status = meta.get("HTTPStatusCode", 0)
                if status == 412 or error.response.get("Error", {}).get("Code") == "NoSuchKey":
                    raise self._changed(file) from error
                if status in (408, 429) or status >= 500:
                    headers = _capitalised(meta.get("HTTPHeaders", {}))
                    raise Transient(str(error), retry_after(headers)) from error
                raise
            except (ConnectError, HTTPClientError, HTTPError, ConnectionError, TimeoutError) as error:
                raise Transient(str(error)) from error

    def _changed(self, file: RemoteFile) -> SourceChanged:
        return SourceChanged(
            f"{self.where}: {file.name} was replaced while it was being downloaded. Start again when the "
            "upload is finished."
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the client's errors into SourceErrors for people."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            raise self._by_code(error.response.get("Error", {}).get("Code", ""), error) from error
        except BotoCoreError as error:
            raise SourceError(
                "network",
                f"{self.where} could not be read: {error} Check the network, AWS_REGION, "
                "AWS_ENDPOINT_URL_S3 and the proxy settings.",
            ) from error

    def _by_code(self, code: str, error: Exception) -> SourceError:
        if self._version_id and code in ("NoSuchVersion", "InvalidArgument", "400", "404"):
            # Asked for a version by its id, servers do not tell a missing object from a missing version.
            return SourceError(
                "revision",
                f"{self.where}: there is no such object, or no such version of it. List what there is with "
                f"`aws s3api list-object-versions --bucket {self._bucket} --prefix {self._prefix}`.",
            )
        if code in _NOT_FOUND:
            return SourceError(
                "not_found",
                f"{self.where} was not found ({code}). Check bucket, prefix, AWS_REGION and, for a server of "
                "your own, AWS_ENDPOINT_URL_S3.",
            )
        if code in _DENIED:
            return SourceError(
                "gated",
                f"{self.where}: access denied ({code}). The credentials need s3:ListBucket on the bucket and "
                "s3:GetObject on the prefix. For a public bucket set FIRSTLIGHT_S3_ANONYMOUS=1, for a "
                "requester-pays one FIRSTLIGHT_S3_REQUEST_PAYER=requester.",
            )
        return SourceError("network", f"{self.where} could not be read: {error}")


def _client() -> Any:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    session = boto3.session.Session()
    endpoint = _endpoint()
    anonymous = os.environ.get("FIRSTLIGHT_S3_ANONYMOUS") == "1" or session.get_credentials() is None
    config = Config(
        signature_version=UNSIGNED if anonymous else None,
        s3={"addressing_style": "path" if endpoint else "auto"},
        max_pool_connections=_CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": _MAX_ATTEMPTS},
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        # Servers other than Amazon's often know nothing of the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = session.region_name or "us-east-1"
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _folder(reference: Reference) -> str:
    """A folder's name that people recognise and that no other source shares."""
    last = reference.key.strip("/").rpartition("/")[2]
    readable = "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{reference.bucket}--{last}")
    return f"{readable[-80:]}-{_digest(_endpoint() or '', reference.url, length=12)}"


def _digest(*parts: str, length: int) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:length]


def _capitalised(headers: dict[str, str]) -> dict[str, str]:
    """Header names as HTTP writes them; botocore gives them in lower case."""
    return {name.title(): value for name, value in headers.items()}
