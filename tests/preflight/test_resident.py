"""What `btrm plan` counts as weights, gradients and optimizer, against what a process that trains really holds."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import start, wait
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from btrm_core.model.shape import read_shape
from btrm_core.preflight.plan import memory
from btrm_core.preflight.plan.estimate import read_zero
from btrm_core.preflight.plan.workload import Workload

LARGE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "pad_token_id": 0,
}
"""SmolLM2-135M with 2 of its 30 layers: 35 million parameters."""
SMALL = {**LARGE, "vocab_size": 64, "num_hidden_layers": 1}


def resident() -> int:
    """Bytes of this process in memory, after returning what is free to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def trained(config: Any, runtime: Any, shape: dict[str, Any]) -> Any:
    """An engine in the middle of a step: it has updated once, and has gradients again."""
    from transformers import AutoModelForSequenceClassification

    from btrm_core.model.reward import RewardModel
    from btrm_core.packing.forms import PADDED, collate
    from btrm_core.packing.trees import alone
    from btrm_core.training.engine import make_engine

    hf = AutoModelForSequenceClassification.from_config(
        CONFIG_MAPPING["llama"](**shape, num_labels=1), dtype=runtime.dtype
    )
    engine = make_engine(RewardModel(hf), config, runtime)
    batch = collate([alone(torch.arange(1, 9, dtype=torch.int32).numpy())], kernel=PADDED)
    for boundary in (False, True, False):
        engine.set_gradient_accumulation_boundary(boundary)
        engine.backward(engine(batch).sum(), scale_wrt_gas=False)
        if boundary:
            engine.step()
    return engine


def measure(file: str, values: dict[str, Any]) -> None:
    """Write the growth of this process by one model in training to a file."""
    from btrm_core.config import read_settings
    from btrm_core.training.processes import runtime as runtime_module

    config = read_settings(None, {"train.learning_rate": 1e-3, "train.weight_decay": 0.0, **values})
    with runtime_module.group(config), runtime_module.start(config) as runtime:
        trained(config, runtime, SMALL).destroy()  # what the libraries load at their first use
        before = resident()
        engine = trained(config, runtime, LARGE)
        Path(file).write_text(json.dumps(resident() - before))
        engine.destroy()
    runtime_module.leave()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("preset", "dtype", "optimizer"),
    [
        ("zero1", "fp32", "adamw"),
        ("zero1", "bf16", "adamw"),
        ("zero2", "bf16", "adamw"),
        ("zero1", "bf16", "adamw-8bit"),
    ],
)
def test_planned_states_are_what_a_process_holds(tmp_path: Path, preset: str, dtype: str, optimizer: str) -> None:
    if optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'btrm[qlora]'")
    values = {"distributed.deepspeed": preset, "model.dtype": dtype, "train.optimizer": optimizer}
    file, log = tmp_path / "grown.json", tmp_path / "log"
    codes = wait(start(measure, str(file), values, log=log), timeout=120)
    assert codes == [0], log.read_text()
    parameters, _ = read_shape(CONFIG_MAPPING["llama"](**LARGE))
    planned = memory.states(
        parameters, read_zero(preset, Workload(bf16=dtype == "bf16", optimizer=optimizer), 1), gpus=1
    )
    expected = planned.weights + planned.gradients + planned.optimizer
    assert parameters.total > 35e6
    assert json.loads(file.read_text()) == pytest.approx(expected, rel=0.05)
