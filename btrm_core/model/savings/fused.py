"""Liger's fused norms, rotary embedding and MLP, in the model that asks for them and in no other."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from btrm_core.errors import ConfigError
from btrm_core.model.attention import compiler_lacks


def use_kernels(hf: Any, kernels: str, *, keep_products: bool = False) -> None:
    """Replace norms, rotary embedding and MLP by Liger's fused kernels, if asked for (arXiv:2410.10989).

    `auto` keeps torch's, with which other programs score the model: Liger's differ by rounding. On an H100 they made a
    step 21 % faster (benchmarks/LOG.md).

    Args:
        hf: a transformers model, whose modules are changed in place.
        kernels: the setting `model.kernels`: "auto", "torch" or "liger".
        keep_products: products are kept for recomputation; Liger's rotary embedding would overwrite them.

    Raises:
        ConfigError: liger is asked for and not installed, cannot be compiled here, or there is no GPU.
    """
    if kernels != "liger":
        return
    if not torch.cuda.is_available():
        raise ConfigError("--kernels liger needs a GPU, and torch sees none; use --kernels torch")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise ConfigError("--kernels liger needs liger-kernel; pip install 'btrm[liger]'") from error
    if (lacking := compiler_lacks()) is not None:
        raise ConfigError(f"--kernels liger compiles its kernels when they are first used, and {lacking}")
    with _kept_to_one_model():
        _apply_liger_kernel_to_instance(model=hf, **({"rope": False} if keep_products else {}))


@contextlib.contextmanager
def _kept_to_one_model() -> Iterator[None]:
    """Take back what Liger writes into transformers' modules besides changing the model it is given.

    Layers that are made later, on a CPU or without memory to ask for their shapes, would run kernels of the GPU on
    what is not there: an illegal access, which ends the process wherever it next looks at the GPU. The layers of the
    model look its rotary embedding up in the module, so that one stays, for tensors on a GPU.
    """
    modules = [
        module
        for name, module in list(sys.modules.items())
        if re.fullmatch(r"transformers\.models\..*modeling\w+", name)
    ]
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            for name, changed in [(n, v) for n, v in vars(module).items() if n in own and v is not own[n]]:
                setattr(module, name, own[name] if isinstance(changed, type) else _on_a_gpu(changed, own[name]))


def _on_a_gpu(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes the fused form for tensors on a GPU, and the plain one for all others."""
    own = getattr(plain, "plain", plain)  # of a second model: not one around another

    def either(first: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return (fused if first.is_cuda else own)(first, *arguments, **options)

    either.plain = own  # type: ignore[attr-defined]
    return either
