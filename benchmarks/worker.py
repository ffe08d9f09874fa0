"""One arm in one process: `python -m benchmarks.worker DIRECTORY ARM FIRST LAST`, started by the harness.

The protocol (see `gate`) has the original standard output to itself; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(directory: str, arm: str, first: str, last: str) -> None:
    """Run the steps `first` to `last` (exclusive) of the workload in `directory` through one arm."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from benchmarks.btrm_arms import OURS, bring_in
    from benchmarks.gate import Gate
    from benchmarks.workload import Workload

    work = Workload.load(Path(directory))
    gate = Gate(sys.stdin, answers, work.settings.device)
    if arm in OURS:
        run = OURS[arm]
        bring_in()
    else:
        from benchmarks.arms import PEERS

        run = PEERS[arm]
    if not gate.may_load():
        return
    run(work, gate, range(int(first), int(last)))
    gate.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
