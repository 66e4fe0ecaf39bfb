"""The chat page in real Chromium against the real server on the bundled pair: stream, stop, switch, figures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import DEMO
from waiting import LIMIT_S, wait_until

from .conftest import QUESTION, Server, run_server

sync_api = pytest.importorskip("playwright.sync_api", reason="the page needs the playwright package to be tried")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page needs Chromium: apt-get install chromium")
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 700}
# Even a long answer of the pair is over within a second: only the page itself is quick enough to press Stop.
STOP_AT_FIRST_DRAFT = """n => new MutationObserver((_, observer) => {
    if (!document.querySelectorAll('.assistant .text')[n - 1]?.textContent) return;
    observer.disconnect();
    document.querySelector('#stop').click();
}).observe(document.querySelector('#log'), { childList: true, subtree: true, characterData: true })"""


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the pair, and its target alone."""
    arguments = ("--demo", "--model", str(DEMO / "target.gguf"), "--name", "alone", "--no-store")
    with run_server(tmp_path_factory.mktemp("page"), *arguments) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    arguments += ["--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=LIMIT_S * 1000)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any, two_models: Server) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(LIMIT_S * 1000)
    tab = context.new_page()
    errors: list[str] = []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(two_models.url)
    tab.wait_for_selector("#model:not([disabled])")
    yield tab
    context.close()
    assert errors == []


def ask(tab: Any, text: str, n: int = 1) -> Any:
    """Send a message and wait until the n-th answer is complete."""
    tab.fill("#prompt", text)
    tab.press("#prompt", "Enter")
    tab.wait_for_selector(f".assistant >> nth={n - 1} >> .facts")
    return tab.locator(f".assistant >> nth={n - 1}")


def lengthen(route: Any) -> None:
    """Pass a question on that asks for a long answer."""
    route.continue_(post_data=json.dumps(json.loads(route.request.post_data) | {"format": NUMBERS}))


def test_answer_is_the_servers_and_drafted_words_are_marked(tab: Any, two_models: Server) -> None:
    tab.fill("#temperature", "0")
    answer = ask(tab, QUESTION)
    body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "stream": False}
    with two_models.client() as client:
        found = client.post("/api/chat", json=body | {"options": {"temperature": 0}}).json()
    words = answer.locator(".text").inner_text().split()
    assert words[:8] == found["message"]["content"].split()[:8]
    drafted = " ".join(answer.locator(".drafted").all_inner_texts()).split()
    assert 0.3 * len(words) < len(drafted) < len(words)


def test_figures_are_those_of_the_answer(tab: Any) -> None:
    answer = ask(tab, QUESTION)
    speed = float(tab.locator("#speed").inner_text())
    text = tab.locator("#ratio").inner_text()
    ratio, plain = map(float, re.search(r"([\d.]+) times plain .* makes ([\d.]+) tokens/s", text).groups())
    assert ratio == pytest.approx(speed / plain, abs=0.02)  # rounded to two digits, speeds to one
    assert float(tab.locator("#accepted").inner_text()) > 1
    text = tab.locator("#plan-text").inner_text()
    rounds, drafted, verified, accepted = map(
        int, re.findall(r"(\d+) (?:rounds|tokens drafted|verified|accepted)", text)
    )
    assert drafted >= verified >= accepted > 0
    assert rounds > 0
    assert tab.locator("#plan rect").count() >= 14
    n_tokens = int(re.search(r"(\d+) tokens\b(?!/)", answer.locator(".facts").inner_text())[1])
    assert n_tokens >= accepted


def test_stop_keeps_what_came_and_frees_the_place(tab: Any, two_models: Server) -> None:
    tab.route("**/api/chat", lengthen)
    for n in range(1, 11):  # the click may still come too late
        tab.evaluate(STOP_AT_FIRST_DRAFT, n)
        stopped = ask(tab, "Write a Python class for a tank.", n)
        if "Stopped." in stopped.locator(".facts").inner_text():
            break
    tab.unroute("**/api/chat")
    assert "Stopped." in stopped.locator(".facts").inner_text()
    assert stopped.locator(".text").inner_text()
    assert "Stopped." not in ask(tab, "Tell me about cats.", n + 1).locator(".facts").inner_text()
    wait_until(lambda: two_models.n_busy == 0)


def test_model_is_switched(tab: Any, two_models: Server) -> None:
    ask(tab, QUESTION)
    assert tab.locator(".assistant .drafted").count() > 0
    tab.select_option("#model", "alone:latest")
    answer = ask(tab, "What is 3 + 4?", 2)
    assert answer.locator(".drafted").count() == 0
    assert "No drafts" in tab.locator("#plan-text").inner_text()
    with two_models.client() as client:
        assert {model["name"] for model in client.get("/api/ps").json()["models"]} >= {"alone:latest"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_cut_off(browser: Any, two_models: Server, scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    context.set_default_timeout(LIMIT_S * 1000)
    tab = context.new_page()
    tab.goto(two_models.url)
    tab.wait_for_selector("#model:not([disabled])")
    ask(tab, QUESTION)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("#prompt").bounding_box()["y"] < 800
    context.close()
