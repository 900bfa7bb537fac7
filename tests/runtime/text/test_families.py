"""What models that bring no chat template are told, against what each family's own code builds of ids."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from sentencepiece import SentencePieceProcessor

from runtime.errors import RequestError
from runtime.text.chat import encode_chat, turn_end
from runtime.text.model_text import TextFiles
from runtime.text.template import ChatTemplate, ChatTemplateError, read_template
from runtime.text.tokenizer import Tokenizer
from tests.runtime.text.templates import TEMPLATES, TOOLS, turns
from tests.runtime.text.test_tiktoken import QWEN_SPECIAL, reference
from tests.runtime.text.texts import ORDINARY, TEXTS
from tests.runtime.text.vocabularies import QWEN_PATTERN, VOCABULARIES, llama2, qwen, write

FAMILIES = ["qwen", "baichuan", "baichuan2", "internlm2", "chatglm3", "llama2"]
Builder = Callable[[Path, str | None, list[str]], list[int]]


@pytest.fixture(scope="module")
def files(family_folders: dict[str, Path]) -> dict[str, TextFiles]:
    return {name: TextFiles.read(folder) for name, folder in family_folders.items()}


def pieces(folder: Path) -> Any:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


# ---- each family's own code, in its own words: a system text (or None), then contents by turns ---------


def qwen_ids(folder: Path, system: str | None, contents: list[str]) -> list[int]:
    codec = reference(folder / "qwen.tiktoken", QWEN_PATTERN, QWEN_SPECIAL)
    start, end = codec.encode_single_token("<|im_start|>"), codec.encode_single_token("<|im_end|>")
    newline = codec.encode("\n")

    def turn(role: str, content: str) -> list[int]:
        content = unicodedata.normalize("NFC", content)
        return [start, *codec.encode(role), *newline, *codec.encode_ordinary(content), end, *newline]

    ids = turn("system", "You are a helpful assistant." if system is None else system)
    for place, content in enumerate(contents):
        ids += turn(("user", "assistant")[place % 2], content)
    return [*ids, start, *codec.encode("assistant"), *newline]


def baichuan_ids(folder: Path, system: str | None, contents: list[str]) -> list[int]:
    codec = pieces(folder)
    ids = codec.encode(system or "")
    for place, content in enumerate(contents):
        ids += [(3, 4)[place % 2], *codec.encode(content)]
        if place % 2 and codec.id_to_piece(3) == "<reserved_102>":
            ids.append(2)
    return [*ids, 4]


def internlm2_ids(folder: Path, system: str | None, contents: list[str]) -> list[int]:
    codec = pieces(folder)
    ids = [1] if system is None else [1, 4, *codec.encode(f"system\n{system}"), 3, *codec.encode("\n")]
    for place, content in enumerate(contents):
        role = ("user", "assistant")[place % 2]
        ids += [4, *codec.encode(f"{role}\n{content}"), 3, *codec.encode("\n")]
    return [*ids, 4, *codec.encode("assistant\n")]


def chatglm3_ids(folder: Path, system: str | None, contents: list[str]) -> list[int]:
    codec = pieces(folder)
    first = codec.vocab_size()

    def turn(role: int, content: str) -> list[int]:
        return [first + role, *codec.encode("\n"), *codec.encode(content)]

    ids = [first + 1, first + 3] + ([] if system is None else turn(5, system))
    for place, content in enumerate(contents):
        ids += turn((6, 7)[place % 2], content)
    return [*ids, first + 7]


def llama2_ids(folder: Path, system: str | None, contents: list[str]) -> list[int]:
    codec = pieces(folder)
    if system is not None:
        contents = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{contents[0]}", *contents[1:]]
    contents = [content.strip() for content in contents]
    ids = []
    for place in range(0, len(contents) - 1, 2):
        ids += [1, *codec.encode(f"[INST] {contents[place]} [/INST] {contents[place + 1]} "), 2]
    return [*ids, 1, *codec.encode(f"[INST] {contents[-1]} [/INST]")]


BUILDERS: dict[str, Builder] = {
    "qwen": qwen_ids,
    "baichuan": baichuan_ids,
    "baichuan2": baichuan_ids,
    "internlm2": internlm2_ids,
    "chatglm3": chatglm3_ids,
    "llama2": llama2_ids,
}


def ours(files: TextFiles, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    assert files.template is not None
    return encode_chat(files.tokenizer, files.template, messages, **options)


def with_system(system: str | None, contents: list[str]) -> list[dict[str, Any]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *turns(*contents)]


@pytest.mark.parametrize("family", FAMILIES)
class TestOwnTemplates:
    @pytest.mark.parametrize("text", ORDINARY)
    def test_ids_are_those_of_the_familys_code(
        self, files: dict[str, TextFiles], family_folders: dict[str, Path], family: str, text: str
    ) -> None:
        for system in (None, "You are brief."):
            for contents in ([text], [text, "It is " + text, "\n" + text]):
                expected = BUILDERS[family](family_folders[family], system, contents)
                assert ours(files[family], with_system(system, contents)) == expected

    @settings(max_examples=40, deadline=None)
    @given(text=TEXTS)
    def test_nothing_that_is_typed_is_structure(
        self, files: dict[str, TextFiles], family: str, text: str
    ) -> None:
        read = files[family]
        typed = text + "".join(sorted(read.tokenizer.special_tokens.values())) + "[gMASK]sop<|user|>"
        honest = [
            i for i in ours(read, with_system("Hi", ["Hi", "Ho", "Hi"])) if i in read.tokenizer.special_ids
        ]
        ids = ours(read, with_system(typed, [typed, typed, typed]))
        assert [i for i in ids if i in read.tokenizer.special_ids] == honest

    def test_the_answer_can_be_continued(self, files: dict[str, TextFiles], family: str) -> None:
        read = files[family]
        whole = ours(read, turns("Hi", "The answer"), continue_final_message=True)
        assert read.tokenizer.decode(whole).endswith("The answer")
        assert whole[-1] not in read.tokenizer.special_ids

    def test_roles_that_do_not_exist_are_refused(self, files: dict[str, TextFiles], family: str) -> None:
        with pytest.raises(RequestError, match="refuses these messages"):
            ours(files[family], [{"role": "critic", "content": "Hi"}])


class TestChatGlm3Tools:
    def test_tools_calls_and_results(
        self, files: dict[str, TextFiles], family_folders: dict[str, Path]
    ) -> None:
        call = {"name": "weather", "arguments": {"city": "Zü'rich", "days": [1, 2], "wind": True}}
        messages: list[dict[str, Any]] = [
            *turns("Weather?"),
            {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
            {"role": "tool", "content": "sunny"},
        ]
        ids = ours(files["chatglm3"], messages, tools=TOOLS)
        codec = pieces(family_folders["chatglm3"])
        first = codec.vocab_size()
        functions = [tool["function"] for tool in TOOLS]
        told = "Answer the following questions as best as you can. You have access to the following tools:\n"
        told += json.dumps(functions, indent=4, ensure_ascii=False)
        system = [first + 1, first + 3, first + 5, *codec.encode("\n"), *codec.encode(told)]
        assert ids[: len(system)] == system
        assert ids[-1] == first + 7
        result = [first + 8, *codec.encode("\n"), *codec.encode("sunny"), first + 7]
        assert ids[-len(result) :] == result
        begin = ids.index(first + 7)
        written = files["chatglm3"].tokenizer.decode(ids[begin : -len(result)])
        assert written.split()[0] == "weather"
        code = re.search(r"tool_call\(.*\)", written)
        assert code is not None
        parsed = ast.parse(code[0], mode="eval").body
        assert isinstance(parsed, ast.Call)
        assert {item.arg: ast.literal_eval(item.value) for item in parsed.keywords} == call["arguments"]

    def test_tools_join_the_system_message(self, files: dict[str, TextFiles]) -> None:
        messages = [{"role": "system", "content": "Be brief."}, *turns("Weather?")]
        ids = ours(files["chatglm3"], messages, tools=TOOLS)
        text = files["chatglm3"].tokenizer.decode(ids)
        assert "Be brief. [" in text
        assert "Answer the following" not in text


class TestStops:
    def test_from_files_family_and_template(self, files: dict[str, TextFiles]) -> None:
        glm = files["chatglm3"].tokenizer.vocab_size - 9
        id_of = files["qwen"].tokenizer.id_of
        expected = {
            "qwen": {id_of("<|endoftext|>"), id_of("<|im_start|>"), id_of("<|im_end|>")},
            "baichuan": {2},
            "baichuan2": {2, 3},
            "internlm2": {2, 3},
            "chatglm3": {2, glm + 6, glm + 8},
            "llama2": {2},
        }
        for family, ids in expected.items():
            assert set(files[family].with_limits(64, 1 << 17).eos_token_ids) == ids

    @pytest.mark.parametrize(
        ("name", "end"), {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}.items()
    )
    def test_the_template_shows_the_end_of_a_turn(
        self, folders: dict[str, Path], name: str, end: str
    ) -> None:
        source, kind = TEMPLATES[name]
        tokenizer = Tokenizer.load(folders[kind])
        template = ChatTemplate(source, special_tokens=tokenizer.special_tokens)
        assert turn_end(tokenizer, template) == tokenizer.id_of(end)

    def test_a_template_without_an_end_has_none(self, folders: dict[str, Path]) -> None:
        tokenizer = Tokenizer.load(folders["chatml"])
        plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}<|im_start|>"
        for source in (plain, "{{ raise_exception('no') }}", "{{ messages[0].content }}"):
            assert turn_end(tokenizer, ChatTemplate(source)) is None

    def test_the_templates_stop_is_the_models(self, folders: dict[str, Path], tmp_path: Path) -> None:
        # Early Llama 3 repositories name the end of the text only.
        backend = (folders["llama3"] / "tokenizer.json").read_bytes()
        config = {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"}
        config["chat_template"] = TEMPLATES["llama3"][0]
        read = TextFiles.read(write({"tokenizer.json": backend, "tokenizer_config.json": config}, tmp_path))
        ends = {read.tokenizer.id_of("<|end_of_text|>"), read.tokenizer.id_of("<|eot_id|>")}
        assert set(read.with_limits(64, 1 << 17).eos_token_ids) == ends


class TestDefaults:
    def test_sampling_settings_only(self, files: dict[str, TextFiles]) -> None:
        assert files["qwen"].generation == {"top_k": 0, "top_p": 0.8, "repetition_penalty": 1.1}
        assert files["baichuan2"].generation == {"temperature": 0.3, "top_k": 5, "top_p": 0.85}

    def test_what_no_sampler_can_use_is_left_out(self, tmp_path: Path) -> None:
        odd = {"temperature": -1, "top_k": 50.0, "top_p": True, "min_p": "0.1", "seed": 1.5}
        read = TextFiles.read(write(qwen() | {"generation_config.json": odd}, tmp_path))
        assert read.generation == {"top_k": 50}


class TestWhichTemplate:
    @pytest.mark.parametrize("family", ["qwen", "baichuan2", "llama2"])
    def test_base_models_have_none(self, tmp_path: Path, family: str) -> None:
        content = VOCABULARIES[family]()
        if family == "qwen":
            content["generation_config.json"]["chat_format"] = "raw"
        if family == "baichuan2":
            del content["generation_config.json"]
        if family == "llama2":
            content["config.json"]["_name_or_path"] = "meta-llama/Llama-2-7b-hf"
        assert TextFiles.read(write(content, tmp_path)).template is None

    def test_the_models_own_is_preferred(self, tmp_path: Path) -> None:
        content = llama2() | {"chat_template.jinja": b"own {{ messages[0].content }}"}
        read = TextFiles.read(write(content, tmp_path))
        assert read.template is not None
        assert read.template.render(turns("Hi")) == "own Hi"
        given = TextFiles.read(tmp_path, "given")
        assert given.template is not None
        assert given.template.render(turns("Hi")) == "given"

    def test_by_name(self) -> None:
        assert "user_token" in read_template("baichuan")
        assert read_template("/app/vllm/examples/template_baichuan.jinja") == read_template("baichuan")
        for name in ("nothing", "/app/baichuan.jinja", "templates/template_nothing.jinja"):
            with pytest.raises(ChatTemplateError, match="cannot read the chat template"):
                read_template(name)

    def test_a_file_beats_a_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "qwen").write_text("mine")
        assert read_template("qwen") == "mine"

    def test_roles_that_a_model_does_not_name(self, files: dict[str, TextFiles]) -> None:
        template = ChatTemplate(read_template("baichuan"))
        with pytest.raises(RequestError, match="user_token_id"):
            encode_chat(files["llama2"].tokenizer, template, turns("Hi"))


def test_gemma_refuses_a_system_message_in_its_templates_words(files: dict[str, TextFiles]) -> None:
    template = ChatTemplate(TEMPLATES["gemma"][0], special_tokens=files["gemma2"].tokenizer.special_tokens)
    with pytest.raises(RequestError, match="System role not supported") as caught:
        encode_chat(files["gemma2"].tokenizer, template, with_system("Be brief.", ["Hi"]))
    assert caught.value.param == "messages"
    assert turn_end(files["gemma2"].tokenizer, template) == files["gemma2"].tokenizer.id_of("<end_of_turn>")
