"""The page in headless Chromium: with keys alone, by dragging, on a phone, light and dark, and nothing from outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from support.scorer_samples import say
from support.serving import Running, serving

from btrm_core.scoring import Scorer
from btrm_core.serving import Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(server.url)
    yield page
    assert not page.wrong
    assert all(url.startswith(server.url) for url in page.asked)
    context.close()


def score(page: Any) -> list[str]:
    page.click("#score")
    page.wait_for_selector("#result:not([hidden])")
    return shown(page)


def shown(page: Any) -> list[str]:
    return [text.replace("−", "-") for text in page.locator(".reward").all_text_contents()]


def test_rewards_probabilities_and_tokens_are_those_of_the_model(page: Any, scorer: Scorer) -> None:
    page.fill("#turns textarea", "What is 2 + 2?")
    page.locator("#answers textarea").nth(0).fill("4")
    page.locator("#answers textarea").nth(1).fill("I will not say")
    conversations = [say("What is 2 + 2?", text) for text in ("4", "I will not say")]
    expected = scorer.rewards(conversations)
    assert score(page) == [f"{reward:.3f}" for reward in expected]
    chance = 1 / (1 + 2.718281828459045 ** float(expected[1] - expected[0]))
    assert f"{100 * chance:.1f} %" in page.locator("#matrix tbody tr").first.text_content()
    page.locator(".read summary").first.click()
    tokens = page.locator(".tokens").first.locator("span")
    assert tokens.count() == len(scorer.chat.encode(conversations[:1])[0])
    assert page.locator(".tokens").first.locator("span.here").text_content() == scorer.chat.terminal_token
    best = page.locator(".answer.best .name").text_content()
    assert best == f"Answer {int(expected.argmax()) + 1}"


def test_an_edit_takes_the_old_rewards_away(page: Any) -> None:
    score(page)
    page.locator("#answers textarea").first.fill("Something else")
    assert shown(page) == ["", ""]
    assert page.locator("#result").is_hidden()


def test_it_works_with_keys_alone(page: Any) -> None:
    page.keyboard.press("Tab")
    page.locator("#answers textarea").first.focus()
    page.keyboard.type(" Really.")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#result:not([hidden])")
    before = shown(page)
    page.locator(".grip").first.focus()
    page.keyboard.press("ArrowRight")
    assert shown(page) == before[::-1]
    assert page.evaluate("document.activeElement.className").startswith("grip")
    assert page.locator("#answers textarea").nth(1).input_value().endswith(" Really.")


def test_answers_are_dragged_into_order(page: Any) -> None:
    before = score(page)
    grip, other = page.locator(".grip").first.bounding_box(), page.locator(".answer").nth(1).bounding_box()
    page.mouse.move(grip["x"] + 8, grip["y"] + 8)
    page.mouse.down()
    page.mouse.move(other["x"] + other["width"] / 2, other["y"] + 30, steps=6)
    page.mouse.up()
    assert shown(page) == before[::-1]


def test_a_link_restores_what_was_typed(page: Any, browser: Any) -> None:
    page.fill("#turns textarea", "Grüße, 你好 & <b>")
    page.click("#add-answer")
    page.locator("#answers textarea").nth(2).fill("third")
    page.click("#link")
    again = browser.new_page()
    again.goto(page.url)
    assert again.locator("#turns textarea").input_value() == "Grüße, 你好 & <b>"
    assert again.locator("#answers textarea").nth(2).input_value() == "third"
    assert again.locator("#answers .answer").count() == 3
    again.close()


def test_a_pasted_conversation_becomes_messages_and_an_answer(page: Any) -> None:
    page.click("#paste")
    page.fill("#paste-text", '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]')
    page.click("#paste-use")
    assert page.locator("#turns textarea").input_value() == "Hi"
    assert page.locator("#answers textarea").first.input_value() == "Hello"
    page.click("#paste")
    page.fill("#paste-text", "{")
    page.click("#paste-use")
    assert "no conversation" in page.locator("#status").text_content()


@pytest.mark.parametrize(
    ("row", "turns", "answers"),
    [
        ({"prompt": "Hi", "chosen": "Ho", "rejected": "Hm"}, ["Hi"], ["Ho", "Hm"]),
        ({"chosen": say("Hi", "Ho"), "rejected": say("Hi", "Hm")}, ["Hi"], ["Ho", "Hm"]),
        ({"prompt": say("Hi", "Ho")[:1], "responses": ["a", "b", "c"]}, ["Hi"], ["a", "b", "c"]),
        ([{"role": "tool", "content": [{"type": "text", "text": "4"}]}, *say("Hi", "Ho")], ["4", "Hi"], ["Ho"]),
    ],
)
def test_a_pasted_row_becomes_its_answers(page: Any, row: Any, turns: list[str], answers: list[str]) -> None:
    page.locator("#answers textarea").evaluate_all("all => all.forEach((a) => { a.value = '' })")
    page.click("#paste")
    page.fill("#paste-text", json.dumps(row))
    page.click("#paste-use")
    values = "all => all.map((area) => area.value)"
    assert page.locator("#turns textarea").evaluate_all(values) == turns
    assert page.locator("#answers textarea").evaluate_all(values) == answers
    if isinstance(row, list):
        assert page.locator("#turns select").first.input_value() == "tool"


def test_what_is_too_long_for_a_link_says_so_and_typing_is_no_navigation(page: Any) -> None:
    page.evaluate(
        "() => { window.links = 0; const own = history.replaceState.bind(history);"
        " history.replaceState = (...all) => { window.links += 1; own(...all); } }"
    )
    page.locator("#answers textarea").first.focus()
    page.keyboard.type("abcdefghijklmnopqrstuvwxyz")
    assert page.evaluate("window.links") <= 2
    page.evaluate("document.querySelector('#turns textarea').value = 'x'.repeat(1_600_000)")
    page.click("#link")
    assert "too long for a link" in page.locator("#status").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_can_be_read(browser: Any, server: Running, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(server.url)
    score(page)
    page.locator(".read summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("body", "#score", ".muted", ".reward", "#answers textarea", "td"):
        assert contrast(page, selector) >= 4.5, selector
    assert page.locator("button:visible").evaluate_all("all => all.every(b => b.getBoundingClientRect().height >= 24)")
    context.close()


def contrast(page: Any, selector: str) -> float:
    """WCAG's ratio of an element's text and what is behind it."""
    return page.locator(selector).first.evaluate(
        """element => {
          const light = (rgb) => rgb.map((v) => v / 255)
            .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const parse = (text) => text.match(/[\\d.]+/g).map(Number);
          let behind = element, colour = [0, 0, 0, 0];
          while (behind && (colour = parse(getComputedStyle(behind).backgroundColor))[3] === 0) {
            behind = behind.parentElement;
          }
          const a = light(parse(getComputedStyle(element).color).slice(0, 3)), b = light(colour.slice(0, 3));
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }"""
    )


def test_a_server_with_a_token_asks_for_it(browser: Any, scorer: Scorer) -> None:
    with serving(scorer, Limits(token="open")) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#token")
        page.fill("#token", "open")
        page.keyboard.press("Enter")
        page.locator("#model", has_text="tokens").wait_for()
        score(page)
        page.close()
