"""The gate through which each arm runs: one optimiser step at a time, timed between two passages.

An arm lives in its own process and stops at the gate after each step until the harness lets it go on, so the steps of
different arms alternate on one machine and a disturbance hits all of them alike. The clock stands still while waiting.
Everything an arm does for a step counts: fetching, collating, forward, backward, clipping, optimiser, logging.

Protocol: one JSON object per line. Harness to arm: {"load": true}, then {"run": n} or {"stop": true}. Arm to harness:
{"ready": true}, after each run {"steps": [...], "peak_memory": bytes, "graphs": n}, and a last {"losses": {...}, ...}.
"""

from __future__ import annotations

import json
import sys
import time
from typing import IO, Any

from benchmarks import environment


class Gate:
    """Counts steps, measures them, and waits for the harness between runs of steps."""

    def __init__(self, commands: IO[str], answers: IO[str], device: str) -> None:
        self._commands, self._answers, self._device = commands, answers, device
        self._left = 0
        self._records: list[dict[str, Any]] = []
        self._wall = self._cpu = 0.0
        self._step = 0
        self._losses: dict[int, float] = {}
        self._base_memory = 0
        self.tokens = 0  # tokens that went through the backbone in this step; arms add to it
        self.parts: dict[str, float] = {}  # what an arm knows of this step: seconds of parts of it, padding

    def may_load(self) -> bool:
        """Wait until the device is free; False means stop."""
        line = self._commands.readline()
        return bool(line and json.loads(line).get("load"))

    def open(self) -> bool:
        """Say that set-up is done and wait for the first run; False means stop."""
        self._base_memory = environment.reset_peak_memory(self._device)
        self._send({"ready": True, "base_memory": self._base_memory})
        return self._wait()

    def step_done(self) -> bool:
        """Record a step; returns whether to go on (after waiting, if this run of steps is over)."""
        self._synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        self._records.append({"wall": wall - self._wall, "cpu": cpu - self._cpu, "tokens": self.tokens, **self.parts})
        self.tokens, self.parts = 0, {}
        self._step += 1
        self._left -= 1
        if self._left > 0:
            self._wall, self._cpu = time.perf_counter(), time.process_time()
            return True
        peak = environment.peak_memory(self._device)
        self._send({"steps": self._records, "peak_memory": peak, "graphs": _graphs()})
        self._records = []
        return self._wait()

    def note_loss(self, step: int, loss: float) -> None:
        """Mean loss of step number `step` (from 1), before its update."""
        self._losses[step] = float(loss)

    def close(self, **facts: Any) -> None:
        """Send the last message."""
        self._send({"losses": self._losses, **facts})

    def _wait(self) -> bool:
        line = self._commands.readline()
        command = json.loads(line) if line else {"stop": True}
        if command.get("stop"):
            return False
        self._left = int(command["run"])
        self._synchronize()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return True

    def _send(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def _synchronize(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()


def _graphs() -> int | None:
    """Graphs that torch.compile has made in this process; None where it was never used."""
    if "torch._dynamo" not in sys.modules:
        return None
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
