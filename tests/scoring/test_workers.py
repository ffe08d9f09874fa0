"""Several processes score one file: the rewards, the order, and processes that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support import processes
from support.scorer_samples import base_model, reward_model
from support.serving import until

from btrm_core.cli import main
from btrm_core.errors import BtrmError, CheckpointError, ConfigError, DataError
from btrm_core.scoring import Scorer, Workers, devices, score_file
from btrm_core.scoring.bulk.windows import Finished, Windows
from btrm_core.scoring.bulk.worker import Job, that_travels
from btrm_core.scoring.bulk.workers import TRIES, _Worker

OPTIONS: dict[str, Any] = {"tokens_per_batch": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("workers") / "model")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """A file of many windows, some rows of it broken, and what one process makes of it."""
    root = tmp_path_factory.mktemp("expected")
    rows: list[Any] = [{"prompt": f"Say {n}. " * (1 + n % 5), "chosen": f"{n}", "rejected": "No."} for n in range(120)]
    rows[7], rows[90] = {"text": "no row"}, 7
    source = root / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = Scorer(str(model), device="cpu", **OPTIONS)
    assert sum(1 for _ in Windows(source, 0, 16)) > 8
    score_file(scorer, str(source), str(root / "out.jsonl"))
    return str(source), (root / "out.jsonl").read_bytes()


class Struck(Workers):
    """Workers of which one is killed when a window is back, and those that get one of the rows `ends` are too."""

    strikes = 0
    ends: tuple[int, ...] = ()

    def finished(self, windows: Windows) -> Iterator[Finished]:
        for number, window in enumerate(super().finished(windows)):
            if number == 1 and self.strikes:
                self.strikes -= 1
                os.kill(self.pids[0], signal.SIGKILL)
            yield window

    def _hand(self, worker: _Worker, job: Job) -> None:
        super()._hand(worker, job)
        if {number for number, _ in job.window.rows} & set(self.ends):
            worker.process.kill()


@pytest.fixture(scope="module")
def workers(model: Path) -> Iterator[Struck]:
    with Struck(str(model), ["cpu", "cpu"], **OPTIONS) as found:
        yield found
        pids = found.pids
    assert all(gone(pid) for pid in pids)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_many_processes_give_what_one_gives(workers: Struck, expected: tuple[str, bytes], tmp_path: Path) -> None:
    source, whole = expected
    said = score_file(workers, source, str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert "118 pairs scored" in said
    assert "2 not scored (line 8: " in said


def test_a_killed_process_loses_nothing(
    workers: Struck, expected: tuple[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, whole = expected
    workers.strikes, before = 1, workers.pids
    score_file(workers, source, str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert workers.pids[0] != before[0]
    assert workers.pids[1] == before[1]
    assert "a process that scores has ended by signal 9; another one takes its" in caplog.text


@pytest.mark.slow
def test_rows_that_end_every_process_are_named_and_what_comes_before_is_kept(
    workers: Struck, expected: tuple[str, bytes], tmp_path: Path
) -> None:
    source, whole = expected
    rows = next(window for window in Windows(Path(source), 0, 16) if 61 in [number for number, _ in window.rows])
    first, last = rows.rows[0][0], rows.rows[-1][0]
    workers.ends = (61,)
    with pytest.raises(DataError, match=rf"^lines {first} to {last}: {TRIES} processes ended while they scored these"):
        score_file(workers, source, str(tmp_path / "out.jsonl"))
    kept = (tmp_path / "out.jsonl.partial").read_bytes()
    assert kept.count(b"\n") <= first - 1
    assert whole.startswith(kept)
    workers.ends = ()
    score_file(workers, source, str(tmp_path / "out.jsonl"))  # the same workers, and the same command
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_file_that_breaks_off_gives_what_comes_before(workers: Struck, tmp_path: Path) -> None:
    import gzip

    rows = "".join(json.dumps({"prompt": f"Say {n}.", "response": f"{n}"}) + "\n" for n in range(200)).encode()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(rows)[:-60])
    with pytest.raises(DataError, match=r"in\.jsonl\.gz cannot be read after line \d+") as refused:
        score_file(workers, str(tmp_path / "in.jsonl.gz"), str(tmp_path / "out.jsonl"))
    kept = (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n")
    assert f"after line {kept} " in str(refused.value)


def refused(model: str) -> None:
    """In a child: say why there are no workers, which would be forks of it."""
    forks = types.SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    vars(sys.modules[Workers.__module__])["multiprocessing"] = forks
    try:
        Workers(model, ["cpu"], **OPTIONS)
    except CheckpointError as error:
        print(error)


def test_a_model_that_cannot_be_loaded_is_said_once(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama3")
    done = processes.ended(refused, str(base), with_children=True)
    assert done.stdout.count("holds no reward head") == 1, done


def leading(*arguments: str) -> None:
    """`btrm` in a child that leads a process group, as one that a shell starts."""
    os.setpgid(0, 0)
    processes.command(*arguments)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_all_processes_end_with_the_command(model: Path, tmp_path: Path, end: signal.Signals) -> None:
    """Ctrl-C reaches all of them, as from a terminal; a kill the command alone."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Say {n}.", "response": "Yes"}) + "\n" for n in range(100_000)))
    arguments = ("score", str(model), str(source), "-o", str(tmp_path / "out.jsonl"), "--processes", "2")
    partial, log = tmp_path / "out.jsonl.partial", tmp_path / "log"
    (called,) = processes.start(leading, *arguments, log=log, with_children=True)
    pid = int(called.pid or 0)
    try:
        until(lambda: partial.exists() and partial.stat().st_size > 0, 400)
        children = [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        assert len(children) >= 2
        if end == signal.SIGINT:
            os.killpg(pid, end)
        else:
            os.kill(pid, end)
        called.join(100)
    finally:
        called.kill()
    assert called.exitcode == (130 if end == signal.SIGINT else -end)
    assert "Traceback" not in log.read_text()
    until(lambda: all(gone(pid) for pid in children), 60)
    if end == signal.SIGINT:
        assert "the same command goes on from there" in log.read_text()
    assert partial.read_bytes().endswith(b"\n")


def test_what_is_asked_for_must_make_sense(model: Path, tmp_path: Path) -> None:
    assert devices(None, None) == []
    assert devices(None, 2) == [None, None]
    cases: list[tuple[str | None, int | None, str]] = [
        ("1", 1, "expected one of them"),
        (None, 0, "expected 1 or more"),
        ("1", None, "sees no GPU"),
        ("x", None, "sees no GPU"),
    ]
    for gpus, count, reason in cases:
        with pytest.raises(ConfigError, match=reason):
            devices(gpus, count)
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "Hi", "response": "Yes"}\n')
    for flags in (["--processes", "0"], ["--engine", "ray"], ["--engine", "ray", "--processes", "0"]):
        called = CliRunner().invoke(main, ["score", str(model), str(source), "-o", str(tmp_path / "out"), *flags])
        assert called.exit_code == 2
        assert "expected" in called.stderr


def test_errors_travel() -> None:
    class Local(BtrmError):
        """A class that another process does not know."""

    assert isinstance(that_travels(DataError("x")), DataError)
    assert str(that_travels(Local("what is wrong"))) == "what is wrong"
