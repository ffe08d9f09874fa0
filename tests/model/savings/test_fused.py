"""What Liger writes into transformers' modules reaches no other model; Liger itself runs in tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import awkward_groups, tiny_model
from transformers.models.llama import modeling_llama

from btrm_core.errors import ConfigError
from btrm_core.model import read_shape
from btrm_core.model.reward import RewardModel
from btrm_core.model.savings import fused, use_kernels
from btrm_core.packing.forms import collate


def of_the_gpu(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a kernel of the GPU was given what is not there")


class NormOfTheGpu(torch.nn.Module):
    __init__ = __call__ = of_the_gpu


def test_layers_made_later_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and without memory, where a norm is asked for its type."""
    own = dict(vars(modeling_llama))
    batch = collate(awkward_groups(), kernel="eager")
    expected = RewardModel(tiny_model("llama3"), "eager")(batch)
    for _ in range(2):
        with fused._kept_to_one_model():
            monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", NormOfTheGpu)
            monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", of_the_gpu)
        later = tiny_model("llama3")
        assert torch.equal(RewardModel(later, "eager")(batch), expected)
        assert read_shape(later.config)
        assert modeling_llama.LlamaRMSNorm is own["LlamaRMSNorm"]
    assert modeling_llama.apply_rotary_pos_emb.plain is own["apply_rotary_pos_emb"], "not one around another"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_liger_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="--kernels liger needs a GPU, and torch sees none; use --kernels torch"):
        use_kernels(tiny_model("llama3"), "liger")
