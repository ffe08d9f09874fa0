"""Processes that start at once: forked from a server that has imported everything, one or several in a group.

A fresh interpreter takes ten seconds or more to import torch, DeepSpeed and transformers on a small machine; a fork of
one that has done so takes none. What a child prints goes to a file. A child that outlives its time is killed.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest

LEFT_BEHIND = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_context = multiprocessing.get_context("forkserver")


@functools.cache
def _server() -> None:
    """Start the process that children are forked from; it finds modules only by PYTHONPATH, whatever `sys.path` is.

    Its hash seed is not that of this process.
    """
    _context.set_forkserver_preload(["support.trajectories"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("PYTHONHASHSEED", "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2")
        forkserver.ensure_running()


def start(
    function: Callable[..., Any],
    *arguments: Any,
    log: Path,
    world: int = 1,
    errors: Path | None = None,
    with_children: bool = False,
    **keywords: Any,
) -> list[ForkServerProcess]:
    """Start `function` in a process, or in `world` processes of one group as a launcher would.

    What it prints goes to `log`, its standard error to `errors` if that is given. A process that starts others itself
    needs `with_children`; the caller ends it then whatever happens.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if world > 1 else {}
    _server()
    processes = []
    for rank in range(world):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world} if world > 1 else {}
        # the server that children come from may have been started with other variables; those of a launcher are what
        # libraries leave in this process after a run
        own = {name: value for name, value in os.environ.items() if name not in LEFT_BEHIND}
        variables = {**own, **{key: str(value) for key, value in {**address, **group}.items()}}
        files = (str(log), str(errors or log))
        process = _context.Process(
            target=_child, args=(variables, files, function, arguments, keywords), daemon=not with_children
        )
        process.start()
        processes.append(process)
    return processes


def wait(processes: Sequence[ForkServerProcess], timeout: float = 120) -> list[int | None]:
    """Exit codes (negative: the signal that ended it); all are killed if one takes longer than `timeout` seconds."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def command(*arguments: str) -> None:
    """`btrm ARGUMENTS` in a child."""
    from btrm_core.cli import main

    sys.argv = ["btrm", *arguments]
    main()


@dataclasses.dataclass(frozen=True)
class Ended:
    """What `btrm` printed, and how it ended (negative: the signal)."""

    returncode: int | None
    stdout: str
    stderr: str


def btrm(*arguments: str, timeout: float = 200) -> Ended:
    """`btrm ARGUMENTS` in a child with the environment and the `sys.path` of this process."""
    return ended(command, *arguments, timeout=timeout)


def ended(function: Callable[..., Any], *arguments: Any, timeout: float = 200, with_children: bool = False) -> Ended:
    """What `function` prints in such a child, and how it ends."""
    with tempfile.TemporaryDirectory() as place:
        output, errors = Path(place, "stdout"), Path(place, "stderr")
        child = start(function, *arguments, log=output, errors=errors, with_children=with_children)
        (code,) = wait(child, timeout)
        return Ended(code, output.read_text(encoding="utf-8"), errors.read_text(encoding="utf-8"))


def ending(function: Callable[..., Any], *arguments: Any) -> NoReturn:
    """Call `function` in a process that was just forked, and end it as an interpreter would."""
    status: Any = 1
    try:
        function(*arguments)
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def until(condition: Callable[[], bool], processes: Sequence[ForkServerProcess], timeout: float = 60) -> None:
    """Wait until `condition` holds; fails if it does not in time, or all processes have ended."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "not in time"
        assert any(process.is_alive() for process in processes) or condition(), "the processes have ended"
        time.sleep(0.005)


def _child(
    variables: dict[str, str],
    files: tuple[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    import torch

    gc.freeze()  # what was imported: DeepSpeed looks through all there is whenever it starts under ZeRO-3
    os.environ.clear()
    os.environ.update(variables)
    # as from a terminal: the tests may run under nohup, or in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    for name, stream in zip(files, (1, 2), strict=True):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    function(*arguments, **keywords)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
