"""Positions: rotary frequencies that are not those of a separate pass, and conversations longer than a model knows.

Some rotary embeddings (dynamic NTK, longrope) choose their frequencies by the largest position of all sequences that
are computed together, so that a neighbour changes a reward, packed or padded. Below the length where they change, they
are ordinary ones.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from btrm_core.errors import ConfigError

BATCH_DEPENDENT = ("dynamic", "longrope")
"""Rotary types of transformers whose frequencies depend on the largest position of a batch."""

_LEARNED = re.compile(r"(^|[._])(wpe|position(al)?_embed\w*|embed_positions?|pos_emb\w*|pos_embed\w*)$")


def _rotary_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a config: one for all layers, or one for each kind of layer."""
    found: list[dict[str, Any]] = []
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(config, name, None)
        if isinstance(settings, dict):
            nested = [value for value in settings.values() if isinstance(value, dict)]
            found += nested if nested and "rope_type" not in settings else [settings]
    return found


def batch_dependent_lengths(config: Any) -> dict[int, str]:
    """The lengths from which on rotary frequencies depend on the batch, each with its rotary type; empty for most.

    A sequence of up to that many tokens has the frequencies of the original model whatever else is in its batch.

    Args:
        config: a transformers configuration; of a multimodal one, its text part is read.

    Returns:
        Tokens -> rotary type; 0 tokens where the configuration names no length.
    """
    text = config.get_text_config()
    found: dict[int, str] = {}
    for settings in _rotary_parameters(text):
        kind = str(settings.get("rope_type", settings.get("type", "default")))
        if not any(name in kind for name in BATCH_DEPENDENT):
            continue
        lengths = [getattr(text, "max_position_embeddings", None), settings.get("original_max_position_embeddings")]
        lengths.append(getattr(text, "original_max_position_embeddings", None))
        known = [int(length) for length in lengths if length]
        found[min(known, default=0)] = kind
    return found


def positions_depend_on_batch(hf: Any, longest: int | None = None) -> str | None:
    """Why a sequence's positions may be computed otherwise beside a longer one, or None if they never are.

    The configuration is read, and the model's rotary embeddings are asked: the first positions must come out the same
    whatever the last one is.

    Args:
        hf: a transformers model.
        longest: no sequence, and no filling of a row, is longer than this; None if that is not known.
    """
    config = hf.config
    flagged = {
        length: kind for length, kind in batch_dependent_lengths(config).items() if (longest or length + 1) > length
    }
    known = [*flagged, getattr(config.get_text_config(), "max_position_embeddings", None) or 2048, 4096]
    probes = sorted({n for length in known for n in (length + 1, 4 * length) if longest is None or n <= longest})
    asked = False
    for name, module in text_modules(hf):
        if not any(attribute.endswith("inv_freq") for attribute in (*vars(module), *module._buffers)):
            continue
        varies = _varies(module, probes)
        asked = asked or varies is not None
        if varies:
            kind = next(iter(flagged.values()), name)
            above = f" above {min(flagged)} tokens" if flagged else ""
            return f"its rotary embedding ({kind}) depends on the longest sequence of a batch{above}"
    if flagged and not asked:
        length, kind = min(flagged.items())
        return f"its rotary embedding ({kind}) depends on the longest sequence of a batch above {length} tokens"
    return None


@torch.no_grad()
def _varies(module: Any, lengths: list[int]) -> bool | None:
    """Whether a rotary module gives the first positions other values beside a far one; None if it cannot be asked."""
    table = next(iter(module.buffers()), None)
    if table is None or table.device.type == "meta":
        return None
    x = torch.zeros(1, 1, 8, device=table.device)
    first_T = torch.arange(8, device=table.device)
    kinds: list[dict[str, str]] = [{}]
    if isinstance(getattr(module, "rope_type", None), dict):  # a model with one rotary base for each kind of layer
        kinds = [{"layer_type": kind} for kind in module.rope_type]
    with fresh_positions(module):
        try:
            for kind in kinds:
                near = module(x, first_T[None], **kind)
                for length in lengths:
                    far = module(x, torch.cat([first_T, first_T.new_tensor([length - 1])])[None], **kind)
                    if any(not torch.equal(a, b[..., :8, :]) for a, b in zip(near, far, strict=True)):
                        return True
        except Exception:  # a module of its own kind: what it does is seen in the rewards
            return None
    return False


def _restore(module: Any) -> None:
    """Give a rotary module the frequencies it was made with; those of an earlier, longer batch are forgotten."""
    kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
    for layer_type in kinds:
        prefix = f"{layer_type}_" if layer_type else ""
        original = getattr(module, f"{prefix}original_inv_freq", None)
        current = getattr(module, f"{prefix}inv_freq", None)
        if isinstance(original, torch.Tensor) and isinstance(current, torch.Tensor):
            if "dynamic" in str(kinds[layer_type] if layer_type else module.rope_type):
                module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
            else:
                current.copy_(original)
        if hasattr(module, f"{prefix}max_seq_len_cached"):
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


@contextlib.contextmanager
def fresh_positions(model: nn.Module) -> Iterator[None]:
    """While active, rotary embeddings know nothing of earlier batches; they forget this one's as well.

    Args:
        model: any module; only its rotary embeddings of the `BATCH_DEPENDENT` types are touched.
    """
    changing = [m for m in model.modules() if hasattr(m, "rope_type") and hasattr(m, "original_max_seq_len")]
    changing = [m for m in changing if any(name in str(m.rope_type) for name in BATCH_DEPENDENT)]
    for module in changing:
        _restore(module)
    try:
        yield
    finally:
        for module in changing:
            _restore(module)


def towers(hf: Any) -> dict[str, nn.Module]:
    """The towers for pictures and sounds of a multimodal model, by name: text does not pass through them.

    Args:
        hf: a transformers model; a tower in it is a model with a configuration of another type.
    """
    own = {hf.config.model_type, hf.config.get_text_config().model_type}
    found: dict[str, nn.Module] = {}
    for name, module in hf.named_modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if hasattr(module, "get_input_embeddings") and kind not in own and not name.startswith(tuple(found)):
            found[f"{name}."] = module
    return found


def text_modules(hf: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that text passes through, with their names.

    Args:
        hf: a transformers model.
    """
    apart = tuple(towers(hf))
    return ((name, module) for name, module in hf.named_modules() if not f"{name}.".startswith(apart))


def position_limit(hf: Any) -> tuple[int | None, bool]:
    """How many positions a model has, and whether they are learned: none exists beyond them.

    Args:
        hf: a transformers model; learned positions are recognised by the names of its embedding tables.

    Returns:
        The number, None if the model sets no limit; and True for a table of learned positions.
    """
    config = hf.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    tables = [
        module.num_embeddings
        for name, module in text_modules(hf)
        if isinstance(module, nn.Embedding) and _LEARNED.search(name)
    ]
    if tables:  # some tables have rows before the first position
        return min(*tables, int(limit)) if limit else min(tables), True
    return (int(limit) if limit else None), False


def positions_problem(config: Any, longest: int, hf: Any | None = None) -> tuple[bool, str] | None:
    """Compare the longest conversation with the positions that a model knows.

    Args:
        config: the model's transformers configuration.
        longest: tokens of the longest conversation.
        hf: the model itself, where it is loaded: its tables of learned positions are counted. By its configuration
            alone, a model has learned positions if it names no rotary ones.

    Returns:
        None if all is well; else whether it is impossible (learned positions: there are no more) or only unwise
        (rotary positions that training never saw), and that in words.
    """
    text = config.get_text_config()
    if hf is not None:
        limit, learned = position_limit(hf)
    else:
        limit = getattr(text, "max_position_embeddings", None)
        learned = not (getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None))
    if not limit or longest <= limit:
        return None
    what = (
        f"conversations may have {longest:,} tokens, and the base model ({config.model_type}) knows {limit:,} positions"
    )
    if learned:
        return True, f"{what}, and no more: keep to them with --max-length {limit}"
    return False, f"{what}: what is beyond them it has never seen; keep to them with --max-length {limit}"


def check_max_length(hf: Any, max_length: int | None) -> str | None:
    """Compare the longest conversation that is kept with what a loaded model has positions for.

    Args:
        hf: the base model.
        max_length: tokens of the longest conversation that is kept; None compares nothing.

    Returns:
        A warning if rotary positions would be new to the model; None if all is well.

    Raises:
        ConfigError: positions are learned, and there are fewer.
    """
    problem = None if max_length is None else positions_problem(hf.config, max_length, hf)
    if problem is None:
        return None
    impossible, what = problem
    if impossible:
        raise ConfigError(what)
    return what


@contextlib.contextmanager
def frequencies_kept() -> Iterator[None]:
    """While active, a model that ZeRO-3 spreads over processes gets the rotary frequencies that every reader computes.

    DeepSpeed turns whatever tensor is made meanwhile into the type of the weights, and before 5.23 transformers makes
    frequencies of such a `torch.arange`. Rounded to bf16 they put the far tokens of a conversation elsewhere than the
    base model learned them, and only while it is trained.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero import partition_parameters as zero

    wrapper = zero.zero_wrapper_for_fp_tensor_constructor

    def considerate(make: Callable[..., Any], target_fp_dtype: Any, **more: Any) -> Callable[..., Any]:
        kept = make is zero._orig_torch_arange
        return cast("Callable[..., Any]", wrapper(make, target_fp_dtype=None if kept else target_fp_dtype, **more))

    zero.zero_wrapper_for_fp_tensor_constructor = considerate
    try:
        yield
    finally:
        zero.zero_wrapper_for_fp_tensor_constructor = wrapper
