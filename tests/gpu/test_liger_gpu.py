"""Liger's fused norms, rotary embedding and MLP give the rewards that torch's own give."""

import copy

import pytest
import torch
from support.tiny_models import awkward_groups, tiny_model

from btrm_core.model.reward import RewardModel, use_kernels
from btrm_core.packing.forms import collate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma", "gemma2"])
def test_liger_equals_torch(name: str) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install 'btrm[liger]'")
    plain = tiny_model(name).cuda()
    fused = copy.deepcopy(plain)
    use_kernels(fused, "liger")
    batch = collate(awkward_groups(), kernel="eager").to("cuda")
    with torch.no_grad():
        rewards = [RewardModel(hf, "eager").eval()(batch) for hf in (plain, fused)]
    torch.testing.assert_close(rewards[0], rewards[1], atol=1e-4, rtol=1e-4)
