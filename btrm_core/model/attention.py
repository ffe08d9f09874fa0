"""How packed rows reach a transformers model, and which kernel computes their attention.

Two registered functions do it, without patching a model and without code per family. The mask
function is called where a model builds its masks: it asks the model's own rule what it allows and
returns a small `LayerMask`. The attention function receives that mask in every layer, with the
scaling and soft-capping the layer passes, and calls a kernel. Whatever is not understood (chunked
or bidirectional attention, sinks, position bias, attention dropout) raises `NotImplementedError`,
and the caller falls back to padded batches.

Called without a packed row (padded lines, or a user running the model by hand), both do what
transformers' own functions do, so a model set to a btrm kernel remains an ordinary model.

This module decides the kernel; the kernels are in `kernels`, the masks' forms in `packing.visibility`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from btrm_core.errors import ConfigError, did_you_mean
from btrm_core.model import kernels
from btrm_core.model.parallel.share import RowShare
from btrm_core.packing import Visibility

KERNELS = ("flash", "varlen", "flex", "sdpa", "eager")
"""Kernel names as users type them, besides "auto"."""

# transformers reads meaning into some names: "flash", "sdpa" and "flex_attention" inside one bring checks of its own
# implementations, and "/" makes it look for a kernel on the hub.
_REGISTERED = {
    "flash": "btrm_package",
    "varlen": "btrm_varlen",
    "flex": "btrm_flex",
    "sdpa": "btrm_dense",
    "eager": "btrm_eager",
}

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "flash": kernels.flash,
    "varlen": kernels.varlen,
    "flex": kernels.flex,
    "sdpa": kernels.dense,
    "eager": kernels.eager,
}
"""The function that computes each kernel."""

SOFTCAP_KERNELS = ("flash", "flex", "eager")
"""Kernels that compute soft-capped scores; the others would drop the cap and change every reward."""


@dataclass(frozen=True)
class Call:
    """What a layer asks of its kernel; the arguments are those of the functions in `kernels`."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    scaling: float | None
    softcap: float | None


_CALLS: contextvars.ContextVar[set[Call] | None] = contextvars.ContextVar("btrm_calls", default=None)


@dataclass(frozen=True)
class LayerMask:
    """What a layer gets as its attention mask: the row's visibility, the layer's window, and whose share this is."""

    visibility: Visibility
    window: int | None
    share: RowShare | None = None


_ROW: contextvars.ContextVar[LayerMask | None] = contextvars.ContextVar("btrm_row", default=None)


@contextlib.contextmanager
def masks_for(visibility: Visibility, share: RowShare | None = None) -> Iterator[None]:
    """While active, models build their masks from `visibility`.

    Only building needs it: it then travels with the layers' arguments, so backward and recomputing never look here.

    Args:
        visibility: who sees whom in the packed row that is computed inside the block.
        share: this process's part of it; None computes all of it.
    """
    token = _ROW.set(LayerMask(visibility, None, share))
    try:
        yield
    finally:
        _ROW.reset(token)


@contextlib.contextmanager
def calls_noted() -> Iterator[set[Call]]:
    """While active, what layers ask of their kernel is put into the set that is given."""
    token = _CALLS.set(set())
    try:
        yield cast("set[Call]", _CALLS.get())
    finally:
        _CALLS.reset(token)


def layer_mask(
    *, mask_function: Callable[..., Any], local_size: int | None = None, config: Any = None, **rest: Any
) -> Any:
    """The registered mask function: recognise the model's rule and return its `LayerMask`.

    It is probed at pairs of offsets, not known by name, so any causal rule, also within a window, is understood.

    Args:
        mask_function: the model's rule, `(batch, head, query, key) -> visible`.
        local_size: the window, for layers that have one.
        config: the model's config.
        **rest: what else transformers passes; used only without a packed row.

    Returns:
        A `LayerMask`, or the mask of transformers' own attention if no packed row is being run.

    Raises:
        NotImplementedError: the rule is neither causal nor a causal sliding window.
    """
    row = _ROW.get()
    if row is None:
        own = eager_mask if uses_softcap(config) else sdpa_mask
        return own(mask_function=mask_function, local_size=local_size, config=config, **rest)
    far = 1 << 20
    probes = [(0, 0, True), (0, 1, False)]
    if local_size is None:
        probes += [(far, 0, True)]
    else:
        for oldest in (0, 1, far):  # a window moves with the query; a chunk would start anew
            probes += [(oldest + local_size - 1, oldest, True), (oldest + local_size, oldest, False)]
    query, key, expected = (torch.tensor(column) for column in zip(*probes, strict=True))
    zero = torch.tensor(0)
    try:
        understood = torch.equal(mask_function(zero, zero, query, key).expand_as(expected), expected)
    except (IndexError, RuntimeError):  # rules that look offsets up in a tensor
        understood = False
    if not understood:
        raise NotImplementedError("only causal and sliding-window attention can be packed")
    return replace(row, window=local_size)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    *,
    kernel: str,
    **more: Any,
) -> tuple[torch.Tensor, Any]:
    """The registered attention function of every layer.

    Args:
        module: the attention layer.
        query: [1, heads, T, D]; T counts this process's own tokens where several share the row.
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, V]; V is D in most models.
        attention_mask: what `layer_mask` returned.
        kernel: one of `KERNELS`.
        **more: what else a model passes; only what changes the result is looked at: `scaling`, the factor on the
            scores (None is 1/sqrt(D)), `softcap`, and `dropout`, which must be 0.

    Returns:
        The output [1, T, heads, V], and None for weights; without a packed row what transformers' own function gives.

    Raises:
        NotImplementedError: the layer asks for something the kernels do not compute.
        ConfigError: several processes share the row, and the layer's heads cannot be divided among them.
    """
    if not isinstance(attention_mask, LayerMask):
        if _ROW.get() is not None:
            raise NotImplementedError("the model does not take its mask from transformers' mask functions")
        own = _own_attention(module, more.pop("softcap", None), more)
        answer: tuple[torch.Tensor, Any] = own(module, query, key, value, attention_mask, **more)
        return answer
    if more.get("dropout"):
        raise NotImplementedError("attention dropout cannot be packed exactly; set attention_dropout to 0")
    for name in ("s_aux", "position_bias"):
        if more.get(name) is not None:
            raise NotImplementedError(f"attention with {name} cannot be packed")
    if more.get("is_causal") is False or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise NotImplementedError("only causal self-attention over one row at a time can be packed")
    options: dict[str, Any] = {"window": attention_mask.window, "scaling": more.get("scaling")}
    if (softcap := more.get("softcap")) is not None:
        if kernel not in SOFTCAP_KERNELS:
            raise NotImplementedError(f"kernel '{kernel}' cannot compute this model's attention soft-capping")
        options["softcap"] = softcap
    if (noted := _CALLS.get()) is not None:
        shape = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        noted.add(Call(*shape, **{"softcap": None, **options}))
    function, visibility, share = FUNCTIONS[kernel], attention_mask.visibility, attention_mask.share
    if share is not None:
        return share.attention(function, query, key, value, visibility, options), None
    return function(query, key, value, visibility, **options), None


def _own_attention(module: torch.nn.Module, softcap: float | None, more: Mapping[str, Any]) -> Callable[..., Any]:
    """The attention that transformers would use for a layer without a packed row."""
    if softcap is None:
        if more.get("s_aux") is not None:
            raise NotImplementedError("attention sinks need the model's own attention (kernel 'padded')")
        return cast("Callable[..., Any]", sdpa_attention_forward)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return functools.partial(eager, softcap=softcap)


def registered_name(kernel: str) -> str:
    """The name under which transformers knows a kernel.

    Args:
        kernel: one of `KERNELS`; "padded" is none of them.

    Returns:
        A name for `set_attn_implementation`, free of the words that transformers gives a meaning.
    """
    return _REGISTERED[kernel]


def _register() -> None:
    for kernel, name in _REGISTERED.items():
        AttentionInterface.register(name, functools.partial(attend, kernel=kernel))
        AttentionMaskInterface.register(name, layer_mask)


_register()


def uses_softcap(config: Any) -> bool:
    """Whether a model config asks for attention soft-capping.

    Args:
        config: a transformers configuration; of a multimodal one, its text part is read.

    Returns:
        True if `attn_logit_softcapping` is set, as in Gemma 2 (arXiv:2408.00118, section 2).
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "attn_logit_softcapping", None) is not None


def choose_kernel(
    requested: str,
    *,
    device_type: str,
    softcap: bool,
    allowed: Sequence[str] = (),
    half: bool = True,
) -> str:
    """Decide the attention kernel from the setting, the device, the model and its family.

    Args:
        requested: "auto" or one of `KERNELS`.
        device_type: "cuda", "cpu", ...
        softcap: whether the model soft-caps its attention scores (`uses_softcap`).
        allowed: the kernels the family's recipe allows, preferred ones first; empty allows all.
        half: whether attention runs in float16 or bfloat16.

    Returns:
        One of `KERNELS`.

    Raises:
        ConfigError: the name is unknown, or that kernel is not allowed, not available, or would
            change the model's numbers; or "auto" finds none.
    """
    if requested not in ("auto", *KERNELS):
        raise ConfigError(
            f"attention kernel '{requested}' is unknown; expected one of auto, {', '.join(KERNELS)}."
            f"{did_you_mean(requested, KERNELS)}"
        )
    obstacles = {kernel: _obstacle(kernel, device_type=device_type, softcap=softcap, half=half) for kernel in KERNELS}
    usable = [kernel for kernel in allowed or KERNELS if obstacles.get(kernel) is None]
    if requested == "auto":
        if not usable:
            raise ConfigError(
                f"no attention kernel is left on {device_type}: the family allows {', '.join(allowed)}, and "
                + "; ".join(f"{kernel} {obstacles[kernel]}" for kernel in allowed if kernel in obstacles)
                + ". Extend the family's recipe, or train padded."
            )
        return usable[0]
    obstacle = obstacles[requested]
    if obstacle is None and allowed and requested not in allowed:
        obstacle = f"is not among the kernels that the model's family allows ({', '.join(allowed)})"
    if obstacle is not None:
        raise ConfigError(
            f"attention kernel '{requested}' {obstacle}; allowed here: {', '.join(usable) or 'none'}. "
            "Choose one of these, or auto."
        )
    return requested


def _obstacle(kernel: str, *, device_type: str, softcap: bool, half: bool) -> str | None:
    """Why a kernel cannot be used, as the end of a sentence that begins with its name, or None."""
    if softcap and kernel not in SOFTCAP_KERNELS:
        return "would silently drop this model's attention soft-capping"
    if kernel == "flex" and device_type != "cuda":
        return "needs a CUDA device (torch has no backward pass for it elsewhere)"
    if kernel == "flex" and torch.cuda.is_available() and (lacking := compiler_lacks()) is not None:
        return f"is compiled when it is first used, and {lacking}"
    if kernel == "flash":
        if device_type != "cuda":
            return "needs a CUDA device"
        version = kernels.flash_version()
        if version is None:
            return "needs the flash-attn package (pip install 'btrm[flash]')"
        if version < (2, 6, 2):
            # Older versions have no gradient through soft-capping, and none is worth supporting apart.
            found = ".".join(map(str, version))
            return f"needs flash-attn 2.6.2 or later (installed: {found})"
        if not half:
            return "computes in float16 and bfloat16 only"
    if kernel == "varlen" and device_type == "cuda" and not half:
        return "computes in float16 and bfloat16 only on CUDA"
    return None


def compiler_lacks() -> str | None:
    """What triton needs in order to compile a kernel on this machine and does not find, or None.

    Triton compiles a small C module for each kernel that it starts.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "there is no C compiler (apt install gcc, or set CC)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"Python's headers are missing ({header}; apt install python3-dev)"
    return None
