"""A real server on loopback, in a thread of the test, and an engine that a test can hold back."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import uvicorn

from btrm_core.scoring import Scorer
from btrm_core.serving import Limits, Service, create_app


class Held:
    """A scorer that computes only while `free` is set, and can be told to answer NaN or to fail."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.free = threading.Event()
        self.free.set()
        self.busy = threading.Event()
        self.batches: list[int] = []
        self.computed: list[list[int]] = []
        self.nan_at: int | None = None
        self.fails_on: Sequence[int] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def sequence_rewards(self, sequences: Sequence[Sequence[int]], together: Sequence[Hashable]) -> np.ndarray:
        self.busy.set()
        assert self.free.wait(60)
        self.batches.append(len(sequences))
        self.computed += [list(ids) for ids in sequences]
        if self.fails_on is not None and list(self.fails_on) in [list(ids) for ids in sequences]:
            raise RuntimeError("a kernel that fails")
        rewards = self._scorer.sequence_rewards(sequences, together)
        if self.nan_at is not None:
            rewards[self.nan_at] = math.nan
        return rewards


class Running:
    """A server in a thread: `url`, `service`, and a client."""

    def __init__(self, service: Service, drain: int | None = None) -> None:
        self.service = service
        config = uvicorn.Config(
            create_app(service),
            host="127.0.0.1",
            port=0,
            log_config=None,
            lifespan="on",
            timeout_graceful_shutdown=drain,
        )
        self._server = uvicorn.Server(config)
        self._socket = config.bind_socket()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        until(lambda: self._server.started)

    def stop(self) -> None:
        """Begin what SIGTERM begins."""
        self._server.should_exit = True

    def close(self) -> None:
        self.client.close()
        self.stop()
        self._thread.join(20)
        self._socket.close()
        assert not self._thread.is_alive()


@contextlib.contextmanager
def serving(
    engine: Any, limits: Limits | None = None, name: str = "tiny", drain: int | None = None
) -> Iterator[Running]:
    """A server for the time of a block."""
    running = Running(Service([engine], name, limits), drain)
    try:
        yield running
    finally:
        running.close()


def until(condition: Any, seconds: float = 20) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
