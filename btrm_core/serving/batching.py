"""Requests of many clients to batches of one device: a queue bounded in tokens, and one worker thread per device.

Decides when a batch begins: a worker that is free takes of what waits; while it computes, the next batch gathers. So a
lone request never waits for others, and many never wait for one. What it takes is `choosing`'s.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from btrm_core.errors import one_line
from btrm_core.serving.choosing import chosen, packed, together
from btrm_core.serving.limits import Limits, Refused, Unavailable, too_many
from btrm_core.serving.metrics import Metrics

_log = logging.getLogger("btrm.serving")


class Engine(Protocol):
    """What computes rewards of ids: a `Scorer`, or a server behind this one."""

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of a row."""

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the model so far."""

    def sequence_rewards(self, sequences: Sequence[Sequence[int]], together: Sequence[Hashable]) -> np.ndarray:
        """Return the rewards [S] of finished id sequences; see `Scorer.sequence_rewards`.

        Args:
            sequences: ids with the terminal token at their end.
            together: one key each; sequences of equal keys begin alike and share that beginning.
        """


@dataclass(eq=False)
class Work:
    """Sequences that are computed together, and where their rewards go.

    Attributes:
        sequences: ids of finished conversations.
        key: equal for works whose sequences begin alike; None if nothing is known.
        rewards: becomes the rewards, in order; cancelling it takes the work out of the queue.
        packed: the sequences as bytes that sort and compare as they do, at once.
    """

    sequences: list[list[int]]
    key: Hashable = None
    rewards: Future[list[float]] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    packed: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.packed = [packed(ids) for ids in self.sequences]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


class Batcher:
    """The queue and its workers.

    Args:
        engines: one per device, each used by one thread alone.
        limits: `queue_tokens` is the bound of the queue.
        metrics: where waits, batches and failures are counted.
    """

    def __init__(self, engines: Sequence[Engine], limits: Limits, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        self._waiting: deque[Work] = deque()
        self._tokens = 0
        self._changed = threading.Condition()
        self._closed = False
        metrics.watch_queue(lambda: self._tokens)
        self._threads = [
            threading.Thread(target=self._run, args=(engine,), name=f"btrm-device-{number}", daemon=True)
            for number, engine in enumerate(engines)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait."""
        return self._tokens

    def submit(self, works: Sequence[Work]) -> None:
        """Put works into the queue, all or none.

        Args:
            works: those of one request; each is done when its `rewards` future is.

        Raises:
            Refused: they are larger than the whole queue (422), or there is no room at the moment (503).
        """
        tokens = sum(work.tokens for work in works)
        if tokens > self._limits.queue_tokens:
            raise too_many("tokens", tokens, self._limits.queue_tokens)
        with self._changed:
            if self._closed:
                raise Refused(503, "stopping", "the server is stopping", {"Retry-After": "5"})
            if self._tokens + tokens > self._limits.queue_tokens:
                retry = {"Retry-After": str(self._limits.retry_seconds)}
                raise Refused(503, "queue_full", "the queue is full; try again", retry)
            for work in works:
                self._waiting.append(work)
                self._tokens += work.tokens
                work.rewards.add_done_callback(lambda future, work=work: self._forget(future, work))  # type: ignore[misc]
            self._changed.notify()

    def _forget(self, future: Future[list[float]], work: Work) -> None:
        """Make the room of a cancelled work free at once."""
        if not future.cancelled():
            return
        with self._changed:
            try:
                self._waiting.remove(work)
            except ValueError:
                return
            self._tokens -= work.tokens

    def close(self) -> None:
        """Let the workers finish what waits, and end them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=10)

    def _run(self, engine: Engine) -> None:
        while batch := self._take(engine.tokens_per_batch):
            started = time.monotonic()
            for work in batch:
                self._metrics.waited.observe(started - work.since)
            self._metrics.batch.observe(sum(work.tokens for work in batch))
            tokens = engine.computed_tokens
            self._compute(engine, batch)
            self._metrics.computed.observe(time.monotonic() - started)
            self._metrics.model_tokens.inc(engine.computed_tokens - tokens)
            del batch  # or the last request's ids stay in memory until the next one

    def _take(self, budget: int) -> list[Work]:
        """Wait for work and take it, up to a budget of tokens and at least one; empty at the end."""
        with self._changed:
            while True:
                taken: list[Work] = []
                for work in chosen(self._waiting, budget):
                    self._waiting.remove(work)
                    self._tokens -= work.tokens
                    if work.rewards.set_running_or_notify_cancel():
                        taken.append(work)
                if taken:
                    if self._waiting:
                        self._changed.notify()
                    return taken
                if self._closed:
                    return []
                self._changed.wait()

    def _compute(self, engine: Engine, batch: Sequence[Work]) -> None:
        """Give every work its rewards; a batch that fails is halved until the works that fail stand alone."""
        sequences = [ids for work in batch for ids in work.sequences]
        try:
            rewards = engine.sequence_rewards(sequences, together(batch)).tolist()
        except Exception as error:  # of any library: the thread must live on, and the request must be answered
            if len(batch) > 1 and not isinstance(error, Unavailable):
                middle = len(batch) // 2
                self._compute(engine, batch[:middle])
                self._compute(engine, batch[middle:])
                return
            _log.error("a computation of %d tokens failed: %s", sum(map(len, sequences)), one_line(error))
            self._metrics.failed.inc(len(sequences))
            for work in batch:
                _settle(work, error=error)
            return
        self._metrics.tokens.inc(sum(map(len, sequences)))
        start = 0
        for work in batch:
            _settle(work, rewards[start : start + len(work.sequences)])
            start += len(work.sequences)


def _settle(work: Work, rewards: list[float] | None = None, error: Exception | None = None) -> None:
    try:
        if error is not None:
            work.rewards.set_exception(error)
        else:
            work.rewards.set_result(rewards or [])
    except (CancelledError, Exception):  # nobody waits any more
        return
