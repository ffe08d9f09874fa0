"""Runs arms so that they can be compared: A B C A B C on one machine, each in its own process.

Decides: who runs when. Three schedules: *interleaved* keeps one process per arm alive and alternates after every few
steps (each arm waits at its gate while another runs; for a machine with other load), *fresh* starts a new process per
arm and pass (where memory holds one arm at a time), *whole* lets one arm after another do all its passes in one process
(for a GPU that nothing else uses, where loading and compiling anew for every pass takes longer than the passes). The
order rotates, so that no arm is always first; under *whole* it is the order given.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import environment
from benchmarks.workload import Settings, Workload

Say = Callable[[str], None]


class ArmError(RuntimeError):
    """An arm's process died; the message ends with what it printed last."""


@dataclass
class ArmRun:
    """What was measured of one arm: a list of step records per pass."""

    passes: list[list[dict[str, Any]]] = field(default_factory=list)
    peak_memory: int = 0
    base_memory: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    """Graphs that torch.compile had made after each run of steps; empty where nothing is compiled."""
    failed: str = ""
    """The last line of an arm that ended early, as one that found no room on a GPU."""


class Worker:
    """The process of one arm: it imports at once, and takes memory when `load` lets it."""

    def __init__(self, work: Workload, arm: str, first: int, last: int) -> None:
        self.arm = arm
        self._log_path = work.directory / f"{arm}.log"
        self._log = self._log_path.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(work.directory), arm, str(first), str(last)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=environment.ROOT,
            env=environment.worker_environment(work.settings.threads, work.settings.device),
        )
        self.base_memory = 0

    def load(self) -> Worker:
        """Let the arm load its model and come to its gate; returns the worker itself."""
        self._write({"load": True})
        self.base_memory = int(self._read()["base_memory"])
        return self

    def run(self, steps: int) -> dict[str, Any]:
        """Let the arm through its gate for some steps and return their records."""
        self._write({"run": steps})
        return self._read()

    def stop(self) -> dict[str, Any]:
        """End the arm and return its last message."""
        self._write({"stop": True})
        last = self._read()
        self._process.wait(timeout=120)
        self._log.close()
        return last

    def kill(self) -> None:
        """End the process at once, if it is still there."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what follows is read, and says how the arm ended
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = self._log_path.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise ArmError(f"arm {self.arm} ended with code {self._process.returncode}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(work: Workload, arms: Sequence[str], *, schedule: str, block: int, say: Say) -> dict[str, ArmRun]:
    """Measure every arm over all passes."""
    runs = {arm: ArmRun() for arm in arms}
    {"fresh": _fresh, "whole": _whole, "interleaved": _interleaved}[schedule](work, runs, block, say)
    return runs


def _interleaved(work: Workload, runs: dict[str, ArmRun], block: int, say: Say) -> None:
    settings = work.settings
    workers: dict[str, Worker] = {}
    try:
        for arm, run in runs.items():
            say(f"{arm}: set-up and warm-up")
            workers[arm] = Worker(work, arm, work.first_step, len(work.steps)).load()
            run.base_memory = workers[arm].base_memory
            if settings.warmup:
                workers[arm].run(settings.warmup)
        for number in range(settings.passes):
            for run in runs.values():
                run.passes.append([])
            for i, start in enumerate(range(0, settings.steps, block)):
                for arm in rotated(list(runs), number + i):
                    _run_block(workers[arm], runs[arm], min(block, settings.steps - start), say, number)
        for arm, run in runs.items():
            run.losses = workers[arm].stop()["losses"]
    finally:
        for worker in workers.values():
            worker.kill()


def _fresh(work: Workload, runs: dict[str, ArmRun], block: int, say: Say) -> None:
    settings = work.settings
    for number in range(settings.passes):
        for arm in rotated(list(runs), number):
            run = runs[arm]
            begin = settings.steps * (number + 1)
            worker = Worker(work, arm, begin - settings.warmup, begin + settings.steps).load()
            try:
                run.base_memory = worker.base_memory
                run.passes.append([])
                if settings.warmup:
                    worker.run(settings.warmup)
                for start in range(0, settings.steps, block):
                    _run_block(worker, run, min(block, settings.steps - start), say, number)
                losses = worker.stop()["losses"]
                run.losses = run.losses or losses  # the steps of the first pass, as in the other schedule
            finally:
                worker.kill()


def _whole(work: Workload, runs: dict[str, ArmRun], block: int, say: Say) -> None:
    """While an arm is measured, the next one's process has imported what it needs and waits."""
    names = list(runs)
    waiting = [Worker(work, arm, work.first_step, len(work.steps)) for arm in names[:1]]
    try:
        for place, (arm, run) in enumerate(runs.items()):
            worker = waiting[-1]
            waiting += [Worker(work, other, work.first_step, len(work.steps)) for other in names[place + 1 : place + 2]]
            say(f"{arm}: set-up and warm-up")
            try:
                _all_passes(worker, run, work.settings, block, say)
            except ArmError as error:
                run.failed = str(error).strip().splitlines()[-1]
                say(f"{arm}: {error}")
            finally:
                worker.kill()
    finally:
        for worker in waiting:
            worker.kill()


def _all_passes(worker: Worker, run: ArmRun, settings: Settings, block: int, say: Say) -> None:
    run.base_memory = worker.load().base_memory
    if settings.warmup:
        _note_graphs(run, worker.run(settings.warmup))
    for number in range(settings.passes):
        run.passes.append([])
        for start in range(0, settings.steps, block):
            _run_block(worker, run, min(block, settings.steps - start), say, number)
    run.losses = worker.stop()["losses"]


def _run_block(worker: Worker, run: ArmRun, steps: int, say: Say, number: int) -> None:
    run.load.append(environment.load_average())
    answer = worker.run(steps)
    run.passes[-1] += answer["steps"]
    run.peak_memory = max(run.peak_memory, int(answer["peak_memory"]))
    _note_graphs(run, answer)
    wall, cpu = (sum(record[key] for record in answer["steps"]) for key in ("wall", "cpu"))
    say(f"pass {number + 1}  {worker.arm:16s} {steps} steps  {wall:8.2f} s  {cpu:8.2f} CPU s  load {run.load[-1]}")


def _note_graphs(run: ArmRun, answer: dict[str, Any]) -> None:
    if answer.get("graphs") is not None:
        run.graphs.append(int(answer["graphs"]))


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names, beginning elsewhere each time.

    >>> rotated(["a", "b", "c"], 1)
    ['b', 'c', 'a']
    """
    by %= len(names)
    return [*names[by:], *names[:by]]
