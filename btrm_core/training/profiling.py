"""`--profile`: where the time of a step goes, measured on a few steps, and a trace of them.

Decides: which steps (after two of warm-up, three), what the parts of a step are called, and that the GPU is waited for
at the end of each part, so that a part is charged for its own kernels.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

WARM_UP = 2


STEPS = 3


PARTS = ("data", "forward", "backward", "optimizer")


TRACE = "profile.json.gz"


COMMUNICATION = ("nccl", "gloo:")
"""What torch calls collective operations in a trace begins with one of these."""


_RECORDING = (torch.profiler.ProfilerAction.RECORD, torch.profiler.ProfilerAction.RECORD_AND_SAVE)


Item = TypeVar("Item")


class Profiler:
    """Times the parts of some steps; does nothing without a directory.

    Args:
        directory: Where the trace goes; None turns everything off.
        say: Tells the user something.
    """

    def __init__(self, directory: Path | None, say: Callable[[str], None]) -> None:
        self.directory, self.say = directory, say
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.whole = 0.0
        self.steps = 0
        self._started = 0.0
        self._trace: Any = None
        if directory is not None:
            self._trace = self._waiting()

    def _waiting(self) -> Any:
        """A profiler of torch that lets the warm-up pass, records some steps and then reports."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        trace = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._report,
        )
        trace.start()
        return trace

    @property
    def _recording(self) -> bool:
        return self._trace is not None and self._trace.current_action in _RECORDING

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the time inside the block to a part of the step (`PARTS`).

        Args:
            name: One of `PARTS`; outside the recorded steps nothing is timed and the GPU is not waited for.
        """
        if not self._recording:
            yield
            return
        _wait()
        started = time.perf_counter()
        with torch.profiler.record_function(f"btrm {name}"):
            yield
            _wait()
        self.seconds[name] += time.perf_counter() - started

    def waiting_for(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time until each is there is charged to "data".

        Args:
            items: The steps, taken one at a time as the loop asks for them.
        """
        iterator = iter(items)
        while True:
            with self.part("data"):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def step_done(self) -> None:
        """Tell torch's profiler that a step is over: it begins, goes on, or ends and reports."""
        if self._trace is None:
            return
        if self._recording:
            self.steps += 1
        elif self._trace.step_num == WARM_UP - 1:
            self._started = time.perf_counter()
        self._trace.step()
        if self.steps == STEPS:
            self._trace.stop()
            self._trace = None

    def close(self) -> None:
        """Report on what was measured if the run ended before all steps were; a run that was too short says so."""
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        if self.steps == 0:
            self.say(f"--profile: the run ended before step {WARM_UP + 1}, so nothing was measured")

    def _report(self, trace: Any) -> None:
        """Write the trace and say where the time went."""
        if self.directory is None or self.steps == 0:
            return
        _wait()
        self.whole = time.perf_counter() - self._started
        trace.export_chrome_trace(str(self.directory / TRACE))
        self.say(self.table(_communication(trace)))
        self.say(f"trace of these steps: {self.directory / TRACE} (open it in https://ui.perfetto.dev)")

    def table(self, communication: float) -> str:
        """Time of a step by part; `communication` is in the parts already.

        Args:
            communication: Seconds in collective operations over all recorded steps; 0 leaves its line out.

        Returns:
            A line for the whole step, then one for each part: milliseconds a step, and its share of the whole.
        """
        steps = max(1, self.steps)
        rest = max(0.0, self.whole - sum(self.seconds.values()))
        rows = {**self.seconds, "other (figures, evaluation)": rest}
        lines = [f"a step took {1000 * self.whole / steps:.1f} ms (mean of {steps} after {WARM_UP} of warm-up):"]
        for name, seconds in rows.items():
            share = seconds / max(self.whole, 1e-9)
            lines.append(f"  {name:<28} {1000 * seconds / steps:>9.1f} ms  {share:>5.1%}")
        if communication:
            share = communication / max(self.whole, 1e-9)
            lines.append(f"  {'of it, communication':<28} {1000 * communication / steps:>9.1f} ms  {share:>5.1%}")
        return "\n".join(lines)


def _communication(trace: Any) -> float:
    """Seconds spent in collective operations, on the GPU where there is one."""
    events = [event for event in trace.key_averages() if event.key.startswith(COMMUNICATION)]
    return float(sum(event.device_time_total or event.cpu_time_total for event in events)) / 1e6


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
