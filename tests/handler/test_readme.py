"""What the README shows is true: its commands parse, its examples run, its names exist."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from handler.cli import COMMANDS, main
from handler.flags import ANSWER_FLAGS, SERVE_FLAGS, collect, with_model
from handler.settings import model_spec
from runtime.catalogue import ModelSpec, load_catalogue
from tests.handler.conftest import Server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
VARIABLES = {"MODEL": DEFAULT, "MODEL_MAX_LEN": "2048", "TP_SIZE": "1"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def command_lines() -> Iterator[list[str]]:
    """The arguments of each `firstlight …`, `scripts/serve …` and `python -m handler …` that is shown."""
    for line in re.findall(
        r"^.*(?:firstlight|scripts/serve|handler) .*$", "".join(blocks("sh")), re.MULTILINE
    ):
        words = shlex.split(string.Template(line).safe_substitute(VARIABLES), comments=True)
        if "|" in words:
            words = words[words.index("|") + 1 :]
        match words:
            case ["firstlight", *rest] | ["python", "-m", "handler", *rest]:
                yield rest
            case ["scripts/serve", *rest]:
                yield ["serve", *rest]


def python_block(of: str) -> str:
    [found] = [block for block in blocks("python") if of in block]
    return found


class TestCommands:
    @pytest.mark.parametrize("argv", list(command_lines()), ids=" ".join)
    def test_a_command_is_understood_and_names_a_model_that_can_be(
        self, argv: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        understood: list[dict[str, Any]] = []

        def run(given: dict[str, Any]) -> int:
            understood.append(given)
            return 0

        for command in COMMANDS:
            monkeypatch.setattr(importlib.import_module(f"handler.commands.{command}"), "run", run)
        assert main(argv) == 0
        monkeypatch.chdir(tmp_path)
        given = with_model(understood[0])
        assert model_spec(collect(given, SERVE_FLAGS, {})).source

    def test_there_are_some_of_every_kind(self) -> None:
        assert {argv[0] for argv in command_lines()} >= COMMANDS.keys()

    def test_every_flag_exists(self) -> None:
        lines = [line for line in README.splitlines() if not line.startswith(("docker", "curl"))]
        shown = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", "\n".join(lines)))
        known = {flag.name for flag in (*SERVE_FLAGS, *ANSWER_FLAGS)} | {"help", "system", "raw"}
        known |= {f"no-{flag.name}" for flag in SERVE_FLAGS if flag.either}
        assert shown - known == set()
        assert len(shown) > 10

    def test_every_variable_is_read(self) -> None:
        shown = set(re.findall(r"FIRSTLIGHT_[A-Z0-9_]+", README))
        sources = [file.read_text() for top in ("handler", "runtime") for file in (ROOT / top).rglob("*.py")]
        flags = {flag.variables[0] for flag in SERVE_FLAGS}
        assert {name for name in shown - flags if not any(f'"{name}"' in text for text in sources)} == set()
        assert len(shown) > 3


class TestCatalogue:
    def test_the_example_is_valid_and_shows_every_key(self, tmp_path: Path) -> None:
        [text] = blocks("yaml")
        file = tmp_path / "models.yaml"
        file.write_text(text)
        catalogue = load_catalogue(file)
        assert catalogue.default == "my-assistant"
        assert catalogue.models["in-a-bucket"].max_model_len == catalogue.defaults["max_model_len"]
        shown = set(re.findall(r"^    (\w+):", text, re.MULTILINE))
        assert shown == set(ModelSpec.__struct_fields__) - {"id"}

    def test_the_default_model_is_the_one_that_is_named(self) -> None:
        catalogue = load_catalogue(ROOT / "models.yaml")
        assert catalogue.default == DEFAULT
        assert DEFAULT in README


class TestRequests:
    @pytest.fixture
    def server(self, make_server: Callable[..., Server]) -> Server:
        return make_server(served_model_names=(DEFAULT,))

    def test_each_curl_request_is_answered(self, server: Server) -> None:
        requests = re.findall(r"^curl .*?(/v1/\S+) .*?-d '(.*?)'$", README, re.MULTILINE | re.DOTALL)
        assert len(requests) == README.count("\ncurl ")
        for path, body in requests:
            assert server.post(path, json.loads(body)).status == 200

    def test_the_openai_client(self, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
        exec(python_block("import OpenAI").replace("http://127.0.0.1:8000", server.url), {})
        assert capsys.readouterr().out == "Hello there, friend."

    def test_the_routes_are_those_that_there_are(self, server: Server) -> None:
        table = README.partition("## The API")[2].partition("\n\nRequests")[0]
        shown = {tuple(route.split()) for route in re.findall(r"`((?:GET|POST) /[^`]*)`", table)}
        for method, path in shown:
            reply = server.request(method, path.replace("{id}", DEFAULT), b"{}")
            assert reply.status in (200, 400), path
        from handler.app import create_app

        app = create_app(server.engine, server.settings)  # type: ignore[arg-type]
        served = {route.path.replace(":path", "") for route in app.routes}  # type: ignore[attr-defined]
        assert {path for path in served if not path.startswith("/ui/")} == {path for _, path in shown}

    def test_the_metrics_exist(self, server: Server) -> None:
        names = set(re.findall(r"`((?:firstlight_|vllm:)[a-z_0-9]+)`", README))
        assert len(names) > 5
        text = server.get("/metrics").body.decode()
        assert {name for name in names if not re.search(rf"^(# TYPE )?{name}\b", text, re.MULTILINE)} == set()


class TestPython:
    def test_the_function(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        events: list[Any] = []
        monkeypatch.setattr("handler.platforms.function_url.handle", lambda event, _: events.append(event))
        exec(python_block("lambda_handler"), {})
        assert events[0]["messages"][0]["role"] == "user"
        assert capsys.readouterr().out == "None\n"

    def test_the_python_api(
        self, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = python_block("import LLM").replace(f'"{DEFAULT}"', repr(str(tiny_model)))
        exec(code, {"__name__": "__main__"})
        assert "num_generated_tokens" in capsys.readouterr().out


class TestLinks:
    def test_each_leads_to_a_heading(self) -> None:
        headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert set(re.findall(r"\]\(#([^)]*)\)", README)) <= anchors

    def test_every_file_that_is_named_is_there(self) -> None:
        names = re.findall(r"`((?:scripts|tests|handler|runtime|\.ci)/[\w./-]*)", README)
        assert names
        assert [name for name in names if not (ROOT / name).exists()] == []
