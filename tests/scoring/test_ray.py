"""`--engine ray` on a local cluster of two actors: the same rewards in the same order, and an actor that is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.scorer_samples import base_model, reward_model

from btrm_core.errors import CheckpointError
from btrm_core.scoring import RayWorkers, Scorer, score_file

pytest.importorskip("ray", reason="Ray is not installed (pip install 'btrm[ray]')")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of Ray and what it loads, in threads of its own
]
OPTIONS: dict[str, Any] = {"tokens_per_batch": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("ray") / "model")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    root = tmp_path_factory.mktemp("expected")
    rows: list[Any] = [{"prompt": f"Say {n}. " * (1 + n % 5), "chosen": f"{n}", "rejected": "No."} for n in range(400)]
    rows[7] = {"text": "no row"}
    source = root / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_file(Scorer(str(model), **OPTIONS), str(source), str(root / "out.jsonl"))
    return str(source), (root / "out.jsonl").read_bytes()


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[RayWorkers]:
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # on a full machine Ray ends what is not at fault
        with RayWorkers(str(model), 2, **OPTIONS) as found:
            yield found


def actors() -> list[int]:
    """Processes of the pool that this process's cluster runs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::MapWorker" in (folder / "cmdline").read_bytes() and _is_ours(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _is_ours(pid: int) -> bool:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if pid == os.getpid():
            return True
    return False


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kill", [False, True])
def test_actors_give_what_one_process_gives(
    cluster: RayWorkers, expected: tuple[str, bytes], tmp_path: Path, kill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))
    source, whole = expected
    killed: list[int] = []

    def strike() -> None:
        end = time.monotonic() + 600
        while not killed and time.monotonic() < end:
            partial = tmp_path / "out.jsonl.partial"
            if partial.exists() and partial.stat().st_size and (found := actors()):
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])
            time.sleep(0.01)

    striker = threading.Thread(target=strike)
    if kill:
        striker.start()
    score_file(cluster, source, str(tmp_path / "out.jsonl"))
    if kill:
        striker.join()
        assert killed
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.timeout(900)
def test_a_model_that_cannot_be_loaded_is_said(cluster: RayWorkers, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama3")
    with pytest.raises(CheckpointError, match="holds no reward head"):
        RayWorkers(str(base), 2, **OPTIONS)
