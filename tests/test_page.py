"""The chat page in real Chromium, against a stand-in of the server: what a person sees and does."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from server.page_stand_in import WEB, Page, serve_page
from waiting import LIMIT_S, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="the page needs the playwright package to be tried")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMIT_MS = LIMIT_S * 1000
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=LIMIT_MS)
        sync_api.expect.set_options(timeout=LIMIT_MS)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[Page]:
    with serve_page() as page:
        yield page


@pytest.fixture
def errors() -> list[str]:
    """What the browser complains about; the policy against foreign and inline content speaks up here."""
    return []


@pytest.fixture
def tab(browser: Any, server: Page, errors: list[str]) -> Iterator[Any]:
    tab = open_tab(browser, viewport={"width": 1200, "height": 800})
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(server.url)
    tab.wait_for_selector("#model:not([disabled])")
    yield tab
    tab.context.close()


def open_tab(browser: Any, **options: Any) -> Any:
    context = browser.new_context(**options)
    context.set_default_timeout(LIMIT_MS)
    return context.new_page()


def ask(tab: Any, text: str) -> None:
    tab.fill("#prompt", text)
    tab.press("#prompt", "Enter")


def test_answer_streams_with_drafted_words_marked(tab: Any, server: Page, errors: list[str]) -> None:
    server.seconds_per_round = 1.0  # slow enough for any browser
    ask(tab, "What is a whale?")
    tab.wait_for_selector(".assistant .drafted")
    assert tab.locator("#stop").is_visible()
    assert tab.locator(".facts").count() == 0
    first = tab.locator(".assistant .text").inner_text()
    server.seconds_per_round = 0.0
    tab.wait_for_selector(".facts")
    assert len(tab.locator(".assistant .text").inner_text()) > len(first)
    assert tab.locator(".user").inner_text() == "What is a whale?"
    drafted = tab.locator(".assistant .drafted").all_inner_texts()
    assert drafted[:3] == ["A whale is", "largest", "on Earth. Whales live in"]
    assert server.chats[0]["messages"] == [{"role": "user", "content": "What is a whale?"}]
    assert server.chats[0]["stream"] is True
    assert server.chats[0]["dspark"] is True
    assert errors == []


def test_text_of_a_model_is_never_markup(tab: Any, server: Page, errors: list[str]) -> None:
    server.answer = "<img src=x onerror=alert(1)> **<script>alert(2)</script>** `<b>x</b>`\n\n```html\n<i>y</i>\n```\n"
    ask(tab, "<u>me</u>")
    tab.wait_for_selector(".facts")
    assert tab.locator(".user").inner_text() == "<u>me</u>"
    shown = tab.locator(".assistant .text").inner_text()
    assert "<img src=x onerror=alert(1)> <script>alert(2)</script> <b>x</b>" in shown
    assert "<i>y</i>" in shown
    assert tab.locator("#log img, #log script, #log b, #log i, #log u").count() == 0
    assert errors == []


def test_markdown_is_laid_out(tab: Any) -> None:
    ask(tab, "go")
    tab.wait_for_selector(".facts")
    assert tab.locator(".assistant strong").inner_text() == "largest animal"
    assert tab.locator(".assistant .item").count() == 2
    assert tab.locator(".assistant pre").inner_text().splitlines()[0] == "def reverse(items):"
    assert tab.locator(".assistant p code").inner_text() == "reverse([1, 2, 3])"


def test_figures_show_speed_accepted_length_and_schedule(tab: Any) -> None:
    assert tab.locator("#speed").inner_text() == "–"
    ask(tab, "go")
    tab.wait_for_selector(".facts")
    assert tab.locator("#speed").inner_text() == "36.0"
    assert tab.locator("#accepted").inner_text() == "4.05"
    assert (
        tab.locator("#ratio")
        .inner_text()
        .startswith("1.50 times plain decoding, which makes 24.0 tokens/s under this load.")
    )
    assert tab.locator("#strip-ratio").text_content() == "1.50× plain"
    assert "1.50× plain" in tab.locator(".facts").inner_text()
    assert tab.locator("#plan text").all_text_contents() == list("1234567")
    text = tab.locator("#plan-text").inner_text()
    assert re.fullmatch(r"21 rounds, policy auto: 147 tokens drafted, \d+ verified, 64 accepted \(\d+%\)\.", text)
    assert tab.locator("#plan").get_attribute("aria-label").startswith("position 1: verified in 100%, accepted in")
    assert "4.05 per round" in tab.locator(".facts").inner_text()


def test_stop_cancels_the_request_and_keeps_what_came(tab: Any, server: Page) -> None:
    server.seconds_per_round = 1.0  # slow enough for any browser
    ask(tab, "go")
    tab.wait_for_selector(".assistant .drafted")
    tab.click("#stop")
    tab.wait_for_selector("#send:visible")
    assert "Stopped." in tab.locator(".facts").inner_text()
    assert "small car" not in tab.locator(".assistant .text").inner_text()
    wait_until(lambda: server.n_cancelled == 1)
    server.seconds_per_round = 0.0
    ask(tab, "again")
    tab.wait_for_selector("article:nth-of-type(4) .facts")
    assert [message["role"] for message in server.chats[1]["messages"]] == ["user", "assistant", "user"]


def test_escape_stops_as_well(tab: Any, server: Page) -> None:
    server.seconds_per_round = 1.0  # slow enough for any browser
    ask(tab, "go")
    tab.wait_for_selector(".assistant .drafted")
    tab.keyboard.press("Escape")
    tab.wait_for_selector(".facts")
    assert "Stopped." in tab.locator(".facts").inner_text()


def test_model_can_be_switched_and_is_remembered(tab: Any, server: Page) -> None:
    server.seconds_per_round = 0.0
    assert tab.locator("#model option").all_inner_texts()[1] == "demo · 8.40M Q8_0"
    ask(tab, "one")
    tab.wait_for_selector(".facts")
    tab.select_option("#model", "demo:latest")
    ask(tab, "two")
    tab.wait_for_selector("article:nth-of-type(4) .facts")
    assert [chat["model"] for chat in server.chats] == ["hf.co/owner/Qwen3-8B-GGUF:Q4_K_M", "demo:latest"]
    tab.reload()
    tab.wait_for_selector("#model:not([disabled])")
    assert tab.input_value("#model") == "demo:latest"


def test_settings_reach_the_server(tab: Any, server: Page) -> None:
    server.seconds_per_round = 0.0
    tab.uncheck("#drafting")
    tab.uncheck("#colours")
    tab.fill("#temperature", "0.5")
    tab.fill("#system", "Be brief.")
    ask(tab, "go")
    tab.wait_for_selector(".facts")
    assert server.chats[0]["options"] == {"temperature": 0.5, "draft_num_predict": 0}
    assert server.chats[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert tab.locator(".assistant .drafted").count() == 0
    assert "No drafts" in tab.locator("#plan-text").inner_text()


def test_new_chat_forgets(tab: Any, server: Page) -> None:
    server.seconds_per_round = 0.0
    ask(tab, "one")
    tab.wait_for_selector(".facts")
    tab.click("#new")
    assert tab.locator("article").count() == 0
    assert tab.locator("#empty").is_visible()
    ask(tab, "two")
    tab.wait_for_selector(".facts")
    assert server.chats[1]["messages"] == [{"role": "user", "content": "two"}]


def test_answer_without_a_word_is_told(tab: Any, server: Page) -> None:
    answer, server.answer = server.answer, ""
    ask(tab, "Say nothing.")
    tab.wait_for_selector(".assistant .facts")
    assert "The model ended at once." in tab.locator(".facts").inner_text()
    assert "Copy" not in tab.locator(".facts").inner_text()
    server.answer = answer
    ask(tab, "What is a whale?")
    tab.wait_for_selector(".assistant >> nth=1 >> .facts")
    assert server.chats[1]["messages"] == [{"role": "user", "content": "What is a whale?"}]


def test_errors_are_told_and_the_page_goes_on(tab: Any, server: Page) -> None:
    server.status = 503
    ask(tab, "go")
    tab.wait_for_selector("#notice:visible")
    assert tab.locator("#notice").inner_text() == "the queue is full, try again later"
    server.status = 200
    server.seconds_per_round = 0.0
    ask(tab, "go")
    tab.wait_for_selector(".facts")
    assert not tab.locator("#notice").is_visible()


def test_key_is_asked_for_and_kept_for_the_session(browser: Any, server: Page) -> None:
    server.key = "secret"
    tab = open_tab(browser)
    tab.goto(server.url)
    tab.wait_for_selector("#key:visible")
    tab.fill("#key", "wrong")
    tab.keyboard.press("Enter")
    sync_api.expect(tab.locator("#key")).to_have_value("")  # asked again
    tab.fill("#key", "secret")
    tab.click("#key-dialog button[value=ok]")
    tab.wait_for_selector("#model:not([disabled])")
    tab.reload()
    tab.wait_for_selector("#model:not([disabled])")
    tab.context.close()


def test_server_without_models_says_how_to_get_one(browser: Any, server: Page) -> None:
    server.models = []
    tab = open_tab(browser)
    tab.goto(server.url)
    sync_api.expect(tab.locator("#empty-text")).to_contain_text("dspark pull")
    tab.fill("#prompt", "hello")
    assert tab.locator("#send").is_disabled()
    tab.context.close()


def test_nothing_is_cut_off_at_any_width(tab: Any, server: Page) -> None:
    server.seconds_per_round = 0.0
    ask(tab, "What is a whale? " + "x" * 200)
    tab.wait_for_selector(".facts")
    for width in (320, 390, 768, 1280):
        tab.set_viewport_size({"width": width, "height": 800})
        sync_api.expect(tab.locator("#plan")).to_be_visible(visible=width >= 960)
        if width < 960:
            tab.click("#rail summary")
        assert tab.locator("#plan").is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for name in ("#new", "#prompt", "#send", "#model", ".assistant", "#plan"):
            box = tab.locator(name).bounding_box()
            assert box["x"] >= 0, (width, name)
            assert box["x"] + box["width"] <= width, (width, name)
        if width < 960:
            tab.click("#rail summary")


def test_text_stands_out_from_its_ground_in_both_schemes(browser: Any, server: Page) -> None:
    script = """() => ['body', '.facts', '.drafted', '.note'].map((name) => {
        const node = document.querySelector(name === '.drafted' ? '.assistant .drafted' : name);
        let ground = node;
        while (getComputedStyle(ground).backgroundColor.startsWith('rgba')) ground = ground.parentElement;
        return [name, getComputedStyle(node).color, getComputedStyle(ground).backgroundColor];
    })"""
    for scheme in ("light", "dark"):
        server.seconds_per_round = 0.0
        tab = open_tab(browser, color_scheme=scheme)
        tab.goto(server.url)
        tab.wait_for_selector("#model:not([disabled])")
        ask(tab, "go")
        tab.wait_for_selector(".facts")
        for name, ink, ground in tab.evaluate(script):
            # 4.5: WCAG 2, level AA for body text.
            assert contrast(ink, ground) >= 4.5, (scheme, name, ink, ground)
        tab.context.close()


def contrast(one: str, other: str) -> float:
    low, high = sorted(luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_control_has_a_name(tab: Any) -> None:
    unnamed = tab.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea')].filter((node) =>
            !node.textContent.trim() && !node.labels?.length && !node.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0


def test_page_asks_nobody_else() -> None:
    for path in WEB.iterdir():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\"'\s)]+", text)) <= {"http://www.w3.org/2000/svg"}, path
        assert "innerHTML" not in text, path
    page = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|<script(?! type=\"module\" src=)| style=| on\w+=", page)
