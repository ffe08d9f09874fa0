"""What could make a step faster on a GPU, tried on the model before it is trained; `LOG.md` says what was kept.

Each takes a transformers model and changes it in place. None changes what is computed beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def liger(hf: Any) -> None:
    """Liger's fused norms, rotary embedding and MLP (arXiv:2410.10989), as `--kernels liger` has them."""
    from btrm_core.model.savings import use_kernels

    use_kernels(hf, "liger")


def compiled(hf: Any) -> None:
    """Norms and MLPs through torch.compile, each module for itself, for rows of any length."""
    backbone = getattr(hf, hf.base_model_prefix)
    for name, module in backbone.named_modules():
        last = name.rpartition(".")[2]
        if last == "mlp" or last.endswith("norm"):
            module.compile(dynamic=True)


def selective(hf: Any) -> None:
    """Recomputation that keeps the products of matrices and attention, as `--selective-checkpointing` has it."""
    from btrm_core.model.savings import recompute_activations
    from btrm_core.settings import ModelConfig

    recompute_activations(hf, ModelConfig(selective_checkpointing=True))


CANDIDATES: dict[str, Callable[[Any], None]] = {"liger": liger, "compiled": compiled, "selective": selective}
