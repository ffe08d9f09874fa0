"""Gradient checkpointing: which activations are kept for the backward pass, and which are computed again.

torch has contexts for selective checkpointing too. They demand that every operation of the forward pass comes again,
and under ZeRO-3 weights are gathered in between, in other pieces each time; here only what is kept must come again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from btrm_core.errors import ConfigError
from btrm_core.settings import ModelConfig

NOT_RECOMPUTED = {"model.gradient_checkpointing": False, "model.selective_checkpointing": False}
"""Settings of a model that nothing goes backward through."""


_Kept = list[tuple[Any, Any]]
"""Operations and what they gave, in their order."""


_PRODUCTS = frozenset(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm"))
"""Products of matrices, as linear layers and attention written out call them."""


def recompute_activations(hf: Any, config: ModelConfig) -> bool:
    """Keep the input of each layer alone, and compute the rest again in the backward pass (arXiv:1604.06174).

    Selective checkpointing keeps the products of matrices and what attention gives as well, so that only what is cheap
    is computed again (arXiv:2205.05198, section 5).

    Args:
        hf: a transformers model, set to do so whenever it is in training mode.
        config: asks for it, or not.

    Returns:
        Whether it was asked for.
    """
    if not (config.gradient_checkpointing or config.selective_checkpointing):
        return False
    options: dict[str, Any] = {"use_reentrant": False}
    if config.selective_checkpointing:
        options["context_fn"] = _contexts
    if hasattr(hf, "activation_checkpointing_enable"):  # what newer versions of transformers call it
        hf.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return True


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """What is around the forward pass of a layer, and around its recomputation."""
    kept: _Kept = []
    return _Keeping(kept), _Reusing(kept)


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True  # as FlexAttention, where it is not compiled

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled kernel is one operation, computed again as a whole."""
        return True


class _Keeping(_Mode):  # type: ignore[no-untyped-call]
    """Keeps what dear operations give."""

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if (schema := getattr(op, "_schema", None)) is not None and schema.is_mutable:
            self._refuse_kept(op, arguments)
        result = op(*arguments, **(options or {}))
        if _is_dear(op):
            self.kept.append((op, _alone(result)))
        return result

    def _refuse_kept(self, op: Any, written: Any) -> None:
        """Stop where an operation would write into what is kept: it would be computed again from its own result."""
        kept = {place for _, result in self.kept for place in _places(result)}
        if not kept.isdisjoint(_places(written)):
            raise ConfigError(
                f"--selective-checkpointing: this model overwrites the product of a matrix ({op}), which has to stay "
                "for the backward pass; use --gradient-checkpointing"
            )


class _Reusing(_Mode):  # type: ignore[no-untyped-call]
    """Gives in their order what was kept, anew for each backward pass; all else is computed."""

    def __enter__(self) -> Any:
        """Begin with the first."""
        self.rest = iter(self.kept)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if not _is_dear(op):
            return op(*arguments, **(options or {}))
        before, result = next(self.rest, (None, None))
        if before is not op:
            raise ConfigError(
                f"--selective-checkpointing: where a layer of this model computed {before}, it computes {op} in the "
                "backward pass; use --gradient-checkpointing"
            )
        return _alone(result)


def _alone(result: Any) -> Any:
    """The same numbers for autograd to make its own of: what is kept would hold what leads to it, and that holds it."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, result)


def _places(values: Any) -> set[int]:
    """The memory of all tensors; not by its address, which is 0 for what has none, as weights that are not gathered."""
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


@functools.cache
def _is_dear(op: Any) -> bool:
    """Products, and attention, whose operations all say so in their names."""
    return op in _PRODUCTS or "attn" in str(op) or "attention" in str(op)
