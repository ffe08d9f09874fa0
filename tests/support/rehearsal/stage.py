"""Runs scenes, each in a process of its own that is forked from one with the rehearsed GPU and all imports done.

    python -m support.rehearsal.stage DEVICE.so DIRECTORY SCENE...

leaves DIRECTORY/SCENE.json: what the scene returned, or the error that ended it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.rehearsal import gpu

SECONDS = 600
"""How long a scene may take, also on a machine that is busy."""


def main(library: str, directory: str, names: list[str]) -> None:
    """Run scenes one after another; each has a directory of its own beside what all share."""
    gpu.arrive(library)
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # it would look for CUDA's own libraries
    from support.rehearsal import kernels, nccl, scenes

    nccl.install()
    library_of_kernels = kernels.install_varlen()
    place = Path(directory)
    root = scenes.prepare(place / "shared")
    for name in names:
        own = place / name
        own.mkdir()
        scene: Callable[[Path, Path], dict[str, Any]] = getattr(scenes, name)
        waited = start(name, lambda scene=scene, own=own: (own.parent / f"{own.name}.json", scene(root, own)))
        wait(waited, SECONDS)
    del library_of_kernels  # only now: its kernels go with it


def start(log: str, play: Callable[[], tuple[Path, dict[str, Any]]], **variables: str) -> int:
    """Fork; the child writes what the scene returns. What it prints goes to standard error after its end."""
    child = os.fork()
    if child:
        return child
    gc.freeze()  # what was imported is not looked at again by each garbage collection
    os.environ.update(variables)
    status = 1
    try:
        file, found = play()
        file.write_text(json.dumps(found, default=str))
        status = 0
    except BaseException:
        print(f"--- {log} {variables}", file=sys.stderr)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(child: int, seconds: float) -> int:
    """The exit code of a child; it is killed when its time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            print(f"process {child}: {used.ru_utime + used.ru_stime:.1f} s of a processor", file=sys.stderr)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
