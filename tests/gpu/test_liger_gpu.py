"""Liger's fused norms, rotary embedding and MLP give the rewards that torch's own give, in the model that has them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support import trajectories
from support.tiny_models import awkward_groups, tiny_model
from support.trajectories import trajectory

from btrm_core.model import read_shape
from btrm_core.model.reward import RewardModel
from btrm_core.model.savings import use_kernels
from btrm_core.packing.forms import collate

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install 'btrm[liger]'")


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma", "gemma2"])
def test_liger_equals_torch(name: str) -> None:
    plain = tiny_model(name).cuda()
    fused = copy.deepcopy(plain)
    use_kernels(fused, "liger")
    batch = collate(awkward_groups(), kernel="eager").to("cuda")
    with torch.no_grad():
        rewards = [RewardModel(hf, "eager").eval()(batch) for hf in (plain, fused)]
    torch.testing.assert_close(rewards[0], rewards[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma", "gemma2"])
def test_models_made_later_run_on_a_cpu(name: str) -> None:
    """Liger changes transformers' modules: its kernels would read what is not on the GPU."""
    batch = collate(awkward_groups(), kernel="eager")
    with torch.no_grad():
        expected = RewardModel(tiny_model(name), "eager").eval()(batch)
        for _ in range(2):
            use_kernels(tiny_model(name).cuda(), "liger")
            later = tiny_model(name)
            torch.testing.assert_close(RewardModel(later, "eager").eval()(batch), expected)
            assert read_shape(later.config)
    torch.cuda.synchronize()


@pytest.mark.parametrize("selective", [False, True])
def test_a_run_gives_the_losses_of_torch(tmp_path: Path, selective: bool) -> None:
    """Also where products are kept, which Liger's rotary embedding would overwrite."""
    root = trajectories.prepare(tmp_path, layers=2)
    given = {"train__max_steps": 4, "model__selective_checkpointing": selective}
    losses = [trajectory(root, tmp_path / name, **given, model__kernels=name).losses for name in ("torch", "liger")]
    assert losses[1] == pytest.approx(losses[0], abs=2e-2)
