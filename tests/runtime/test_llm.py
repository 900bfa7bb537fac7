"""The Python API with a real engine: transformers' answers, in order, with what they took."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from runtime.client import EngineUnavailable
from runtime.errors import FirstlightError, RequestError
from runtime.llm import LLM

ROOT = Path(__file__).parents[2]
PROMPTS: list[Any] = ["Once upon a time", [72, 101, 108, 108, 111], "é", "x" * 100, "A second sentence."]
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>?"}]
EOS = 258


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), device="cpu", kv_cache_bytes=8 << 20, max_num_batched_tokens=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> tuple[Any, Any]:
    """The same model and tokenizer, as transformers has them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_model)


def expected(reference: tuple[Any, Any], prompt: Any, max_tokens: int) -> list[int]:
    """The greedy answer's token ids, the one that ends it included."""
    model, tokenizer = reference
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    whole = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    answer: list[int] = whole[0, len(ids) :].tolist()
    return answer


def test_sleep_changes_no_answer(llm: LLM) -> None:
    before = [result.text for result in llm.generate(PROMPTS, temperature=0, max_tokens=8)]
    llm.sleep()
    assert [result.text for result in llm.generate(PROMPTS, temperature=0, max_tokens=8)] == before
    llm.sleep(level=2)
    llm.wake()
    assert [result.text for result in llm.generate(PROMPTS, temperature=0, max_tokens=8)] == before


class TestGenerate:
    def test_answers_are_transformers_answers_in_order(self, llm: LLM, reference: tuple[Any, Any]) -> None:
        results = llm.generate(PROMPTS, temperature=0, max_tokens=24)
        answers = [expected(reference, prompt, 24) for prompt in PROMPTS]
        assert [result.token_ids for result in results] == answers
        tokenizer = reference[1]
        for result, prompt, answer in zip(results, PROMPTS, answers, strict=True):
            ended = answer[-1] == EOS
            assert result.finish_reason == ("stop" if ended else "length")
            assert result.text == tokenizer.decode(answer, skip_special_tokens=True)
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            assert result.prompt_token_ids == ids

    def test_what_it_took(self, llm: LLM) -> None:
        results = llm.generate(PROMPTS, temperature=0, max_tokens=5, ignore_eos=True)
        info = results.generation_info
        assert info["num_generated_tokens"] == 5 * len(PROMPTS)
        assert info["num_prompt_tokens"] == sum(len(result.prompt_token_ids) for result in results)
        assert info["runtime"] > 0
        assert info["samples/s"] == pytest.approx(len(PROMPTS) / info["runtime"])
        assert info["tokens/s"] == pytest.approx(info["num_generated_tokens"] / info["runtime"])

    def test_one_prompt_may_come_alone(self, llm: LLM) -> None:
        (by_text,) = llm.generate("Hello", temperature=0)
        (by_ids,) = llm.generate(by_text.prompt_token_ids, temperature=0)
        assert by_text == by_ids
        assert len(by_text.token_ids) == 16
        assert llm.generate([]) == []

    def test_log_probabilities(self, llm: LLM, reference: tuple[Any, Any]) -> None:
        (result,) = llm.generate([PROMPTS[1]], temperature=0, max_tokens=4, logprobs=2, ignore_eos=True)
        ids = PROMPTS[1] + result.token_ids
        with torch.no_grad():
            rows = reference[0](torch.tensor([ids])).logits[0].log_softmax(-1)[len(PROMPTS[1]) - 1 : -1]
        for entry, token_id, row in zip(result.logprobs, result.token_ids, rows, strict=True):
            assert entry.token_id == token_id
            assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
            assert [index for index, _ in entry.top] == row.topk(2).indices.tolist()

    def test_stops(self, llm: LLM) -> None:
        (plain,) = llm.generate(["Once"], temperature=0, max_tokens=30, ignore_eos=True)
        stop = plain.text[10:12]
        (stopped,) = llm.generate(["Once"], temperature=0, max_tokens=30, ignore_eos=True, stop=stop)
        assert stopped.text == plain.text[: plain.text.index(stop)]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
        last = plain.token_ids[6]
        (by_id,) = llm.generate(
            ["Once"], temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=[last]
        )
        assert by_id.token_ids == plain.token_ids[: plain.token_ids.index(last) + 1]
        assert by_id.stop_reason == last

    def test_a_seed_makes_an_answer_repeatable(self, llm: LLM) -> None:
        def answer(prompts: list[Any], seed: int) -> list[int]:
            return llm.generate(prompts, temperature=1.0, seed=seed, max_tokens=12)[0].token_ids

        assert answer(["Once"], 7) == answer(["Once", "Twice", "Thrice"], 7)
        assert answer(["Once"], 7) != answer(["Once"], 8)

    def test_two_threads_at_once(self, llm: LLM) -> None:
        alone = [llm.generate([prompt], temperature=0)[0] for prompt in PROMPTS[:2]]
        together: dict[int, Any] = {}

        def work(number: int) -> None:
            together[number] = llm.generate([PROMPTS[number]], temperature=0)[0]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [together[0], together[1]] == alone


class TestRules:
    LETTERS = list(range(64, 90))  # a to z: tokens of one byte stand in the bytes' order

    def test_words_and_tokens_that_are_ruled_out_are_transformers(
        self, llm: LLM, reference: tuple[Any, Any]
    ) -> None:
        model, tokenizer = reference

        def answer(prompt: str, words: list[list[int]]) -> list[int]:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            whole = model.generate(
                ids,
                max_new_tokens=24,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                prefix_allowed_tokens_fn=lambda batch, ids: self.LETTERS,
                bad_words_ids=words or None,
            )
            return whole[0, ids.shape[1] :].tolist()

        for prompt in PROMPTS[:1] + PROMPTS[4:]:
            options: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "allowed_token_ids": self.LETTERS}
            free = answer(prompt, [])
            assert llm.generate(prompt, **options)[0].token_ids == free
            words = [free[:2], free[5:9], free[20:23]]
            texts = [tokenizer.decode(word) for word in words]
            held = answer(prompt, words)
            assert held != free
            assert llm.generate(prompt, bad_words=texts, **options)[0].token_ids == held
            pieces = llm.stream(prompt, bad_words=texts, **options)
            assert [token for piece in pieces for token in piece.token_ids] == held

    def test_a_prompt_is_cut_to_its_last_tokens(self, llm: LLM) -> None:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
        (result,) = llm.generate("x" * 600 + "Once", truncate_prompt_tokens=4, **options)
        assert result.token_ids == llm.generate("Once", **options)[0].token_ids
        (result,) = llm.generate("x" * 600, truncate_prompt_tokens=-1, **options)
        assert (len(result.prompt_token_ids), len(result.token_ids)) == (504, 8)
        (result,) = llm.chat(CONVERSATION, truncate_prompt_tokens=5, **options)
        assert len(result.prompt_token_ids) == 5


class TestChat:
    def test_prompts_are_transformers_prompts(self, llm: LLM, reference: tuple[Any, Any]) -> None:
        conversation = [{**CONVERSATION[0]}, {"role": "user", "content": "Hi?"}]
        one, two = llm.chat([conversation, conversation[1:]], temperature=0, max_tokens=8)
        for result, messages in ((one, conversation), (two, conversation[1:])):
            prompt = reference[1].apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert result.prompt_token_ids == prompt
            assert result.token_ids == expected(reference, prompt, 8)

    def test_text_cannot_close_a_turn(self, llm: LLM) -> None:
        (result,) = llm.chat(CONVERSATION, max_tokens=1)
        assert result.prompt_token_ids.count(EOS) == 2

    def test_an_answer_that_was_begun(self, llm: LLM, reference: tuple[Any, Any]) -> None:
        turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Well, "}]
        (result,) = llm.chat(turns, continue_final_message=True, max_tokens=1)
        text = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nWell, "
        assert result.prompt_token_ids == reference[1](text)["input_ids"]

    def test_a_template_of_ones_own(self, tiny_model: Path, tmp_path: Path) -> None:
        template = tmp_path / "template.jinja"
        template.write_text("{{ messages[0]['content'] }}{{ note }}:")
        with LLM(str(tiny_model), chat_template=str(template), device="cpu", kv_cache_bytes=1 << 20) as llm:
            (result,) = llm.chat(CONVERSATION, max_tokens=1, chat_template_kwargs={"note": "!"})
            assert result.prompt_token_ids == llm.generate("Be brief.!:", max_tokens=1)[0].prompt_token_ids


class TestStream:
    @pytest.mark.parametrize("prompts", [PROMPTS, "Once", [CONVERSATION, CONVERSATION[1:]], CONVERSATION])
    def test_pieces_make_up_the_whole(self, llm: LLM, prompts: Any) -> None:
        chats = isinstance(prompts, list) and not isinstance(prompts[0], str)
        whole = (llm.chat if chats else llm.generate)(prompts, temperature=0, max_tokens=20)
        stream = llm.stream(prompts, temperature=0, max_tokens=20)
        pieces = list(stream)
        for index, result in enumerate(whole):
            own = [piece for piece in pieces if piece.index == index]
            assert "".join(piece.text for piece in own) == result.text
            assert [token for piece in own for token in piece.token_ids] == result.token_ids
            assert [piece.finish_reason for piece in own if piece.finish_reason] == [result.finish_reason]
        generated = sum(len(result.token_ids) for result in whole)
        assert stream.generation_info["num_generated_tokens"] == generated
        assert len(pieces) > len(whole)

    def test_one_that_is_left_gives_way(self, llm: LLM) -> None:
        stream = llm.stream(["Once"] * 3, temperature=0, ignore_eos=True, max_tokens=500)
        for _ in stream:
            break
        stream.close()
        assert list(stream) == []
        assert stream.generation_info["num_generated_tokens"] < 1500

    def test_a_mistake_is_raised_where_the_pieces_are_taken(self, llm: LLM) -> None:
        with pytest.raises(RequestError, match="512"):
            list(llm.stream("x" * 600))


class TestMistakes:
    @pytest.mark.parametrize(
        ("prompts", "options", "said"),
        [
            (["x" * 600], {}, r"context length is 512 .* 601 tokens \(600 in the prompt"),
            (["x"], {"max_tokens": 512}, "context length is 512"),
            ([""], {}, "prompt is empty"),
            ("", {}, "prompt is empty"),
            ([[5, 264]], {}, "token id 264; this model's ids end at 263"),
            (["x"], {"temperature": 3}, "temperature"),
            (["x"], {"temprature": 1}, "temprature"),
            (["x"], {"stop": ["a", ""]}, "stop"),
            (["x"], {"stop_token_ids": [999]}, "999"),
            (["x"], {"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ],
    )
    def test_in_a_call(self, llm: LLM, prompts: Any, options: dict[str, Any], said: str) -> None:
        with pytest.raises(RequestError, match=said):
            llm.generate(prompts, **options)
        assert llm.generate(["x"], max_tokens=1)[0].finish_reason == "length"

    def test_in_the_other_calls(self, llm: LLM) -> None:
        for wrong in ("Hi", ["Hi"], [CONVERSATION, "Hi"]):
            with pytest.raises(RequestError, match="list of messages"):
                llm.chat(wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="1 or 2, not 3"):
            llm.sleep(3)  # type: ignore[arg-type]
        assert llm.generate([]) == llm.chat([]) == []

    def test_in_the_settings(self, tiny_model: Path) -> None:
        with pytest.raises(FirstlightError, match="smolm"):
            LLM("smolm")
        with pytest.raises(TypeError, match="max_model_lenn"):
            LLM(str(tiny_model), max_model_lenn=5)
        with pytest.raises(TypeError, match="block_size"):
            LLM(str(tiny_model), block_size="many")
        with pytest.raises(FirstlightError, match=r"absent\.jinja"):
            LLM(str(tiny_model), chat_template="absent.jinja")

    @pytest.mark.parametrize("max_model_len", [1, 100_000])
    def test_a_model_that_cannot_be_loaded(self, tiny_model: Path, max_model_len: int) -> None:
        with LLM(str(tiny_model), device="cpu", max_model_len=max_model_len) as llm:
            for _ in range(2):
                with pytest.raises(EngineUnavailable, match=f"--max-model-len {max_model_len} "):
                    llm.generate("x")


def test_a_length_that_nobody_asked_for_gives_way_to_a_long_prompt(tiny_model: Path) -> None:
    with LLM(str(tiny_model), device="cpu", max_model_len=20) as llm:
        assert len(llm.generate("x" * 15, ignore_eos=True)[0].token_ids) == 5
        with pytest.raises(RequestError, match="6 in the answer"):
            llm.generate("x" * 15, max_tokens=6)


def test_without_chunked_prefill_a_step_takes_a_whole_prompt(endless_model: Path) -> None:
    settings: Any = {"device": "cpu", "max_model_len": 1200, "enable_chunked_prefill": False}
    prompt = "x" * 1100
    with LLM(str(endless_model), **settings) as whole, LLM(str(endless_model), device="cpu") as chunked:
        expected = chunked.generate(prompt, temperature=0, max_tokens=4)[0].token_ids
        assert whole.generate(prompt, temperature=0, max_tokens=4)[0].token_ids == expected
    with (
        LLM(str(endless_model), **settings, max_num_batched_tokens=1199) as short,
        pytest.raises(EngineUnavailable, match="a step must be able to take a whole prompt"),
    ):
        short.generate(prompt)


def test_closing_ends_the_engine(tiny_model: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with LLM(str(tiny_model), device="cpu", kv_cache_bytes=1 << 20) as llm:
        stream = llm.stream("x", max_tokens=400, ignore_eos=True)
        next(iter(stream))
        (engine,) = set(psutil.Process().children(recursive=True)) - before
    assert not engine.is_running()
    assert len(list(stream)) < 400
    with pytest.raises(EngineUnavailable, match="closed"):
        llm.generate("x")


def test_the_importing_process_needs_neither_torch_nor_http() -> None:
    code = "import sys, runtime.llm\nprint(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert not {"torch", "transformers", "starlette", "uvicorn", "pydantic"} & set(loaded)


class TestStructuredOutputs:
    @pytest.mark.parametrize(
        ("form", "pattern"),
        [
            ({"regex": r"[ab]{3}-\d"}, r"[ab]{3}-[0-9]"),
            ({"choice": ["yes", "no"]}, "yes|no"),
            ({"grammar": 'start: "(" start? ")"'}, r"\(+\)+"),
            ({"json": {"enum": ["x", 7]}}, '"x"|7'),
        ],
    )
    def test_answers_have_the_form(self, llm: LLM, form: dict[str, Any], pattern: str) -> None:
        results = llm.generate(PROMPTS, structured_outputs=form, temperature=2, max_tokens=200)
        for result in results:
            assert result.finish_reason == "stop"
            assert re.fullmatch(pattern, result.text)

    def test_any_object(self, llm: LLM) -> None:
        (result,) = llm.chat(CONVERSATION, structured_outputs={"json_object": True}, seed=3, max_tokens=300)
        if result.finish_reason == "stop":
            assert isinstance(json.loads(result.text), dict)

    @pytest.mark.parametrize(
        ("form", "complaint"),
        [
            ({}, "just one"),
            ({"regex": "a", "choice": ["b"]}, "just one"),
            ({"regex": "(a"}, "unclosed group"),
            ({"lark": "x"}, "lark"),
        ],
    )
    def test_what_cannot_be_is_refused(self, llm: LLM, form: dict[str, Any], complaint: str) -> None:
        with pytest.raises(RequestError, match=complaint):
            llm.generate("Hi", structured_outputs=form)
