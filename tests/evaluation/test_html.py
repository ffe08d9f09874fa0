"""The report: what is in it, and that a browser shows it without fault."""

from __future__ import annotations

import builtins
import dataclasses
import html as escapes
import json
import re
import shutil

import numpy as np
import pytest
from support.reward_samples import made

from btrm_core.errors import ConfigError, DataError
from btrm_core.evaluation import PairText, assess, compare
from btrm_core.evaluation.html import Report, Table, write_report
from btrm_core.evaluation.text import signed

NASTY = '<script>window.broken = true</script> & "quoted" \' {{ 7 * 7 }} \ud800 é'


def whole_report():
    first = dataclasses.replace(
        made(300, shift=1.0, model="/runs/first/model"),
        subset_P=[
            ("", "Chat", NASTY, "a-rather-long-subset-name-that-goes-on-and-on-and-on")[i % 4] for i in range(300)
        ],
        text=lambda i: PairText((("system", NASTY), ("user", "x" * 900)), "long " * 3000, f"bad {i} {NASTY}"),
    )
    second = dataclasses.replace(made(300, seed=8, shift=0.3, model="org/second"), subset_P=first.subset_P)
    lines = [{"split": "train", "step": i, "loss": 0.7 - 0.002 * i} for i in range(1, 101)]
    lines += [{"split": "eval", "step": i, "loss": 0.69 - 0.001 * i} for i in (50, 100)]
    return Report(
        title=f"Evaluation {NASTY}",
        evaluations=[(assess(first), first), (assess(second), second)],
        comparisons=[(compare(first, second), first)],
        training=lines,
        facts={"btrm": "0.1.0", "path": "/a/very/long/path/" + "x" * 200},
        tables=[Table("Probes", ("edit", "pairs", "flips"), [("markdown", 300, 0.125), ("empty", 300, None)])],
        extra={"probes": {"markdown": 0.125}},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report = whole_report()
    return report, write_report(report, folder / "deep")


def test_the_page_holds_all_and_loads_nothing(written):
    _, page = written
    text = page.read_text(encoding="utf-8")
    for what in ("first is better", "Worst errors", "Subsets", "Length-controlled", "12,000 more characters"[3:]):
        assert what in text
    assert not re.search(r'(?:src|href)="(?!#|data:,)', text)
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert "<script>window.broken" not in text
    assert escapes.escape("<script>window.broken = true</script> & ", quote=False) in text
    assert '<div class="text" dir="auto">' in text  # from right to left where the text is
    assert "49 }}" not in text
    assert "{{ 7 * 7 }}" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert len(re.findall("<details", text)) <= 3 * 60


def test_the_figures_are_in_report_json(written):
    report, page = written
    values = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    assert values["evaluations"][0]["accuracy"]["half"] == report.evaluations[0][0].accuracy.half
    assert values["comparisons"][0]["overall"]["verdict"] == "the first model is better"
    assert values["probes"] == {"markdown": 0.125}


def test_every_picture_is_beside_it_as_png(written):
    _, page = written
    names = {path.stem for path in page.parent.glob("*.png")}
    kinds = {"rewards", "margins", "calibration", "buckets", "data-margin", "length", "subsets"}
    assert names == {f"{n}-{kind}" for n in (1, 2) for kind in kinds} | {"models", "comparison-1", "training"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in page.parent.glob("*.png"))
    assert page.read_text(encoding="utf-8").count("<svg ") == len(names)


def test_a_number_near_zero_has_no_minus():
    assert [signed(value) for value in (-0.001, 0.0, -0.006, 1234.5, None)] == [
        "+0.00",
        "+0.00",
        "-0.01",
        "+1,234.50",
        "–",
    ]


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_few_pairs_and_no_texts_give_a_page(tmp_path, pairs):
    rewards = made(pairs, text=False)
    rewards.tokens_P2[:] = -1
    rewards.data_margin_P[:] = np.nan
    page = write_report(Report("few", [(assess(rewards), rewards)]), tmp_path)
    assert "few" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_ties_and_all_right_give_a_page(tmp_path, value):
    rewards = dataclasses.replace(made(6), reward_P2=np.tile([value, 0.0], (6, 1)))
    assert write_report(Report("same", [(assess(rewards), rewards)]), tmp_path).is_file()


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    known = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return known(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'btrm\[report\]'"):
        write_report(Report("none", []), tmp_path)


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the report"):
        write_report(Report("none", []), tmp_path / "file" / "inside")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright drives the browser: pip install playwright"
    )
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--disable-component-update"])
        yield found
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (375, 812), (320, 600)])
def test_a_browser_shows_it_without_fault(browser, written, width, height, scheme):
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    faults: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{written[1]}")
    page.evaluate("document.querySelectorAll('details').forEach((one, i) => { one.open = i % 7 === 0 })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.broken") is None
    ink = page.evaluate("getComputedStyle(document.querySelector('svg text, svg tspan')).fill")
    assert ink == page.evaluate("getComputedStyle(document.querySelector('.note')).color") or ink == page.evaluate(
        "getComputedStyle(document.body).color"
    )
    assert page.locator("svg text").first.bounding_box()["height"] > 5
    assert not faults
    assert requests == [f"file://{written[1]}"]
    page.close()


def test_tables_sort_and_errors_are_found(browser, written):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"file://{written[1]}")
    table = page.locator("#set-1 table").last
    accuracy = table.locator("th button", has_text="Accuracy")
    values = "table => [...table.tBodies[0].rows].map(row => Number(row.cells[2].dataset.value))"
    accuracy.click()
    falling = table.evaluate(values)
    assert falling == sorted(falling, reverse=True)
    accuracy.click()
    assert table.evaluate(values) == falling[::-1]
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    worst = page.locator("#worst-1")
    whole = worst.locator("details:visible").count()
    worst.locator("select").select_option("Chat")
    some = worst.locator("details:visible").count()
    assert 0 < some < whole
    name = worst.locator("details:visible b").first.inner_text()
    worst.locator("input").fill(name)
    assert worst.locator("details:visible").count() >= 1
    worst.locator("[data-open]").click()
    assert worst.locator("details:visible .answer.is-chosen").first.is_visible()
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.close()
