"""The chat page in a real browser: headless Chromium against a server around the fake engine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.handler.conftest import Server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; on Debian: apt-get install chromium"),
]
expect.set_options(timeout=10_000)

MakeServer = Callable[..., Server]
OpenPage = Callable[..., Page]

MARKDOWN = """\
# A heading

Some **bold** words, `code`, and 2 * 3 * 4.

1. first
2. second

```python
print("a line that is much too long for the screen of any phone", "a" * 100)  # ---------------------------
```

unbrokenunbrokenunbrokenunbrokenunbrokenunbrokenunbroken

<img src="x" onerror="document.title = 'broken into'"> [link](javascript:alert(1))
"""

# The ratio of WCAG 2 between each piece of visible text and what lies behind it.
CONTRASTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = channels(color).map((c) => c / 255).map(
      (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
  };
  const found = {};
  const measure = (node, color) => {
    const [a, b] = [light(color), light(behind(node))].sort((x, y) => y - x);
    found[node.tagName + (node.id && "#" + node.id) + "." + node.className] = (a + 0.05) / (b + 0.05);
  };
  for (const node of document.querySelectorAll("body *")) {
    if (!node.checkVisibility({ visibilityProperty: true })) continue;
    const says = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (says || node.value) measure(node, getComputedStyle(node).color);
    if (node.placeholder) measure(node, getComputedStyle(node, "::placeholder").color);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # The sandbox refuses to run as root, as tests in containers do.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Open a server's page in a fresh profile; whatever the browser complains of fails the test."""
    contexts = []
    complaints: list[str] = []

    def complain(message: Any) -> None:
        refused = re.search(r"responded with a status of (400|401|503)", message.text)
        if message.type in ("error", "warning") and not refused:
            complaints.append(message.text)

    def open_in_browser(server: Server, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", complain)
        page.goto(server.url)
        return page

    yield open_in_browser
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page: Page, question: str) -> None:
    box = page.get_by_label("Your message")
    box.fill(question)
    box.press("Enter")


def state(page: Page) -> Locator:
    return page.locator("#state")


def answers(page: Page) -> Locator:
    return page.locator("article.assistant .text")


class TestConversation:
    def test_an_answer_is_shown_while_it_is_written_and_stops_when_told(
        self, make_server: MakeServer, open_page: OpenPage
    ) -> None:
        server = make_server("It goes on", prepare=lambda engine: setattr(engine, "endless", True))
        page = open_page(server)
        ask(page, "Tell me a story")
        expect(answers(page)).to_have_text("It goes on")
        assert server.engine.aborted == []  # the engine is still at it
        expect(page.get_by_role("button", name="Send")).to_be_hidden()
        page.get_by_role("button", name="Stop").click()
        assert server.engine.abort_seen.wait(10)
        expect(page.get_by_text(re.compile(r"^10 tokens .* stopped$"))).to_be_visible()
        expect(answers(page)).to_have_text("It goes on")
        expect(page.get_by_role("button", name="Send")).to_be_focused()

    def test_escape_stops_too(self, make_server: MakeServer, open_page: OpenPage) -> None:
        server = make_server("Endless", prepare=lambda engine: setattr(engine, "endless", True))
        page = open_page(server)
        ask(page, "Go")
        expect(answers(page)).to_have_text("Endless")
        page.keyboard.press("Escape")
        assert server.engine.abort_seen.wait(10)

    def test_the_whole_conversation_and_the_settings_are_sent(
        self, make_server: MakeServer, open_page: OpenPage
    ) -> None:
        server = make_server("Sure.")
        page = open_page(server)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Top p").fill("0.5")
        page.get_by_label("Max tokens").fill("3")
        page.get_by_label("Seed").fill("7")
        page.get_by_role("button", name="Done").click()
        ask(page, "One?")
        expect(page.get_by_text(re.compile("cut at the token limit"))).to_have_count(1)
        box = page.get_by_label("Your message")
        box.fill("Two")
        box.press("Shift+Enter")
        box.press_sequentially("lines?")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_text(re.compile("cut at the token limit"))).to_have_count(2)
        first, second = server.engine.submitted
        sampling = second.sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (0, 0.5, 3, 7)
        turns = ["system\nBe brief.", "user\nOne?", "assistant\nSur", "user\nTwo\nlines?"]
        prompt = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"
        tokenizer = server.engine.tokenizer
        assert second.prompt_token_ids == tokenizer.encode(prompt, add_special_tokens=False)
        assert len(first.prompt_token_ids) < len(second.prompt_token_ids)

        page.get_by_role("button", name="New chat").click()
        expect(page.locator("article")).to_have_count(0)
        page.reload()
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("System prompt")).to_have_value("Be brief.")

    def test_regenerate_replaces_the_answer(self, make_server: MakeServer, open_page: OpenPage) -> None:
        said = iter(["First.", "Second."])
        page = open_page(make_server(lambda submit: next(said)))
        ask(page, "Hi")
        expect(answers(page)).to_have_text("First.")
        page.get_by_role("button", name="Regenerate").click()
        expect(answers(page)).to_have_text("Second.")

    def test_a_crash_is_told_and_can_be_tried_again(
        self, make_server: MakeServer, open_page: OpenPage
    ) -> None:
        server = make_server("Half", prepare=lambda engine: setattr(engine, "endless", True))
        page = open_page(server)
        ask(page, "Hi")
        expect(answers(page)).to_have_text("Half")
        server.engine.die()
        expect(page.locator(".fault")).to_contain_text("The engine ended; it is being restarted.")
        expect(answers(page)).to_have_text("Half")
        server.engine.endless = False
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
        expect(page.locator(".fault")).to_have_count(0)

    def test_a_refusal_is_told_in_the_servers_words(
        self, make_server: MakeServer, open_page: OpenPage
    ) -> None:
        page = open_page(make_server())
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Seed").fill("1.5")
        page.get_by_role("button", name="Done").click()
        ask(page, "Hi")
        expect(page.locator(".fault")).to_contain_text("'seed' is not valid")

    def test_what_the_model_writes_is_shown_and_never_run(
        self, make_server: MakeServer, open_page: OpenPage
    ) -> None:
        page = open_page(make_server(MARKDOWN))
        ask(page, "Show me <b>everything</b>")
        text = answers(page)
        expect(text.get_by_role("heading", name="A heading")).to_be_visible()
        expect(text.locator("strong")).to_have_text("bold")
        expect(text.locator("p code")).to_have_text("code")
        expect(text.locator("em")).to_have_count(0)
        expect(text.locator("ol li")).to_have_text(["first", "second"])
        expect(text.locator("pre code")).to_contain_text('print("a line')
        expect(text).to_contain_text('<img src="x" onerror="')
        expect(page.locator("article.user .text")).to_have_text("Show me <b>everything</b>")
        assert page.locator("article").locator("img, a, b, script").count() == 0
        assert page.title() == "firstlight"


class TestState:
    def test_loading_then_warm_and_the_question_waits(
        self, make_server: MakeServer, open_page: OpenPage
    ) -> None:
        server = make_server("At last.", prepare=lambda engine: engine.set_loading(43_000_000, 100_000_000))
        page = open_page(server)
        expect(state(page)).to_have_text("loading 43 %, 43 of 100 MB")
        bar = page.get_by_role("progressbar", name="Loading the model")
        expect(bar).to_have_attribute("value", "43")
        ask(page, "Are you there?")
        expect(answers(page)).to_contain_text("Waiting for the model: loading 43 %")
        assert server.engine.submit_seen.wait(10)
        server.engine.become_ready()
        expect(answers(page)).to_have_text("At last.")
        expect(state(page)).to_have_text("warm")
        expect(bar).to_be_hidden()
        expect(page.locator("#model")).to_have_text("tiny")

    def test_asleep(self, make_server: MakeServer, open_page: OpenPage) -> None:
        page = open_page(make_server(prepare=lambda engine: setattr(engine, "state", "asleep")))
        expect(state(page)).to_have_text("asleep, wakes when asked")

    def test_failed_with_the_reason(self, make_server: MakeServer, open_page: OpenPage) -> None:
        def fail(engine: Any) -> None:
            engine.state, engine.info, engine.failure = "failed", None, "The disk is full."

        page = open_page(make_server(prepare=fail))
        expect(state(page)).to_have_text("failed")
        expect(page.get_by_role("alert").filter(has_text="The disk is full.")).to_be_visible()
        ask(page, "Hi")
        expect(page.locator(".fault")).to_contain_text("The disk is full.")


class TestKeys:
    def test_the_key_is_asked_for_and_the_question_goes_on(
        self, make_server: MakeServer, open_page: OpenPage
    ) -> None:
        server = make_server("Welcome.", api_keys=("right",))
        page = open_page(server)
        field = page.get_by_label("API key")
        expect(page.get_by_role("alert")).to_contain_text("The API key is missing or wrong.")
        expect(state(page)).to_have_text("asks for an API key")
        ask(page, "Hi")
        field.fill("wrong")
        field.press("Enter")
        expect(field).to_have_value("")
        expect(field).to_be_visible()
        assert server.engine.submitted == []
        field.fill("right")
        page.get_by_role("button", name="Use key").click()
        expect(answers(page)).to_have_text("Welcome.")
        expect(state(page)).to_have_text("warm")
        page.reload()
        expect(state(page)).to_have_text("warm")
        expect(field).to_be_hidden()


class TestLooks:
    @pytest.mark.parametrize("width", [320, 412])
    def test_a_phone_scrolls_down_only_and_has_large_buttons(
        self, make_server: MakeServer, open_page: OpenPage, width: int
    ) -> None:
        phone = {"viewport": {"width": width, "height": 640}, "has_touch": True, "is_mobile": True}
        page = open_page(make_server(MARKDOWN), **phone)
        ask(page, "word" * 30)
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
        for box in ("document.documentElement", "document.querySelector('main')"):
            assert page.evaluate(f"{box}.scrollWidth - {box}.clientWidth") == 0
        page.get_by_role("button", name="Settings").tap()
        expect(page.get_by_role("dialog")).to_be_in_viewport(ratio=1)
        for button in page.get_by_role("button").all():
            size = button.bounding_box()
            assert size is not None
            assert size["height"] >= 44, button.text_content()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_stands_out(self, make_server: MakeServer, open_page: OpenPage, scheme: str) -> None:
        server = make_server(MARKDOWN, api_keys=("key",))
        page = open_page(server, color_scheme=scheme)
        expect(page.get_by_label("API key")).to_be_visible()
        weak = {f"key {name}": ratio for name, ratio in page.evaluate(CONTRASTS).items()}
        page.get_by_label("API key").fill("key")
        page.get_by_label("API key").press("Enter")
        expect(state(page)).to_have_text("warm")
        ask(page, "Hi")
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
        server.engine.state, server.engine.failure = "failed", "The disk is full."
        ask(page, "Hi again")
        expect(page.locator(".fault")).to_be_visible()
        expect(page.locator("#trouble")).to_be_visible()
        page.get_by_role("button", name="Settings").click()
        weak |= page.evaluate(CONTRASTS)
        assert len(weak) > 20
        assert {name: ratio for name, ratio in weak.items() if ratio < 4.5} == {}
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
        assert brightness > 200 if scheme == "light" else brightness < 50


class TestDelivery:
    def test_only_the_pages_own_files_are_let_in(self, server: Server) -> None:
        page = server.get("/")
        assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert b"http:" not in page.body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https:" not in page.body

    def test_nothing_else_of_the_folder_is_served(self, server: Server) -> None:
        for path in ("/ui/__init__.py", "/ui/", "/ui/../app.py", "/ui/index.html"):
            assert server.get(path).status == 404
