"""The GPU rehearsed on a CPU: whole runs, kernels, memory and processes on a CUDA device made of host memory.

BTRM_REHEARSAL=full adds ZeRO 2 and 3, and FlexAttention's graphs for rows of many lengths.

It cannot show speed, streams, rounding or compilers of a real one; what it can show, each fault below proves.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.rehearsal import gpu

TESTS = Path(__file__).parents[1]
SCENES = (
    "whole_run careless_run every_kernel flex_kernel padded_lines index_of_the_host memory_runs_out memory_is_kept "
    "no_memory_at_all two_processes collective_of_the_host"
).split()
OWN = "btrm_core/"
FULL = 2e-2
"""Relative error of a kernel in bf16."""


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was seen in each scene; all are run by one process, which imports everything once."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or ""
    if not compiler:
        pytest.skip("the rehearsed GPU is compiled with g++, and there is none (apt install g++)")
    place = tmp_path_factory.mktemp("rehearsal")
    cache = request.config.cache
    library = gpu.build(place if cache is None else Path(cache.mkdir("rehearsal")), compiler)
    path = os.pathsep.join([str(TESTS), *(entry for entry in sys.path if entry)])
    # set by earlier tests of this process, for a machine without a GPU
    chosen = ("DS_ACCELERATOR", "TORCHDYNAMO_DISABLE", "LOCAL_RANK")
    inherited = {name: value for name, value in os.environ.items() if name not in chosen}
    variables = {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "BTRM_CACHE": str(place / "cache")}
    command = [sys.executable, "-m", "support.rehearsal.stage", str(library), str(place), *SCENES]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=3600)
    print(done.stderr[-20_000:])
    return {name: _read(place / f"{name}.json") for name in SCENES}


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"failed": True}
    return found


def by_btrm(waits: list[str]) -> list[str]:
    """The waits that a line of btrm asked for itself."""
    return [wait for wait in waits if wait.partition(" at ")[2].startswith(OWN)]


pytestmark = pytest.mark.timeout(3700)


def test_a_run_trains_evaluates_saves_and_scores(seen: dict[str, dict[str, Any]]) -> None:
    run = seen["whole_run"]
    assert run["kernels"] == ["varlen"]
    assert "1 x NVIDIA H100 80GB HBM3, bfloat16, ZeRO 1" in run["said"]
    assert "varlen attention" in run["said"]
    assert len(run["losses"]) == 3
    assert run["losses"][-1] < run["losses"][0]
    assert min(run["micro_batches"]) > 2
    assert min(run["peak_memory_gib"]) > 0
    assert min(run["norms"]) > 0
    assert run["evaluation"]["pairs"] == 3
    assert (run["device"], run["dtype"]) == ("cuda", "torch.bfloat16")
    assert run["self_test"] < 2e-2


def test_the_host_never_waits_within_a_micro_batch(seen: dict[str, dict[str, Any]]) -> None:
    for step in seen["whole_run"]["waits"]:
        assert step["micro_batches"] == []
        assert len(by_btrm(step["after"])) == 1, "the figures of a step, all at once"
    (wait,) = seen["whole_run"]["scoring_waits"]
    assert "scoring/scorer.py" in wait


def test_a_wait_within_a_micro_batch_is_found(seen: dict[str, dict[str, Any]]) -> None:
    """A loss that is looked at, and DeepSpeed's own timer, which waits from the third step on."""
    run = seen["careless_run"]
    for step, count in zip(run["waits"], run["micro_batches"], strict=True):
        assert (
            len([wait for wait in step["micro_batches"] if wait.startswith("_local_scalar_dense at btrm_core/")])
            == count
        )
    timed = [sum("deepspeed/utils/timer.py" in wait for wait in step["micro_batches"]) for step in run["waits"]]
    assert timed[:2] == [0, 0]
    assert timed[2] == run["micro_batches"][2]


def test_sums_in_fp32_stay_so(seen: dict[str, dict[str, Any]]) -> None:
    """Of what was added up over micro-batches, bf16 would not hold most; rounded to it, it holds all."""
    assert max(seen["whole_run"]["bf16_shares"]) < 0.9
    assert min(seen["careless_run"]["bf16_shares"]) == 1


@pytest.mark.parametrize("kernel", ["varlen", "flash", "sdpa", "eager"])
def test_every_kernel(seen: dict[str, dict[str, Any]], kernel: str) -> None:
    found = seen["every_kernel"][kernel]
    assert found["waits"] == []
    assert found["called"] == ([kernel] if kernel in ("varlen", "flash") else [])
    assert found["calls"] > 0
    assert found["ok"]
    assert found["error"] < FULL


def test_flex(seen: dict[str, dict[str, Any]]) -> None:
    found = seen["flex_kernel"]
    assert found["waits"] == []
    assert found["graphs"] <= 4
    assert found["calls"] == 2, "full and sliding layers"
    assert found["error"] < FULL


def test_padded_lines_wait_in_transformers_alone(seen: dict[str, dict[str, Any]]) -> None:
    """It looks whether a mask hides anything."""
    for waits in seen["padded_lines"].values():
        assert by_btrm(waits) == []
        assert all("masking_utils.py" in wait for wait in waits)


def test_an_index_of_the_host_is_found(seen: dict[str, dict[str, Any]]) -> None:
    assert "at least two devices, cuda:0 and cpu" in seen["index_of_the_host"]["error"]


def test_out_of_memory_goes_on_with_half_the_budget(seen: dict[str, dict[str, Any]]) -> None:
    run = seen["memory_runs_out"]
    assert "out of memory in step" in run["said"]
    assert "going on with --tokens-per-batch 1000" in run["said"]
    assert len(run["losses"]) == 2


def test_a_failed_pass_that_is_still_held_is_found(seen: dict[str, dict[str, Any]]) -> None:
    assert "out of memory outside the steps of training (CUDA out of memory" in seen["memory_is_kept"]["error"]


def test_a_model_without_room_is_told_in_one_line(seen: dict[str, dict[str, Any]]) -> None:
    error = seen["no_memory_at_all"]["error"]
    assert error.startswith(
        "TrainingError: the GPU is out of memory outside the steps of training (CUDA out of memory."
    )
    assert "\n" not in error


def test_two_processes(seen: dict[str, dict[str, Any]]) -> None:
    """All that they tell each other lies on the device; the steps are those of one process."""
    found = seen["two_processes"]
    alone = seen["whole_run"]["losses"][:2]
    for losses in found["losses"].values():
        assert losses == pytest.approx(alone, abs=5e-3)
    assert {"allreduce", "allgather"} <= set(found["calls"])


def test_a_collective_of_the_host_is_found(seen: dict[str, dict[str, Any]]) -> None:
    found = seen["collective_of_the_host"]
    assert found["sum"] == 2
    assert "No backend type associated with device type cpu" in found["error"]
