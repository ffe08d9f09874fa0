"""What is printed, and what is kept from being printed."""

import io
import json
import logging
import os
import re
import sys
import time
from contextlib import redirect_stderr

import pytest
import torch

from btrm_core import console
from btrm_core.console import LongWork, dumps, quiet_libraries, table


def test_json_holds_no_number_that_json_does_not_know():
    value = {"loss": float("nan"), "subsets": [{"margin": float("inf"), "pairs": 3}], "sides": (1.5, float("-inf"))}
    assert json.loads(dumps(value), parse_constant=pytest.fail) == {
        "loss": None,
        "subsets": [{"margin": None, "pairs": 3}],
        "sides": [1.5, None],
    }


@pytest.mark.parametrize("closed", ["terminal", "pipe"])
def test_work_goes_on_where_nobody_listens_any_more(closed, monkeypatch):
    """As when the terminal of a run in the background is closed, or `| head` has seen enough."""
    reader, writer = os.openpty() if closed == "terminal" else os.pipe()
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        work = LongWork("training", 3, "step", stays=True)
        os.close(reader)
        with pytest.raises(OSError, match=r"Input/output error|Broken pipe"):
            print("is heard by nobody", file=stream)
        work.reach(2)
        work.note("loss 0.5")
        work.close()
        console.tell("step 2: checkpoint saved")
        console.show("model saved in run/model")
        print("not told either, and no error at the end of the process")


def test_libraries_are_quiet_inside_and_as_before_after():
    from transformers.utils import logging as bars

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    before, bars_before = [logger.level for logger in loggers], bars.is_progress_bar_enabled()
    said, complained = io.StringIO(), io.StringIO()
    with pytest.raises(RuntimeError), quiet_libraries(said, complained):  # noqa: PT012 (all of it is what is tested)
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        assert not bars.is_progress_bar_enabled()
        print("to standard output")
        print("to standard error", file=sys.stderr)
        raise RuntimeError
    assert (said.getvalue(), complained.getvalue()) == ("to standard output\n", "to standard error\n")
    assert [logger.level for logger in loggers] == before
    assert bars.is_progress_bar_enabled() == bars_before


def test_a_table_without_rows_has_no_lines():
    assert table([]) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the work below thinks have passed; its thread never wakes by itself."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "LINE_EVERY", 3600.0)
    monkeypatch.setattr(console, "BAR_EVERY", 3600.0)
    return now


def test_long_work_without_a_terminal_is_whole_lines_however_slow_a_step_is(monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY", 0.02)
    out = io.StringIO()
    with redirect_stderr(out), LongWork("encoding the train data", 2000, "pair") as work:
        work.reach(500)
        deadline = time.monotonic() + 60
        while out.getvalue().count("\n") < 3 and time.monotonic() < deadline:  # one step, no further call
            time.sleep(0.01)
    lines = out.getvalue().splitlines()
    assert len(lines) >= 3
    assert "\r" not in out.getvalue()
    pattern = r"encoding the train data: 500 of 2,000 pairs \(25%\), \d\d:\d\d, about \d\d:\d\d left"
    assert all(re.fullmatch(pattern, line) for line in lines), lines


def test_a_line_says_how_far_and_how_long(clock):
    with redirect_stderr(io.StringIO()):
        counted = LongWork("training", 80, "step", done=20)
        bytes_ = LongWork("scoring rows.jsonl", 4_000_000, "B")
        unknown = LongWork("loading some/model")
    clock[0] = 90.0
    counted.reach(40)
    counted.note("loss 0.5")
    bytes_.add(1_000_000)
    assert counted.line() == "training: 40 of 80 steps (50%), 01:30, about 03:00 left, loss 0.5"
    assert bytes_.line() == "scoring rows.jsonl: 1.00MB of 4.00MB (25%), 01:30, about 04:30 left"
    assert unknown.line() == "loading some/model: 01:30"
    for work in (counted, bytes_, unknown):
        work.close()


def test_quick_work_shows_nothing_and_work_that_stays_its_end(clock):
    out = io.StringIO()
    with redirect_stderr(out), LongWork("loading"), LongWork("reading", 10, "row") as work:
        work.add(10)
    assert out.getvalue() == ""
    with redirect_stderr(out), LongWork("training", 2, "step", stays=True) as work:
        work.add(2)
    assert out.getvalue() == "training: 2 of 2 steps (100%), 00:00\n"
    work.close()
    assert out.getvalue().count("\n") == 1


def test_work_within_work_speaks_for_both(monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY", 0.02)
    out = io.StringIO()
    with redirect_stderr(out), LongWork("training", 9, "step"):
        inner = LongWork("evaluating", 3, "pair")
        place = len(out.getvalue())
        deadline = time.monotonic() + 60
        while out.getvalue().count("evaluating") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        inside = out.getvalue()[place:]
        inner.close()
    assert inside.count("evaluating") >= 3
    assert "training" not in inside


def test_a_terminal_gets_a_bar_and_other_processes_nothing(clock, monkeypatch):
    screen = Terminal()
    with redirect_stderr(screen), LongWork("scoring", 4, "pair", stays=True) as work:
        work.add(4)
    assert "\r" in screen.getvalue()
    assert "4/4" in screen.getvalue()
    screen = Terminal()
    monkeypatch.setenv("TERM", "dumb")
    with redirect_stderr(screen), LongWork("scoring", 4, "pair", stays=True):
        pass
    assert screen.getvalue() == "scoring: 0 of 4 pairs (0%), 00:00\n"
    monkeypatch.setenv("RANK", "1")
    screen = Terminal()
    with redirect_stderr(screen), LongWork("scoring", 4, "pair", stays=True) as work:
        work.add(1)
        work.note("text")
    assert screen.getvalue() == ""


def test_nobody_listening_stops_no_work(clock):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with redirect_stderr(Gone()), LongWork("training", 2, "step", stays=True) as work:
        work.add(1)
    assert work.done == 1


@pytest.mark.parametrize(
    ("cuda", "why"),
    [("13.0", "is built for CUDA 13.0, for which the driver may be too old"), (None, "is built without CUDA")],
)
def test_a_gpu_that_torch_cannot_use_is_said(tmp_path, monkeypatch, cuda, why):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    pattern = str(tmp_path / "nvidia[0-9]*").removeprefix("/")
    monkeypatch.setattr(console, "GPU_FILES", (pattern,))
    assert console.unused_gpu() is None
    (tmp_path / "nvidia0").touch()
    what, to_do = console.unused_gpu()
    assert what.startswith(f"this machine has a GPU ({tmp_path / 'nvidia0'}), but torch ")
    assert why in what
    assert "CUDA_VISIBLE_DEVICES=" in to_do
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert console.unused_gpu() is None, "the user has said so"
