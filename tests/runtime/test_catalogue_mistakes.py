"""Mistakes in a catalogue: each is named by file, line and key, and nothing else is ever raised."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.catalogue import CatalogueError, ModelSpec, load_catalogue


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "models.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def entry(line: str) -> str:
    """A file whose third line is the one under test."""
    return f"models:\n  org/model:\n    {line}\n    source: hf://org/model\n"


ENTRY = "models.org/model"

# What is written, the line and the key that the error must name, and words it must hold.
MISTAKES = {
    "unknown key": (entry("max_model_length: 4"), 3, f"{ENTRY}.max_model_length", "mean max_model_len?"),
    "unknown key, nothing close": (entry("zzz: 4"), 3, f"{ENTRY}.zzz", "There may be: source, revision"),
    "unknown top-level key": ("model:\n", 1, "model", "Did you mean models?"),
    "unknown default": ("defaults:\n  source: hf://a/b\nmodels: {}\n", 2, "defaults.source", "unknown key"),
    "unknown sampling setting": (entry("generation: {topk: 1}"), 3, f"{ENTRY}.generation.topk", "top_k?"),
    "merge key": (entry("<<: {}"), 3, ENTRY, "top-level key `defaults`"),
    "key that is a truth value": (entry("on: 1"), 3, ENTRY, "the truth value 'on' as a key"),
    "duplicate key": (entry("source: hf://a/b"), 4, f"{ENTRY}.source", "first on line 3"),
    "duplicate id": ("models:\n  a: {source: hf://a/b}\n  a: {source: hf://a/c}\n", 3, "models.a", "line 2"),
    "truth value for a length": (entry("max_model_len: true"), 3, f"{ENTRY}.max_model_len", "truth value"),
    "text for a length": (entry("max_model_len: 'long'"), 3, f"{ENTRY}.max_model_len", "the text 'long'"),
    "quoted number": (entry("max_model_len: '4096'"), 3, f"{ENTRY}.max_model_len", "the text '4096'"),
    "fraction": (entry("max_model_len: 40.5"), 3, f"{ENTRY}.max_model_len", "whole number"),
    "octal": (entry("max_model_len: 010"), 3, f"{ENTRY}.max_model_len", "whole number"),
    "minutes": (entry("max_model_len: 1:30"), 3, f"{ENTRY}.max_model_len", "whole number"),
    "endless number": (entry("max_model_len: " + "9" * 5000), 3, f"{ENTRY}.max_model_len", "whole number"),
    "negative length": (entry("max_model_len: -1"), 3, f"{ENTRY}.max_model_len", "-1 is out of range"),
    "zero length": (entry("max_model_len: 0"), 3, f"{ENTRY}.max_model_len", "0 is out of range"),
    "list for a length": (entry("max_model_len: [1]"), 3, f"{ENTRY}.max_model_len", "a list, where"),
    "tp_size 0": (entry("tp_size: 0"), 3, f"{ENTRY}.tp_size", "out of range"),
    "one stop": (entry("stop_token_ids: 2"), 3, f"{ENTRY}.stop_token_ids", "a list of token ids should be"),
    "stop": (entry("stop_token_ids: [2, a]"), 3, f"{ENTRY}.stop_token_ids[1]", "a token id should be"),
    "template": (entry("chat_template: llama"), 3, f"{ENTRY}.chat_template", "there is no file"),
    "dtype": (entry("dtype: half"), 3, f"{ENTRY}.dtype", "auto, float32, float16, bfloat16"),
    "number for a text": (entry("revision: 1234567"), 3, f"{ENTRY}.revision", "Put it in quotes"),
    "empty text": (entry('revision: ""'), 3, f"{ENTRY}.revision", "empty"),
    "bad revision": (entry('revision: "a b"'), 3, f"{ENTRY}.revision", "no branch, tag or commit"),
    "missing source": ("models:\n  org/model:\n    tp_size: 2\n", 3, ENTRY, "source: hf://org/model"),
    "entry without settings": ("models:\n  org/model:\n", 2, ENTRY, "nothing, where the model's settings"),
    "unclear source": (
        "models:\n  a:\n    source: org/name\n",
        3,
        "models.a.source",
        "hf://org/name for the Hub",
    ),
    "unknown scheme": ("models:\n  a:\n    source: ftp://a/b\n", 3, "models.a.source", "no known source"),
    "two revisions": (
        "models:\n  a:\n    source: hf://a/b@v1\n    revision: v2\n",
        4,
        "models.a.revision",
        "already says @v1",
    ),
    "revision of a folder": (
        "models:\n  a:\n    source: /weights\n    revision: v2\n",
        4,
        "models.a.revision",
        "?versionId=",
    ),
    "bad id": ("models:\n  ../etc: {source: hf://a/b}\n", 2, "models.../etc", "cannot be a model's id"),
    "bad adapter name": (entry("adapters: {a b: hf://a/b}"), 3, f"{ENTRY}.adapters.a b", "adapter's name"),
    "bad adapter source": (entry("adapters: {a: b}"), 3, f"{ENTRY}.adapters.a", "hf://b for the Hub"),
    "missing template": (entry("chat_template: no.jinja"), 3, f"{ENTRY}.chat_template", "there is no file"),
    "top_p": (entry("generation: {top_p: 1.5}"), 3, f"{ENTRY}.generation.top_p", "Write 0 to 1"),
    "temperature": (entry("generation: {temperature: .inf}"), 3, f"{ENTRY}.generation.temperature", "number"),
    "top_k": (entry("generation: {top_k: 1.0}"), 3, f"{ENTRY}.generation.top_k", "whole number"),
    "default that is not there": (
        "default: org/modle\n" + entry("tp_size: 1"),
        1,
        "default",
        "Did you mean org/model?",
    ),
    "no models": ("# nothing yet\ndefaults: {}\n", 2, None, "`models` is missing"),
    "a list of models": ("models:\n- id: a\n", 2, "models", "a list, where the models by their ids"),
    "text alone": ("hello\n", 1, None, "the text 'hello', where `default`, `defaults` and `models`"),
    "empty": ("# nothing yet\n", None, None, "empty"),
    "bad YAML": ("models:\n  a: {source: [}\n", 2, None, "not YAML here"),
    "tab": ("models:\n\ta: 1\n", 2, None, "not YAML here"),
    "undefined alias": ("models: *other\n", 1, None, "not YAML here"),
    "two documents": ("models: {}\n---\nmodels: {}\n", 2, None, "not YAML here"),
    "control character": ("models: \x07\n", None, None, "not YAML here"),
    "a tag that asks for an object": (
        entry("revision: !!python/name:os.system x"),
        3,
        f"{ENTRY}.revision",
        "Write text",
    ),
    "nested too deeply": ("models:\n  " + "[" * 100_000, 2, None, "nested too deeply"),
    "nested too deeply, by indentation": ("- " * 100_000, 1, None, "nested too deeply"),
}


class TestMistakes:
    @pytest.mark.parametrize(("text", "line", "key", "words"), MISTAKES.values(), ids=MISTAKES.keys())
    def test_names_file_line_key_and_remedy(
        self, tmp_path: Path, text: str, line: int | None, key: str | None, words: str
    ) -> None:
        path = write(tmp_path, text)
        with pytest.raises(CatalogueError) as caught:
            load_catalogue(path)
        error, message = caught.value, str(caught.value)
        assert (error.path, error.line, error.key) == (path, line, key)
        assert words in message
        assert message.startswith(str(path))
        assert line is None or f"line {line}" in message
        assert key is None or f"{key}: " in message

    def test_not_utf_8(self, tmp_path: Path) -> None:
        with pytest.raises(CatalogueError, match=r"line 2: not UTF-8 text\. Save the file as UTF-8"):
            load_catalogue(write(tmp_path, b"models:\n  a: \xff\n"))

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(CatalogueError, match=r"no such file or directory.*--catalogue"):
            load_catalogue(tmp_path / "none.yaml")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CatalogueError, match="is a directory"):
            load_catalogue(tmp_path)

    def test_huge_file(self, tmp_path: Path) -> None:
        with pytest.raises(CatalogueError, match="larger than 1 MiB"):
            load_catalogue(write(tmp_path, b"#" * (2 << 20)))

    def test_self_reference_ends(self, tmp_path: Path) -> None:
        with pytest.raises(CatalogueError):
            load_catalogue(write(tmp_path, "models: &m\n  a: *m\n"))


# YAML's own punctuation and the catalogue's own words, thrown together: far more often nearly right
# than arbitrary text is.
WORDS = st.sampled_from(
    [
        *"\n:-[]{},&*!|>'\"%@`?# ",
        *("\n  ", "\n    ", ": ", "- ", "<<: ", "---\n", "&a ", "*a", "!!int ", "!!python/object:os.x "),
        *("models:", "default:", "defaults:", "org/model:", "source:", "revision:", "max_model_len:"),
        *("tp_size:", "generation:", "adapters:", "chat_template:", "top_p:", "hf://a/b@c", "s3://b/k"),
        *(
            "true",
            "~",
            "0",
            "-1",
            "1_",
            "4096",
            "1e9",
            ".5",
            ".inf",
            "0x10",
            "9" * 40,
            "{{ x }}",
            "\x00",
            "é",
        ),
    ]
)


class TestArbitraryFiles:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
    @given(
        data=st.one_of(
            st.binary(max_size=200), st.lists(WORDS, max_size=40).map(lambda w: "".join(w).encode())
        )
    )
    def test_load_or_catalogue_error(self, tmp_path: Path, data: bytes) -> None:
        try:
            catalogue = load_catalogue(write(tmp_path, data))
        except CatalogueError:
            return
        assert all(catalogue.resolve(id_).id == id_ for id_ in catalogue.models)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
    @given(
        key=st.sampled_from([field for field in ModelSpec.__struct_fields__ if field != "id"]),
        value=WORDS | st.text(max_size=20) | st.integers().map(str) | st.floats().map(str),
    )
    def test_any_value_of_a_known_key(self, tmp_path: Path, key: str, value: str) -> None:
        source = "" if key == "source" else "\n    source: hf://a/b"
        try:
            spec = load_catalogue(write(tmp_path, f"models:\n  a:\n    {key}: {value}{source}\n")).resolve(
                "a"
            )
        except CatalogueError:
            return
        assert spec.max_model_len is None or spec.max_model_len >= 1
        assert spec.tp_size >= 1
