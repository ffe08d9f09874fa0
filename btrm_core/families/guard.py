"""A plugin's code runs inside this: it cannot end the process, write into its results, or keep it waiting in silence.

Decides what an import or a hook may not do. Whatever it raises, `SystemExit` and `KeyboardInterrupt` included, becomes
an ordinary exception that a caller can name; the user's own Ctrl-C stays what it is. What it changes of the process
(directory, environment, signals, functions of others) is put back, and said.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from btrm_core.errors import FamilyError, one_line

SLOW_SECONDS = 5.0
"""After this time a line says who is waited for."""


@contextlib.contextmanager
def guarded(who: str) -> Iterator[None]:
    """Run a plugin's code.

    Args:
        who: what is waited for, in words, if it takes long.

    Raises:
        FamilyError: the code tried to end the process, or raised what is no `Exception`, which is the `__cause__`.
    """
    timer = threading.Timer(SLOW_SECONDS, _say, [f"btrm: still waiting for {who}"])
    timer.daemon = True
    timer.start()
    try:
        with _put_back(who), contextlib.redirect_stdout(sys.stderr), _no_exit(), _ctrl_c() as pressed:
            try:
                yield
            except Exception:
                raise
            except BaseException as error:
                if pressed and isinstance(error, KeyboardInterrupt):
                    raise
                raise FamilyError(one_line(error)) from error
    finally:
        timer.cancel()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _no_exit() -> Iterator[None]:
    """Turn `os._exit` and `os.abort`, which nobody could catch, into errors; a child that was forked may still end."""
    before = {name: getattr(os, name) for name in ("_exit", "abort")}
    process, active = os.getpid(), True

    def refuse(name: str) -> Any:
        def ended(*code: int) -> NoReturn:
            if not active or os.getpid() != process:
                before[name](*code)
            raise FamilyError(f"it tries to end the process with os.{name}({', '.join(map(str, code))})")

        return ended

    for name in before:
        setattr(os, name, refuse(name))
    try:
        yield
    finally:
        active = False  # whoever kept the function may end the process from now on
        for name, function in before.items():
            setattr(os, name, function)


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[bool]]:
    """Fill the list when the user presses Ctrl-C, which only the main thread hears of."""
    pressed: list[bool] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield pressed
        return

    def note(number: int, frame: Any) -> None:
        pressed.append(True)
        handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGCHLD, signal.SIGUSR1)
_MODULES = (builtins, json, os, signal, subprocess, sys)
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_exit = os._exit


@contextlib.contextmanager
def _put_back(who: str) -> Iterator[None]:
    """Leave the process as the plugin found it, and say what it changed; a copy of the process that it made ends."""
    process = os.getpid()
    found = {what: read() for what, (read, _) in _KEPT.items()}
    functions = [(module, name, v) for module in _MODULES for name, v in vars(module).items() if callable(v)]
    hidden = _hidden()
    timer, variables = signal.getitimer(signal.ITIMER_REAL)[0], dict(os.environ)
    try:
        yield
    finally:
        if os.getpid() != process:
            _exit(1)
        changed = _put_back_environment(variables)
        for module, name, function in functions:
            if vars(module).get(name) is not function:
                setattr(module, name, function)
                changed.append(f"{module.__name__}.{name}")
        for what, (read, write) in _KEPT.items():
            if read() != found[what]:
                with contextlib.suppress(OSError, ValueError):
                    write(found[what])
                    changed.append(what)
        for name in _hidden() - hidden:
            del sys.modules[name]
            changed.append(f"sys.modules[{name!r}]")
        if not timer and signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, 0)
            changed.append("the alarm clock")
        if changed:
            _say(f"btrm: {who} changes {', '.join(changed[:5])}, which is no plugin's to change; put back")


def _hidden() -> set[str]:
    """Names of modules that cannot be imported, for None stands in their place; asked at every hook, mostly none."""
    if None not in sys.modules.values():
        return set()
    return {name for name, module in list(sys.modules.items()) if module is None}


def _directory() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was removed
        return None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _put_back_environment(before: dict[str, str]) -> list[str]:
    """Variables that were there, and those of launchers; others may be set by a library that a hook imports."""
    changed = [name for name, value in before.items() if os.environ.get(name) != value]
    added = [name for name in _LAUNCHER if name in os.environ and name not in before]
    for name in added:
        del os.environ[name]
    os.environ.update({name: before[name] for name in changed})
    return [f"the variable {name}" for name in changed + added]


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in _SIGNALS]


def _set_handlers(before: list[Any]) -> None:
    for number, handler in zip(_SIGNALS, before, strict=True):
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)  # in the main thread, which alone can have changed it


def _torch() -> tuple[Any, ...]:
    """The defaults of torch, or what they are before it is imported."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_default_device"):
        return ("torch.float32", "cpu", True)
    return str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled()


def _set_torch(before: tuple[Any, ...]) -> None:
    import torch

    dtype, device, gradients = before
    torch.set_default_dtype(getattr(torch, dtype.removeprefix("torch.")))
    torch.set_default_device(None if device == "cpu" else device)
    torch.set_grad_enabled(gradients)


_KEPT: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "the current directory": (_directory, lambda path: os.chdir(path) if path else None),
    "the handling of signals": (_handlers, _set_handlers),
    "the umask": (_umask, os.umask),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "the trace function": (sys.gettrace, sys.settrace),
    "standard error": (lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
    "torch's defaults": (_torch, _set_torch),
}
