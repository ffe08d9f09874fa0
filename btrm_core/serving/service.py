"""What stands between the routes and the devices: one request's conversations in, their rewards out.

Decides: the order of refusals, the deadline, that a client who leaves frees the room it took, that a reward which is
not finite never becomes a number, and when the server is ready: once it gives the rewards that training wrote down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from starlette.requests import Request

from btrm_core.chat import ChatFormat
from btrm_core.errors import BtrmError, ConfigError, one_line
from btrm_core.model import calibration_of, tolerance
from btrm_core.serving.batching import Batcher, Engine, Work
from btrm_core.serving.limits import Limits, Refused, too_many
from btrm_core.serving.metrics import Metrics
from btrm_core.serving.preparing import Prepared, Preparer

_log = logging.getLogger("btrm.serving")
T = TypeVar("T")
CLIENT_GONE = 499
"""The status, for logs and metrics alone, of a request whose client left."""


class Served(Engine, Protocol):
    """An engine that knows its model."""

    @property
    def chat(self) -> ChatFormat:
        """How conversations become ids."""

    @property
    def max_length(self) -> int:
        """Longest conversation in tokens."""

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of `btrm.json`."""

    @property
    def identity(self) -> str:
        """Changes when the rewards may."""

    @property
    def dtype(self) -> torch.dtype:
        """The type it computes in."""

    def self_test(self) -> float:
        """The largest difference to the rewards in `btrm.json`; see `Scorer.self_test`."""


@dataclass(frozen=True)
class Answered:
    """What became of one prepared prompt.

    Attributes:
        prepared: its ids.
        rewards: one per response; None where `errors` says why there is none.
        errors: one per response.
    """

    prepared: Prepared
    rewards: list[float | None]
    errors: list[str | None]


@dataclass(frozen=True)
class Calibration:
    """What turns rewards into comparable numbers; in `btrm.json`, never in the weights.

    Attributes:
        mean: of the rewards on a reference set; None if nobody measured it.
        std: their standard deviation.
        temperature: by which a difference of rewards is divided before the sigmoid.
    """

    mean: float | None = None
    std: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Calibration:
        """Read it from a manifest; numbers that make no sense count as not there.

        Args:
            manifest: `btrm.json` as read.

        Returns:
            No mean and standard deviation unless both are numbers and the latter is above 0; temperature 1 if none.
        """
        return cls(*calibration_of(manifest))

    def normalized(self, reward: float) -> float:
        """The reward in standard deviations from the mean of the reference set.

        Args:
            reward: as the model gives it.

        Raises:
            Refused: 422 if the model has no calibration.
        """
        if self.mean is None or self.std is None:
            raise Refused(
                422,
                "no_calibration",
                "this model's btrm.json holds no mean and standard deviation (calibration); leave normalize out",
            )
        return (reward - self.mean) / self.std

    def probability(self, difference: float) -> float:
        """Probability that the response whose reward is larger by `difference` is the better one.

        Args:
            difference: of two rewards, not normalized; divided by the temperature first.
        """
        scaled = difference / self.temperature
        return 1 / (1 + math.exp(-scaled)) if scaled > -700 else 0.0


class Service:
    """A model, its devices, and the limits.

    Args:
        engines: one per device, all of the same model.
        name: what clients call the model.
        limits: what is taken on.
    """

    def __init__(self, engines: Sequence[Served], name: str, limits: Limits | None = None) -> None:
        self.limits, self.metrics, self.name = limits or Limits(), Metrics(), name
        self.engine = engine = engines[0]
        self._engines = list(engines)
        self.chat, self.manifest = engine.chat, engine.manifest
        self.calibration = Calibration.of(self.manifest)
        self.max_length = min(engine.max_length, self.limits.max_length or engine.max_length)
        self.preparer = Preparer(self.chat, self.max_length, self.limits.truncate)
        self.not_ready: str | None = "the self-test has not run yet"
        self.created = int(time.time())
        self.metrics.model.labels(name, engine.identity, self.chat.template_sha256).set(1)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="btrm-tokens")
        self._batcher: Batcher | None = None

    def start(self) -> None:
        """Run the self-test on every device, then start the workers."""
        try:
            for engine in self._engines:
                self._self_test(engine)
        except Exception as error:  # it must be said at /ready, whatever it is
            self.not_ready = one_line(error)
            _log.error("not ready: %s", self.not_ready)
            return
        self._batcher = Batcher(self._engines, self.limits, self.metrics)
        self.not_ready = None
        self.metrics.ready.set(1)

    def _self_test(self, engine: Served) -> None:
        if not self.manifest.get("self_test"):
            _log.warning("%s holds no self-test vectors, so its rewards were not checked", self.name)
            return
        allowed = tolerance(self.manifest, engine.dtype)
        off = engine.self_test()
        if not off <= allowed:
            raise ConfigError(f"the self-test is off by {off:.2g}, more than the {allowed:.2g} that rounding explains")

    def stop(self) -> None:
        """Finish what was accepted and end the threads."""
        if self._batcher is not None:
            self._batcher.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def rewards(
        self, request: Request, count: int, prepare: Callable[[Preparer], list[Prepared]]
    ) -> list[Answered]:
        """Return the rewards of a request's conversations.

        Args:
            request: whose client may leave.
            count: conversations in it.
            prepare: makes their ids; runs in the tokenizing thread.

        Raises:
            Refused: not ready, too many, too long, no room, too late, or the client left.
        """
        if self.not_ready is not None or self._batcher is None:
            raise Refused(503, "not_ready", f"not ready: {self.not_ready}", {"Retry-After": "5"})
        if count > self.limits.items:
            raise too_many("conversations", count, self.limits.items)
        answer = asyncio.ensure_future(self._answer(self._batcher, prepare))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({answer, gone}, timeout=self._left(request), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                raise Refused(CLIENT_GONE, "client_gone", "the client left")
            raise Refused(504, "deadline", f"no answer within {self.limits.deadline_seconds:g} s; send less at a time")
        finally:
            for task in (answer, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    def _left(self, request: Request) -> float:
        """Seconds until the request's deadline, which began with its headers."""
        since: float = request.scope.get("btrm_since", time.monotonic())
        return max(0.0, since + self.limits.deadline_seconds - time.monotonic())

    async def apart(self, work: Callable[[], T]) -> T:
        """Return what the tokenizing thread makes, in which nobody but the tokenizer waits.

        Args:
            work: needs the tokenizer, or takes long.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _answer(self, batcher: Batcher, prepare: Callable[[Preparer], list[Prepared]]) -> list[Answered]:
        prepared = await self.apart(lambda: prepare(self.preparer))
        works = [Work(p.sequences, p.key) for p in prepared]
        asked = [work for work in works if work.sequences]
        try:
            batcher.submit(asked)
            await asyncio.gather(*(asyncio.wrap_future(work.rewards) for work in asked))
        except BtrmError:
            raise
        except Exception as error:
            _log.error("a request failed: %s", one_line(error))
            raise Refused(500, "failed", "the rewards could not be computed; the server's log says why") from error
        finally:
            for work in asked:
                work.rewards.cancel()  # of those that still wait; the others take no notice
        for p in prepared:
            self.metrics.truncated.inc(len(p.sequences) if p.truncated else 0)
            self.metrics.unterminated.inc(self.preparer.unterminated(p))
        return [
            self._answered(p, work.rewards.result() if p.sequences else [])
            for p, work in zip(prepared, works, strict=True)
        ]

    def _answered(self, prepared: Prepared, found: list[float]) -> Answered:
        values = iter(found)
        rewards: list[float | None] = []
        errors = list(prepared.errors)
        for place, error in enumerate(errors):
            reward = next(values) if error is None else None
            if reward is not None and not math.isfinite(reward):
                self.metrics.not_finite.inc()
                reward, errors[place] = None, f"the model's reward is {reward}, not a finite number"
            elif reward is not None:
                self.metrics.rewards.observe(reward)
            rewards.append(reward)
        return Answered(prepared, rewards, errors)


async def _gone(request: Request) -> None:
    """Return when the client of a request, whose body was read, leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
