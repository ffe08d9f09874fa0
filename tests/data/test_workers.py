"""Encoding in several processes: none outlives the others, none is waited for in vain, a signal stops all at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.encoding import Endless

from btrm_core import cache
from btrm_core.data.workers import in_order
from btrm_core.errors import DataError

SECONDS = 120.0
"""How long things may take on a busy machine that take two seconds on another; what hangs, hangs for ten minutes."""

pytestmark = pytest.mark.timeout(400)


def encoding(then: str, root: Path, **more: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([more.pop("first", ""), *sys.path]).strip(os.pathsep)
    environment = {**os.environ, "BTRM_CACHE": str(root), "PYTHONPATH": path, **more}
    return subprocess.Popen(
        [sys.executable, "-m", "support.encoding", "encode", then],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # what is sent to its group is sent to all of them, as by a terminal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that encodes with two processes, both of them at work."""
    with encoding("wait", tmp_path) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "done 1\n":
                pytest.fail(process.communicate(timeout=SECONDS)[1])
            yield process
        finally:
            for member in group(process.pid):
                os.kill(member, signal.SIGKILL)


def group(leader: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            found.append(int(folder.name))
    return found


def encoders(leader: int) -> list[int]:
    """Those of them that encode."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in group(leader)}
    return [pid for pid, command in commands.items() if b"spawn_main" in command]


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "btrm: interrupted"), (signal.SIGTERM, 143, "btrm: stopped by SIGTERM")],
)
def test_a_signal_stops_encoding_at_once(
    number: int, code: int, said: str, at_work: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert len(encoders(at_work.pid)) == 2
    assert [path.name[:10] for path in (tmp_path / "encoded").iterdir()] == [".building-"]
    os.killpg(at_work.pid, number)
    _, errors = at_work.communicate(timeout=SECONDS)
    assert (at_work.returncode, errors.splitlines()) == (code, [said])
    assert until(lambda: not group(at_work.pid))
    assert list((tmp_path / "encoded").iterdir()) == []


def test_encoders_end_with_a_killed_main_process(at_work: subprocess.Popen[str], tmp_path: Path) -> None:
    assert len(encoders(at_work.pid)) == 2
    at_work.kill()
    assert until(lambda: not group(at_work.pid)), "encoding processes outlive their parent"
    (left,) = (tmp_path / "encoded").iterdir()
    os.utime(left, (0, 0))
    cache.build_once(tmp_path / "encoded" / "key", lambda _: None)
    assert [path.name for path in (tmp_path / "encoded").iterdir()] == ["key"]


def test_a_killed_encoder_ends_the_work_with_one_line(at_work: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(encoders(at_work.pid)[0], signal.SIGKILL)
    _, errors = at_work.communicate(timeout=SECONDS)
    assert at_work.returncode == 2
    assert errors.splitlines() == [
        "btrm: an encoding process ended early (killed by SIGKILL): memory may have run out. "
        "Try fewer workers with --set data.workers=1."
    ]
    assert until(lambda: not group(at_work.pid))
    assert list((tmp_path / "encoded").iterdir()) == []


@pytest.mark.parametrize("when", ["before it reads", "while it reads"])
def test_an_encoder_that_dies_while_starting_is_not_waited_for(when: str, tmp_path: Path) -> None:
    """It is told more than a pipe holds, and dies before it has read that."""
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif '--multiprocessing-fork' in sys.argv: os._exit(7)\n")
    first = str(tmp_path) if when == "before it reads" else ""
    with encoding("die", tmp_path / "cache", first=first) as process:
        try:
            _, errors = process.communicate(timeout=SECONDS)
        finally:
            for member in group(process.pid):
                os.kill(member, signal.SIGKILL)
    assert process.returncode == 2
    assert errors.startswith("btrm: an encoding process ended early while it was starting (exit code 7): memory may ")
    assert errors.count("\n") == 1


def test_errors_of_encoders_arrive_as_they_are(tmp_path: Path) -> None:
    chat = Endless()
    with pytest.raises(LookupError, match="what the chat format says") as caught:
        list(in_order(encode_or_fail, (chat,), [("fine",), ("fail",)], 1))
    assert "in an encoding process" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Unsent: cannot be copied"):
        list(in_order(encode_or_fail, (chat,), [("unsent",)], 1))


class Unsent(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> str:
        raise DataError("no")


def encode_or_fail(chat: Endless, what: str) -> int:
    if what == "unsent":
        raise Unsent("cannot be copied")
    return len(chat.encode_groups([(what, ["yes"])]))


def test_results_come_in_the_order_of_the_tasks_and_no_more_are_made_than_wanted() -> None:
    numbers = in_order(divmod, (100,), [(n,) for n in range(1, 31)], 2)
    assert [next(numbers) for _ in range(3)] == [(100, 0), (50, 0), (33, 1)]
    assert list(numbers) == [divmod(100, n) for n in range(4, 31)]
    assert list(in_order(divmod, (100,), [], 1)) == []
