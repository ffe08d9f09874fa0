"""What one of several scoring processes does: it waits for windows, encodes one ahead of the model, and sends rewards.

It ends with the process that started it, and leaves Ctrl-C to that one.
"""

from __future__ import annotations

import logging
import pickle
import queue
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from btrm_core.data import Naming
from btrm_core.errors import one_line
from btrm_core.scoring.bulk.windows import Window, finished_window, groups_of, records_of
from btrm_core.scoring.responses import Responses
from btrm_core.scoring.scorer import Scorer
from btrm_core.signals import end_with


@dataclass(frozen=True)
class Setup:
    """What a process is told.

    Attributes:
        model: as for `Scorer`.
        options: keywords of `Scorer`, the device among them.
        threads: of torch; 0 leaves them.
        parent: process id of the one that started it.
        loud: whether it says what is to be known of the model.
    """

    model: str
    options: dict[str, Any]
    threads: int
    parent: int
    loud: bool


@dataclass
class Job:
    """A window on its way.

    Attributes:
        number: its place in the file.
        window: its rows.
        naming: the user's own names of columns and roles.
        ended: how many processes ended while it was the first of theirs.
    """

    number: int
    window: Window
    naming: Naming
    ended: int = 0


def work(connection: Connection, setup: Setup) -> None:
    """Say which model it is, then score the jobs that come until this process is ended.

    Args:
        connection: jobs come through it, and finished windows go; an error is the last thing that does.
        setup: what to score with.
    """
    import torch

    end_with(setup.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if setup.threads:
        torch.set_num_threads(setup.threads)
    if not setup.loud:
        logging.disable(logging.WARNING)
    try:
        scorer = Scorer(setup.model, **setup.options)
        connection.send((scorer.identity, scorer.tokens_per_batch))
        ready: queue.Queue[Any] = queue.Queue(1)
        threading.Thread(target=_encode, args=(connection, scorer, ready), daemon=True).start()
        while not isinstance(job := ready.get(), BaseException):
            window, records, groups, encoded = job
            connection.send(finished_window(window, records, scorer.score_encoded(groups, encoded)))
        raise job
    except (EOFError, OSError):  # the other end is gone
        return
    except Exception as error:
        connection.send(that_travels(error))


def _encode(connection: Connection, scorer: Scorer, ready: queue.Queue[Any]) -> None:
    """Understand and encode the windows that come, one ahead of the model."""
    try:
        while True:
            job: Job = connection.recv()
            records = records_of(job.window, job.naming)
            groups: list[Responses] = groups_of(records)
            ready.put((job.window, records, groups, scorer.encode(groups)))
    except Exception as error:
        ready.put(error)


def that_travels(error: Exception) -> Exception:
    """The error, or one that says the same if it cannot be sent.

    Args:
        error: of any library.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(one_line(error))
    return error
