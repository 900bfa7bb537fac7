"""Flags, environment variables, models.yaml and defaults; help; and what is said about mistakes."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from handler.cli import COMMANDS, main
from handler.commands import serve
from handler.commands.models import fits_gpus, fits_memory
from handler.flags import SERVE_FLAGS, UsageError, with_model
from handler.listen import ListenError, listen, url_of
from handler.settings import ServerSettings, read_others, read_settings
from runtime.catalogue import load_catalogue
from runtime.errors import FirstlightError

ROOT = Path(__file__).parents[2]
CATALOGUE = """
default: small
models:
  small: {source: hf://org/small, max_model_len: 1000, generation: {temperature: 0.5}}
  large: {source: hf://org/large, max_model_len: 4096, tp_size: 4, dtype: bfloat16}
"""


@pytest.fixture
def catalogue(tmp_path: Path) -> str:
    path = tmp_path / "models.yaml"
    path.write_text(CATALOGUE)
    return str(path)


def parsed(line: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    return with_model(vars(parser.parse_args(shlex.split(line))))


def settle(line: str, environ: dict[str, str] | None = None) -> ServerSettings:
    """What `firstlight serve LINE` would serve."""
    return read_settings(parsed(line), environ or {})


def listens_on(line: str, environ: dict[str, str]) -> tuple[str, int]:
    """Where it would listen."""
    return serve.address(parsed(line), environ)


class TestOrder:
    def test_flag_environment_catalogue_default(self, catalogue: str) -> None:
        base = f"--catalogue {catalogue} --model large"
        assert settle(base).engine.max_model_len == 4096
        environ = {"FIRSTLIGHT_MAX_MODEL_LEN": "2048"}
        assert settle(base, environ).engine.max_model_len == 2048
        assert settle(f"{base} --max-model-len 512", environ).engine.max_model_len == 512
        assert settle(base).engine.block_size == 16

    def test_the_catalogues_own_values(self, catalogue: str) -> None:
        engine = settle(f"large --catalogue {catalogue}").engine
        assert (engine.world_size, engine.dtype, engine.model.source) == (4, "bfloat16", "hf://org/large")

    @pytest.mark.parametrize(("line", "environ"), [("--no-cache", {}), ("", {"FIRSTLIGHT_CACHE": "false"})])
    def test_a_cache_in_memory(self, catalogue: str, line: str, environ: dict[str, str]) -> None:
        cache_dir = settle(f"small --catalogue {catalogue} {line}", environ).engine.cache_dir
        assert cache_dir.startswith("/dev/shm/firstlight-")
        with pytest.raises(UsageError, match="--download-dir has no meaning"):
            settle(f"small --catalogue {catalogue} {line} --download-dir /models", environ)

    def test_the_model_from_the_environment(self, catalogue: str) -> None:
        environ = {"FIRSTLIGHT_CATALOGUE": catalogue}
        assert settle("", environ).engine.model.id == "small"
        environ["HF_MODEL_ID"] = "org/third"
        assert settle("", environ).engine.model.id == "org/third"
        environ["MODEL_ID"] = "large"
        assert settle("", environ).engine.model.id == "large"
        environ["FIRSTLIGHT_MODEL"] = "small"
        assert settle("", environ).engine.model.id == "small"
        assert settle("--model large", environ).engine.model.id == "large"

    def test_port_and_host_as_platforms_set_them(self) -> None:
        environ = {"PORT": "8080", "HOST": "0.0.0.0"}
        assert listens_on("", environ) == ("0.0.0.0", 8080)
        assert listens_on("", environ | {"FIRSTLIGHT_PORT": "9"}) == ("0.0.0.0", 9)
        assert listens_on("--port 0 --host ::1", environ) == ("::1", 0)
        assert listens_on("", {}) == ("127.0.0.1", 8000)

    def test_what_kubernetes_says_of_a_service_of_this_name_is_no_flag(self) -> None:
        link = {"FIRSTLIGHT_PORT": "tcp://10.0.0.1:80", "FIRSTLIGHT_SERVICE_HOST": "10.0.0.1"}
        assert listens_on("", link) == ("127.0.0.1", 8000)
        assert listens_on("", link | {"PORT": "8080"}) == ("127.0.0.1", 8080)

    def test_every_flag_has_its_variable(self, catalogue: str) -> None:
        environ = {
            "FIRSTLIGHT_CATALOGUE": catalogue,
            "FIRSTLIGHT_API_KEY": "one, two",
            "FIRSTLIGHT_SERVED_MODEL_NAME": "a,b",
            "FIRSTLIGHT_ENABLE_CHUNKED_PREFILL": "false",
            "FIRSTLIGHT_GPU_MEMORY_UTILIZATION": "0.5",
            "FIRSTLIGHT_DOWNLOAD_DIR": "/somewhere",
        }
        settings = settle("", environ)
        assert settings.api_keys == ("one", "two")
        assert settings.served_model_names == ("a", "b")
        assert settings.engine.enable_chunked_prefill is False
        assert settings.engine.gpu_memory_utilization == 0.5
        assert settings.engine.cache_dir == "/somewhere"

    def test_the_key_of_vllms_environment_locks_the_door_too(self, catalogue: str) -> None:
        environ = {"FIRSTLIGHT_CATALOGUE": catalogue, "VLLM_API_KEY": "theirs"}
        assert settle("", environ).api_keys == ("theirs",)
        assert settle("", environ | {"FIRSTLIGHT_API_KEY": "ours"}).api_keys == ("ours",)

    def test_idleness_is_settled_like_everything_else(self, catalogue: str) -> None:
        with open(catalogue, "a") as file:
            file.write("  idle: {source: hf://org/idle, idle_sleep_s: 60, idle_exit_s: 600}\n")
        line = f"--catalogue {catalogue} --model idle"
        assert (settle(line).idle_sleep_s, settle(line).idle_exit_s) == (60, 600)
        settings = settle(f"{line} --idle-sleep-s 5", {"FIRSTLIGHT_IDLE_EXIT_S": "0"})
        assert (settings.idle_sleep_s, settings.idle_exit_s) == (5, 0)
        assert settle(f"--catalogue {catalogue} --model small --grace 3").idle_sleep_s == 0
        assert settle(f"--catalogue {catalogue} --grace 3").drain_seconds == 3

    def test_further_models_have_their_own_names_and_share_what_is_about_the_server(
        self, catalogue: str
    ) -> None:
        line = f"--catalogue {catalogue} --model large --served-model-name mine --max-num-seqs 7"
        assert read_others(parsed(line), {}) == []
        others = read_others(parsed(f"{line} --models all org/third"), {})
        assert [other.served_model_names for other in others] == [("small",)]
        others = read_others(parsed(line), {"FIRSTLIGHT_MODELS": "small,large,org/third"})
        assert [other.served_model_names for other in others] == [("small",), ("org/third",)]
        assert {(other.engine.max_num_seqs, other.engine.world_size) for other in others} == {(7, 1)}
        with pytest.raises(FirstlightError, match="no model 'smal'"):
            read_others(parsed(f"{line} --models smal"), {})

    def test_adapters_are_refused_until_they_are_served(self, tmp_path: Path) -> None:
        entry = "models: {m: {source: ./m, adapters: {legal: hf://org/legal}}}"
        (tmp_path / "models.yaml").write_text(entry)
        with pytest.raises(FirstlightError, match=r"m: adapters \(legal\) are not supported yet"):
            settle(f"--catalogue {tmp_path}/models.yaml --model m")

    def test_keys_from_a_file(self, catalogue: str, tmp_path: Path) -> None:
        (tmp_path / "keys").write_text("# of the two teams\none\n\ntwo \n")
        line = f"--catalogue {catalogue} --api-key-file {tmp_path}/keys"
        assert settle(line).api_keys == ("one", "two")
        assert settle(f"{line} --api-key three").api_keys == ("three", "one", "two")
        (tmp_path / "keys").write_text("one\ntwo three\n")
        with pytest.raises(FirstlightError, match=r"line 2 of .* holds spaces"):
            settle(line)
        (tmp_path / "keys").write_text("#\n\n")
        for wrong, said in ((line, "holds no key"), (f"{line}2", "keys2"), ("--api-key ''", "is empty")):
            with pytest.raises(FirstlightError, match=said):
                settle(f"--catalogue {catalogue} {wrong}")
        with pytest.raises(FirstlightError, match="is empty"):
            settle(f"--catalogue {catalogue}", {"FIRSTLIGHT_API_KEY": " , "})

    def test_what_is_told_of_requests(self, catalogue: str) -> None:
        line = f"--catalogue {catalogue}"
        assert settle(line).access_log is True
        assert settle(f"{line} --no-access-log").access_log is False
        assert settle(line, {"FIRSTLIGHT_ACCESS_LOG": "false"}).access_log is False
        assert settle(line).otlp_traces_endpoint is None
        url = "http://collector:4318/v1/traces"
        for given, environ in (
            (f"--otlp-traces-endpoint {url}", {}),
            ("", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": url}),
        ):
            assert settle(f"{line} {given}", environ).otlp_traces_endpoint == url

    def test_a_variable_that_makes_no_sense_is_named(self, catalogue: str) -> None:
        with pytest.raises(FirstlightError, match=r"FIRSTLIGHT_PORT.*70000"):
            listens_on("", {"FIRSTLIGHT_PORT": "70000"})
        with pytest.raises(FirstlightError, match=r"FIRSTLIGHT_BLOCK_SIZE.*many"):
            settle("", {"FIRSTLIGHT_BLOCK_SIZE": "many", "FIRSTLIGHT_CATALOGUE": catalogue})


class TestFlagsOfVllm:
    LINE = (
        "--model org/some-model --max-model-len 2048 --trust-remote-code --tensor-parallel-size 4 "
        "--gpu-memory-utilization 0.95 --quantization None --block-size 16 --max-num-batched-tokens 2048 "
        "--enable-chunked-prefill False"
    )

    def test_the_platforms_endpoint_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        settings = settle(self.LINE)
        engine = settings.engine
        assert (engine.model.source, engine.max_model_len, engine.world_size) == (
            "hf://org/some-model",
            2048,
            4,
        )
        assert (engine.gpu_memory_utilization, engine.quantization, engine.block_size) == (0.95, None, 16)
        assert (engine.max_num_batched_tokens, engine.enable_chunked_prefill) == (2048, False)
        assert settings.served_model_names == ("org/some-model",)
        assert "never run" in capsys.readouterr().err

    def test_with_a_chat_template(self, tmp_path: Path) -> None:
        template = tmp_path / "template_baichuan.jinja"
        template.write_text("{{ messages }}")
        assert settle(f"{self.LINE} --chat-template {template}").chat_template == "{{ messages }}"
        with pytest.raises(FirstlightError, match=r"absent\.jinja"):
            settle(f"{self.LINE} --chat-template {tmp_path}/absent.jinja")

    @pytest.mark.parametrize(
        ("text", "tokens"), [("4096", 4096), ("4k", 4000), ("4K", 4096), ("25.6k", 25_600), ("1m", 1_000_000)]
    )
    def test_lengths(self, catalogue: str, text: str, tokens: int) -> None:
        assert settle(f"--catalogue {catalogue} --max-model-len {text}").engine.max_model_len == tokens

    def test_allowed_origins(self, catalogue: str) -> None:
        base = f"--catalogue {catalogue}"
        assert settle(base).allowed_origins == ()
        line = """--allowed-origins '["http://a:1", "https://b"]' https://c"""
        assert settle(f"{base} {line}").allowed_origins == ("http://a:1", "https://b", "https://c")
        assert settle(f"""{base} --allowed-origins '["*"]'""").allowed_origins == ("*",)

    @pytest.mark.parametrize(("flag", "dtype"), [("half", "float16"), ("float", "float32"), ("auto", "auto")])
    def test_dtypes(self, catalogue: str, flag: str, dtype: str) -> None:
        assert settle(f"--catalogue {catalogue} --dtype {flag}").engine.dtype == dtype

    def test_switches(self, catalogue: str) -> None:
        base = f"--catalogue {catalogue}"
        assert settle(f"{base} --enable-chunked-prefill").engine.enable_chunked_prefill is True
        assert settle(f"{base} --no-enable-prefix-caching").engine.enable_prefix_caching is False

    def test_a_model_path_is_also_the_models_name(self, tiny_model: Path) -> None:
        assert settle(f"--model {tiny_model}").served_model_names[0] == str(tiny_model)


class TestMistakes:
    def fails(self, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
        try:
            status = main(argv)
        except SystemExit as leave:
            status = int(str(leave.code))
        assert status in (1, 2)
        return capsys.readouterr().err

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["serve", "--lora-modules", "a=b"], "--lora-modules is a flag of vLLM's"),
            (["serve", "--speculative_config", "{}"], "--speculative-config is a flag of vLLM's"),
            (["serve", "--max-modle-len", "5"], "did you mean --max-model-len?"),
            (["serve", "--zzz"], "there is no flag --zzz"),
            (["serve", "one", "two"], "'two' is one word too many"),
            (["serve", "one", "--model", "two"], "two models are named"),
            (["serve", "--port", "eighty"], "'eighty' is not a whole number"),
            (["serve", "--port", "65536"], "between 0 (any free port) and 65535"),
            (["serve", "--max-model-len", "0"], "not a whole number above zero"),
            (["serve", "--gpu-memory-utilization", "1.5"], "between 0 and 1"),
            (["serve", "--dtype", "int3"], "'int3' is not one of auto"),
            (["serve", "--enable-chunked-prefill", "maybe"], "neither true nor false"),
            (["serve", "--catalogue", "/nowhere/models.yaml"], "/nowhere/models.yaml"),
            (["serve", "smolm"], "smolm"),
            (["--model", "smolm"], "smolm"),
            (["generate", "--raw", "--system", "s", "p"], "--system needs the chat template"),
            (["dance"], "dance"),
        ],
    )
    def test_each_is_told_in_its_own_words(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        argv: list[str],
        said: str,
    ) -> None:
        monkeypatch.setenv("FIRSTLIGHT_PORT", "0")  # whoever listens on the usual one is not disturbed
        assert said in self.fails(capsys, *argv)

    def test_a_port_that_is_taken(self, capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
        with listen("127.0.0.1", 0) as taken:
            port = str(taken.getsockname()[1])
            said = self.fails(capsys, "serve", "--model", str(tiny_model), "--port", port)
        assert f"port {port}" in said
        assert "Address already in use" in said

    def test_a_host_that_does_not_exist(self) -> None:
        with pytest.raises(ListenError, match=r"no\.such\.host\.invalid"):
            listen("no.such.host.invalid", 0)


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_explains_itself(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as leave:
            main([command, "--help"])
        assert leave.value.code == 0
        text = capsys.readouterr().out
        assert f"firstlight {command}" in text
        assert len(text.splitlines()) > 5

    def test_serve_shows_every_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["serve", "--help"])
        shown = set(re.findall(r"--([a-z-]+)", capsys.readouterr().out))
        assert {flag.name for flag in SERVE_FLAGS} <= shown

    def test_without_a_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 2
        text = capsys.readouterr().out
        assert all(command in text for command in COMMANDS)


class TestModelsAndPull:
    def test_models(self, catalogue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["models", "--catalogue", catalogue, "--download-dir", str(tmp_path)]) == 0
        header, *rows = capsys.readouterr().out.splitlines()
        assert header.split() == ["MODEL", "LENGTH", "GPUS", "FITS", "CACHED", "SOURCE"]
        assert [row.split() for row in rows] == [
            ["*", "small", "1000", "1", "?", "no", "hf://org/small"],
            ["large", "4096", "4", "?", "no", "hf://org/large"],
        ]

    @pytest.mark.parametrize(
        ("model", "gpus", "says"),
        [
            ("Meta-Llama-3-8B-Instruct", [24], "yes"),
            ("Meta-Llama-3-8B-Instruct", [16], "no: 20 GB a GPU, here 14"),
            ("Meta-Llama-3-70B-Instruct", [80] * 4, "yes"),
            ("Meta-Llama-3-70B-Instruct", [40] * 4, "no: 38 GB a GPU, here 36"),
            ("Meta-Llama-3-70B-Instruct", [80] * 2, "no: 4 GPUs with 38 GB, here 2"),
            ("gemma-2-27b-it", [141], "with --tensor-parallel-size 1"),
            ("Qwen2.5-32B-Instruct-GPTQ-Int4", [48], "yes"),
        ],
    )
    def test_what_fits_on_gpus_and_why_not(self, model: str, gpus: list[int], says: str) -> None:
        spec = load_catalogue(ROOT / "models.yaml").resolve(model)
        assert fits_gpus(spec, [size * 10**9 for size in gpus]) == says

    def test_what_fits_into_memory(self) -> None:
        # Quantised weights become floating point on a CPU.
        spec = load_catalogue(ROOT / "models.yaml").resolve("Qwen2.5-32B-Instruct-GPTQ-Int4")
        assert fits_memory(spec, 96 * 10**9) == "no: 83 GB of memory, here 77"
        assert fits_memory(spec, 128 * 10**9) == "yes"

    def test_a_reader_that_has_enough_ends_the_command_quietly(self, catalogue: str) -> None:
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "handler", "models", "--catalogue", catalogue]
        done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")

    def test_pull_prints_the_folder(
        self, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pull", str(tiny_model), "--download-dir", str(tmp_path)]) == 0
        assert Path(capsys.readouterr().out.strip()) == tiny_model


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


class TestImports:
    HEAVY = {"torch", "transformers", "triton", "tokenizers", "jinja2", "boto3", "huggingface_hub", "numpy"}

    def test_before_the_socket_listens_nothing_heavy_is_imported(self) -> None:
        loaded = modules_after("import handler.cli, handler.commands.serve")
        assert loaded.isdisjoint(self.HEAVY | {"starlette", "uvicorn", "pydantic", "prometheus_client"})
        assert loaded.isdisjoint({"asyncio", "msgspec", "yaml", "http.client"})

    def test_the_whole_server_needs_no_torch(self) -> None:
        loaded = modules_after("import handler.server, handler.platforms.function_url")
        assert loaded.isdisjoint({"torch", "transformers", "triton", "prometheus_client", "numpy", "boto3"})

    def test_the_lambda_entry_imports_nothing_beforehand(self) -> None:
        loaded = modules_after("from handler import lambda_handler")
        assert loaded.isdisjoint(self.HEAVY | {"starlette", "pydantic", "runtime"})


def test_addresses_are_shown_as_browsers_take_them() -> None:
    with listen("0.0.0.0", 0) as sock:
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", url_of(sock))
