"""What could make a step faster on a GPU, tried on the model before it is trained; `LOG.md` says what was kept.

Each takes a transformers model and changes it in place. None changes what is computed beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def liger(hf: Any) -> None:
    """Liger's fused norms, rotary embedding and MLP (arXiv:2410.10989), as `--kernels liger` has them."""
    from btrm_core.model.fused import use_kernels

    use_kernels(hf, "liger")


def compiled(hf: Any) -> None:
    """Norms and MLPs through torch.compile, each module for itself, for rows of any length."""
    backbone = getattr(hf, hf.base_model_prefix)
    for name, module in backbone.named_modules():
        last = name.rpartition(".")[2]
        if last == "mlp" or last.endswith("norm"):
            module.compile(dynamic=True)


def selective(hf: Any) -> None:
    """Recomputation that keeps the products of matrices and attention, and computes again what is cheap."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    hf.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": partial(create_selective_checkpoint_contexts, _policy),
        }
    )


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    import torch
    from torch.utils.checkpoint import CheckpointPolicy

    kept = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    dear = op in kept or "attn" in str(op) or "attention" in str(op)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


CANDIDATES: dict[str, Callable[[Any], None]] = {"liger": liger, "compiled": compiled, "selective": selective}
