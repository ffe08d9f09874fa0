"""Processes that share the work on one long list of tasks, and that never outlive the process that started them.

Decides: how they are started, how far they are ahead of the reader, and that the others are ended at once when one dies
or the work is stopped. They leave every signal that asks to stop to the process that started them, and end with it,
however it ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn, cast

from btrm_core.errors import DataError
from btrm_core.signals import end_with, held_back

_TASKS_EACH = 2
"""Tasks that a process has been given: what it does, and what it goes on with while its result is read."""
_AHEAD = 3
"""Tasks for each process, read and unread, that may be under way, so that memory does not grow with the data."""
_END_SECONDS = 5.0


def may_start_processes() -> bool:
    """False in a process that Python does not allow to have children, as those of its own pools."""
    return not multiprocessing.current_process().daemon


def in_order(
    function: Callable[..., Any], common: tuple[Any, ...], tasks: Sequence[tuple[Any, ...]], workers: int
) -> Generator[Any, None, None]:
    """Yield `function(*common, *task)` of every task, in their order, made by several processes.

    Args:
        function: what to do; found by its name in the other processes.
        common: arguments of all tasks; sent once to every process.
        tasks: further arguments of each.
        workers: how many processes, at least 1.

    Raises:
        DataError: a process died, while it was starting or at work.
    """
    team = _Team()
    try:
        team.start(workers, ForkingPickler.dumps((function, common)))
        done: dict[int, Any] = {}
        asked = 0
        for number in range(len(tasks)):
            while number not in done:
                while asked < min(len(tasks), number + _AHEAD * workers) and team.ask(asked, tasks[asked]):
                    asked += 1
                done |= team.answers()
            yield done.pop(number)
    finally:
        team.end()


class _Team:
    """The processes, by the connections to them, and how many tasks each has been given."""

    def __init__(self) -> None:
        self.processes: dict[Connection, Any] = {}
        self.given: dict[Connection, int] = {}

    def start(self, workers: int, work: memoryview) -> None:
        """Start them all, then tell each what it will do, and wait until all are ready or one has died.

        That goes by the connections: what is handed to a new process at its start is written to a pipe whose reading
        end is open in this process too, so that a new process that dies early is waited for until the end of days.
        """
        # Not forked: a fork copies locks that the tokenizer's or torch's threads may hold, and hangs.
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # it would let the signals through again that are held back below
        for _ in range(workers):
            ours, theirs = context.Pipe()
            with held_back():
                process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
                process.start()
                self.processes[ours] = process
            theirs.close()
        for connection in self.processes:
            try:
                connection.send_bytes(work)
            except OSError:
                self._died(connection, " while it was starting")
            self.given[connection] = 1
        while any(self.given.values()):
            self.answers(" while it was starting")

    def ask(self, number: int, task: tuple[Any, ...]) -> bool:
        """Give a task to the process that has fewest; False if all have enough."""
        connection = min(self.given, key=lambda one: self.given[one])
        if self.given[connection] >= _TASKS_EACH:
            return False
        try:
            connection.send((number, task))
        except OSError:
            self._died(connection)
        self.given[connection] += 1
        return True

    def answers(self, when: str = "") -> dict[int, Any]:
        """The results that are there by now, by number; waits for one if there are none."""
        found = {}
        for ready in wait([connection for connection, given in self.given.items() if given]):
            connection = cast("Connection", ready)
            try:
                number, result, error = connection.recv()
            except (EOFError, OSError):
                self._died(connection, when)
            if error is not None:
                raise error
            self.given[connection] -= 1
            found[number] = result
        return found

    def _died(self, connection: Connection, when: str = "") -> NoReturn:
        process = self.processes[connection]
        process.join(_END_SECONDS)
        code = process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        why = "memory may have run out"
        if when:
            why += ", or a script starts btrm without an 'if __name__ == \"__main__\":' guard"
        raise DataError(
            f"an encoding process ended early{when} ({how}): {why}. Try fewer workers with --set data.workers=1."
        )

    def end(self) -> None:
        """End them all at once: what they are doing is of no use any more."""
        with held_back():
            for process in self.processes.values():
                process.kill()
        for connection, process in self.processes.items():
            connection.close()
            process.join()


def _serve(connection: Connection, parent: int) -> None:
    """What each process does: receive its work, then tasks, until it is ended."""
    end_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    with contextlib.suppress(EOFError, OSError):  # the process that started it is gone
        try:
            function, common = connection.recv()
        except (EOFError, OSError):
            raise
        except Exception as error:
            connection.send((-1, None, _portable(error)))
            return
        connection.send((-1, None, None))
        while True:
            number, task = connection.recv()
            answer: tuple[int, Any, Exception | None]
            try:
                answer = number, function(*common, *task), None
            except Exception as error:
                answer = number, None, _portable(error)
            connection.send(answer)


def _portable(error: Exception) -> Exception:
    """An exception as it can be sent to another process, with what it says of where it came from."""
    told = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception of a stranger's does when it is copied
        return RuntimeError(told)
    if isinstance(copy, Exception):
        copy.add_note(f"in an encoding process:\n{told}")
        return copy
    return RuntimeError(told)
