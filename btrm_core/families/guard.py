"""A plugin's code runs inside this: it cannot end the process, write into its results, or keep it waiting in silence.

Decides what an import or a hook may not do. Whatever it raises, `SystemExit` and `KeyboardInterrupt` included, becomes
an ordinary exception that a caller can name; the user's own Ctrl-C stays what it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
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
        with contextlib.redirect_stdout(sys.stderr), _no_exit(), _ctrl_c() as pressed:
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
