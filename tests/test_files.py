"""Directories come to their place whole or not at all, and one process holds a file at a time."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from btrm_core import files, locks, outputs
from btrm_core.errors import CheckpointError, DataError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def half_made(target, error):
    with files.whole_directory(target) as folder:
        (folder / "x").write_text("half")
        raise error


def test_a_directory_is_there_when_its_block_ends(tmp_path):
    target = tmp_path / "deep" / "model"
    with files.whole_directory(target) as folder:
        (folder / "x").write_text("made")
        (folder / "x").chmod(0o600)
        assert not target.exists()
    assert (target / "x").read_text() == "made"
    assert (target / "x").stat().st_mode & 0o777 == 0o644
    assert target.stat().st_mode & 0o777 == 0o755
    assert names(target.parent) == ["model"]


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_nothing_is_left_of_one_that_fails(tmp_path, error):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x").write_text("before")
    with pytest.raises(type(error)):
        half_made(tmp_path / "model", error)
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "x").read_text() == "before"


@pytest.mark.parametrize("keep", [None, lambda _: False])
def test_it_replaces_what_was_there(tmp_path, keep):
    for text in ("first", "second"):
        with files.whole_directory(tmp_path / "model", keep) as folder:
            (folder / "x").write_text(text)
    assert (tmp_path / "model" / "x").read_text() == "second"
    assert names(tmp_path) == ["model"]


def test_it_gives_way_to_what_is_to_be_kept(tmp_path):
    for text in ("first", "second"):
        with files.whole_directory(tmp_path / "model", lambda there: (there / "x").exists()) as folder:
            (folder / "x").write_text(text)
    assert (tmp_path / "model" / "x").read_text() == "first"
    assert names(tmp_path) == ["model"]


def test_remains_of_killed_processes_go_and_what_runs_stays(tmp_path):
    code = (
        "import sys; from pathlib import Path; from btrm_core import files\n"
        "with files.whole_directory(Path(sys.argv[1])) as made: print(made, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "other")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builder:
        building = Path(builder.stdout.readline().strip())
        os.utime(building, (time.time() - 3600,) * 2)
        files.sweep(tmp_path)
        assert building.exists()
        builder.kill()
        builder.wait()
        with files.whole_directory(tmp_path / "model"):
            pass
    assert names(tmp_path) == ["model"]


def test_without_locks_what_is_left_goes_after_a_day(tmp_path, monkeypatch):
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    for name, age in ((".building-old", 25), (".building-new", 1)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age * 3600,) * 2)
    files.sweep(tmp_path)
    assert names(tmp_path) == [".building-new"]


def test_a_file_is_held_by_one_process(tmp_path):
    path = tmp_path / "lock"
    code = f"from btrm_core.locks import hold; print(hold(open({str(path)!r}, 'a')))"
    with path.open("a") as stream:
        assert locks.hold(stream)
        said = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout]
    said += [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout]
    assert said == ["False\n", "True\n"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "whatever"),
        OSError(122, "Disk quota exceeded"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_every_library_says_in_its_own_words_that_the_disk_is_full(error):
    assert files.disk_is_full(error)
    assert not files.disk_is_full(OSError(13, "Permission denied"))


def _full(times: int) -> tuple[list[int], Callable[[], None]]:
    """A write that finds the disk full so many times."""
    tried: list[int] = []

    def write() -> None:
        tried.append(1)
        if len(tried) <= times:
            error = OSError(errno.ENOSPC, "No space left on device")
            raise files.explained(error, Path("run/model")) from error

    return tried, write


def test_a_full_disk_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "AGAIN_SECONDS", 0.0)
    tried, write = _full(2)
    told = list(files.until_there_is_room(write, 600.0, lambda: False))
    assert (len(tried), len(told)) == (3, 2)
    assert told[0].startswith(
        "the disk is full while saving run/model; nothing was left behind. Free some space: trying"
    )
    tried, write = _full(1)
    with pytest.raises(CheckpointError, match="the disk is full"):
        list(files.until_there_is_room(write, 600.0, lambda: True))
    with pytest.raises(CheckpointError, match="the disk is full"):
        list(files.until_there_is_room(_full(1)[1], 0.0, lambda: False))


@pytest.mark.parametrize("said", [OSError(errno.EFBIG, "File too large"), Exception("I/O error: (os error 27)")])
def test_a_file_that_may_not_be_so_large_is_not_waited_for(said: Exception) -> None:
    def write() -> None:
        raise files.explained(said, Path("run/model")) from said

    with pytest.raises(CheckpointError):
        list(files.until_there_is_room(write, 600.0, lambda: False))


def test_a_number_in_the_name_of_what_finds_no_room_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "AGAIN_SECONDS", 0.0)
    found = [Exception("writing run-27/model: No space left on device (os error 28)")]

    def write() -> None:
        if found:
            error = found.pop()
            raise files.explained(error, Path("run-27/model")) from error

    assert len(list(files.until_there_is_room(write, 600.0, lambda: False))) == 1


@pytest.mark.parametrize(
    ("flushing", "allowing", "locking"),
    [
        (errno.EINVAL, errno.EPERM, errno.ENOLCK),
        (errno.ENOSYS, errno.ENOTSUP, errno.ENOSYS),
        (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL),
        (errno.EPERM, errno.EACCES, errno.EIO),
    ],
)
def test_what_a_file_system_cannot_do_does_not_fail_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushing: int, allowing: int, locking: int
) -> None:
    """As on network file systems: nothing to flush, modes that cannot be changed, no locks, no size."""

    def refuse(number: int) -> Callable[..., None]:
        def refusing(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        return refusing

    monkeypatch.setattr(os, "fsync", refuse(flushing))
    monkeypatch.setattr(Path, "chmod", refuse(allowing))
    monkeypatch.setattr(locks.fcntl, "flock", refuse(locking))
    monkeypatch.setattr(os, "statvfs", refuse(errno.ENOSYS))
    with files.whole_directory(tmp_path / "model") as staging:
        (staging / "file").write_text("whole")
    assert (tmp_path / "model" / "file").read_text() == "whole"
    with files.output_lock(tmp_path / "run", is_main=True):
        assert files.probe(tmp_path / "run") > 0


def test_a_file_system_that_does_not_say_how_large_it_is_is_not_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255)))
    assert files.probe(tmp_path) == sys.maxsize


def test_a_file_that_cannot_be_flushed_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"cannot write to the output directory .*: Input/output error"):
        files.probe(tmp_path)


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    old, link = tmp_path / "disk" / "model", tmp_path / "model"
    old.mkdir(parents=True)
    (old / "old").touch()
    link.symlink_to(old)
    with files.whole_directory(link) as folder:
        (folder / "new").touch()
    assert link.is_symlink()
    assert [path.name for path in old.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(files.BUILDING)] == []


def test_a_file_is_never_replaced_by_a_directory(tmp_path):
    (tmp_path / "model").write_text("mine")
    with (
        pytest.raises(NotADirectoryError, match="is there and is no directory"),
        files.whole_directory(tmp_path / "model"),
    ):
        pass
    assert (tmp_path / "model").read_text() == "mine"


def test_what_is_written_as_it_stands(tmp_path):
    import socket

    assert outputs.output_file("-") is outputs.output_file("/dev/stdout") is outputs.output_file("/dev/null") is None
    assert outputs.output_file(str(tmp_path / "new")) == (tmp_path / "new").resolve()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "door"))
        with pytest.raises(DataError, match=r"it is a socket, no file"):
            outputs.output_file(str(tmp_path / "door"))
    for output in ("a\0b", "x" * 300, "~nouser-of-this-name/x"):
        with pytest.raises(DataError, match=r"^cannot write to ") as error:
            outputs.output_file(output)
        assert "\n" not in str(error.value)


def test_a_whole_file_replaces_regular_files_alone(tmp_path, capfdbinary):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with outputs.whole_file(str(tmp_path / "link")) as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"
    with suppress(RuntimeError), outputs.whole_file(str(tmp_path / "there")) as part:
        part.write_text("half")
        raise RuntimeError
    assert (tmp_path / "there").read_text() == "new"
    for output, seen in (("/dev/null", b""), ("/dev/stdout", b"told"), ("-", b"told")):
        with outputs.whole_file(output) as part:
            part.write_bytes(b"told")
        assert capfdbinary.readouterr().out == seen
    assert Path("/dev/null").is_char_device()


def test_the_scores_of_an_evaluation_never_replace_a_device():
    from btrm_core.evaluation import write_scores

    write_scores([], "/dev/null")
    assert Path("/dev/null").is_char_device()
