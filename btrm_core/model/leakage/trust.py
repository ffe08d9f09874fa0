"""How a model's sequences are laid out: packed where that is proven exact, else padded, else one at a time.

One function decides for training, scoring, doctor and conformance, so that what was trained can be scored likewise.
Whatever goes wrong in a test leads to the next safe choice with its reason; only if nothing is left is it an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from btrm_core.cache import cache_root, code_digest, keep_value, kept_value
from btrm_core.errors import ConfigError, first_line, one_line
from btrm_core.model.attention import KERNELS, calls_noted, choose_kernel, uses_softcap
from btrm_core.model.leakage.exact import Leak, examine
from btrm_core.model.leakage.positions import positions_depend_on_batch
from btrm_core.model.leakage.probe import probe
from btrm_core.model.leakage.structure import token_mixers
from btrm_core.model.selfcheck import self_check
from btrm_core.packing import PADDED, Tree, row_multiple

if TYPE_CHECKING:
    from btrm_core.model.reward import RewardModel


@dataclass(frozen=True)
class Trust:
    """What was decided for a model, which has been set accordingly.

    Attributes:
        layout: shared, packed or padded.
        one_by_one: whether padded lines are computed one at a time.
        kernel: the kernel in use.
        why_not: what was tried before and why it is not used, one line each, the first choice first.
        proof: what the chosen one was found to be, one line.
        difference: largest relative difference of a reward from a separate pass with the chosen one.
        wrong: whether a way that was expected to be exact computed something else.
    """

    layout: str
    one_by_one: bool
    kernel: str
    why_not: tuple[str, ...]
    proof: str
    difference: float
    wrong: bool = False

    @property
    def note(self) -> str | None:
        """One line for the user if it is not the first choice; None otherwise."""
        if not self.why_not:
            return None
        now = f"{self.kernel} attention in packed rows"
        if self.layout == PADDED:
            now = "one sequence at a time" if self.one_by_one else "padded batches"
        return f"{'; '.join(self.why_not)}; going on with {now}"


@dataclass(frozen=True)
class Use:
    """What a model is used for.

    Attributes:
        layout: the layout asked for: shared, packed or padded.
        pad_id: id of the tokens that fill up.
        longest: the longest sequence that will be computed, in tokens; None if that is not known.
        training: whether the model will be trained.
        allowed: the kernels that the family's recipe allows; empty allows all.
        cache_dir: the cache of verdicts by architecture and versions; None takes the usual one.
    """

    layout: str = "shared"
    pad_id: int = 0
    longest: int | None = None
    training: bool = True
    allowed: Sequence[str] = ()
    cache_dir: str | None = None


def trusted(
    model: RewardModel,
    groups: Sequence[Tree],
    use: Use,
    agree: Callable[[bool], bool] = lambda bad: bad,
) -> Trust:
    """Decide how sequences are laid out, by testing it, and set the model's kernel to it.

    Args:
        model: the reward model, with its first choice of kernel.
        groups: real groups, the longest at hand first.
        use: what it is used for.
        agree: tells whether a test failed on any process; called equally often on all.

    Raises:
        ConfigError: no way is exact, or the only one left is one at a time and weights are spread out (ZeRO-3).
    """
    layout, longest, allowed = use.layout, use.longest, use.allowed
    why_not: list[str] = []
    wrong: list[bool] = []
    model.one_by_one = False
    if layout != PADDED:
        found = _packed(model, groups, use, allowed, agree, why_not, wrong)
        if found is not None:
            return Trust(layout, False, model.kernel, tuple(why_not), found.reason, found.difference, any(wrong))
    padded = replace(use, layout=PADDED)
    model.use_kernel(PADDED)
    dependent = positions_depend_on_batch(model.base_model, longest)
    if dependent is None:
        found = _attempt(model, groups, padded, check_real=False)
        if not agree(not found.ok):
            return Trust(PADDED, False, PADDED, tuple(why_not), found.reason, found.difference, any(wrong))
        dependent = found.reason
    if not any(dependent in reason for reason in why_not):
        why_not.append(f"padded batches are not exact for this model: {dependent}")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError(
            f"{'; '.join(why_not)}; one sequence at a time needs whole weights on every process: "
            "give --deepspeed zero2 or lower"
        )
    model.one_by_one = True
    found = _attempt(model, groups, padded, check_real=False)
    if agree(not found.ok):
        raise ConfigError(
            f"this architecture ({model.base_model.config.model_type}) cannot be computed exactly, not even one "
            f"sequence at a time: {found.reason}; expected another base model"
        )
    return Trust(PADDED, True, PADDED, tuple(why_not), found.reason, found.difference, any(wrong))


def _packed(
    model: RewardModel,
    groups: Sequence[Tree],
    case: Use,
    allowed: Sequence[str],
    agree: Callable[[bool], bool],
    why_not: list[str],
    wrong: list[bool],
) -> Leak | None:
    """Try packed rows with one kernel after another; None, and the reasons in `why_not`, if none is exact."""
    structure = _structure(model, case)
    if structure is not None:
        why_not.append(f"packed rows cannot be used for this model ({structure})")
        return None
    for kernel in (model.kernel, *_other_kernels(model, allowed)):
        try:
            model.use_kernel(kernel)
        except ConfigError as error:
            found = Leak(False, str(error), math.inf, 0.0)
        else:
            found = _attempt(model, groups, case, check_real=True)
        if not agree(not found.ok):
            return found
        if not any(found.reason in reason for reason in why_not):
            why_not.append(f"packed rows cannot be used for this model ({kernel} attention: {found.reason})")
        wrong.append(found.tolerance > 0)
    return None


def _structure(model: RewardModel, case: Use) -> str | None:
    """Why a model cannot be packed, as far as that is seen without running it; None if it may."""
    if model.kernel == PADDED:
        return "it does not use transformers' attention interface, so its attention cannot be packed"
    if mixer := token_mixers(model.base_model):
        return mixer
    filling = row_multiple(model.kernel, model.device.type)  # the filling of a row has positions of its own
    longest = None if case.longest is None else max(case.longest, filling - 1)
    return positions_depend_on_batch(model.base_model, longest)


def _other_kernels(model: RewardModel, allowed: Sequence[str]) -> Iterator[str]:
    """The kernels that could stand in for the model's own, the preferred ones first."""
    base = model.base_model
    facts: dict[str, Any] = {
        "device_type": model.device.type,
        "softcap": uses_softcap(base.config),
        "half": base.dtype in (torch.float16, torch.bfloat16),
    }
    first = model.kernel
    for kernel in allowed or KERNELS:
        with contextlib.suppress(ConfigError):
            if kernel != first and choose_kernel(kernel, allowed=allowed, **facts) == kernel:
                yield kernel


def _attempt(model: RewardModel, groups: Sequence[Tree], case: Use, *, check_real: bool) -> Leak:
    """Test one way; an exception of the model, of a kernel or of a compiler is a verdict like any other."""
    try:
        leak = _examined(model, groups, case)
        if leak.ok and check_real and groups:
            with calls_noted() as calls:
                check = self_check(model, groups)
            if not check.ok:
                return Leak(False, check.reason, check.difference, check.tolerance)
            kernel = probe(model.kernel, calls, model.device, model.base_model.dtype, case.training)
            if not kernel.ok:
                return kernel
            return Leak(True, f"{leak.reason}; {check.reason}", max(leak.difference, check.difference), check.tolerance)
        return leak
    except torch.OutOfMemoryError as error:  # every other choice takes as much, or more
        raise ConfigError(
            f"the GPU is out of memory in the checks before the first step ({first_line(error)}); try a smaller "
            "--max-length, --deepspeed zero3-offload, or a GPU with more memory"
        ) from error
    except NotImplementedError as error:
        return Leak(False, first_line(error), math.inf, 0.0)
    except Exception as error:  # whatever it is, the next choice does without
        return Leak(False, one_line(error), math.inf, 0.0)


def _examined(model: RewardModel, groups: Sequence[Tree], case: Use) -> Leak:
    """`examine`, or its verdict for the same architecture, versions and use of an earlier run."""
    path = _cached_at(model, case)
    if path is not None:
        known = kept_value(path)
        if known is not None:
            return Leak(**known)
    leak = examine(model, groups, layout=case.layout, pad_id=case.pad_id, longest=case.longest, training=case.training)
    if path is not None and math.isfinite(leak.difference):
        keep_value(path, vars(leak))
    return leak


def _cached_at(model: RewardModel, case: Use) -> Path | None:
    """Where the verdict is kept; None if it may not be, because some module's computation is not that of its class."""
    modules = list(model.modules())
    if any("forward" in vars(module) for module in modules):
        return None
    classes = {type(module) for module in modules}
    described = model.base_model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        described.pop(name, None)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    facts = {
        "architecture": described,
        "classes": sorted(f"{c.__module__}.{c.__qualname__} {_source(c)}" for c in classes),
        "dtype": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "dropout": sorted({module.p for module in modules if isinstance(module, torch.nn.Dropout)}),
        "versions": [
            torch.__version__,
            transformers.__version__,
            code_digest("model", "model/leakage", "model/savings", "packing"),
        ],
        "use": [case.layout, model.kernel, model.one_by_one, case.longest, case.training, device],
        "hooks": sum(len(module._forward_pre_hooks) for module in modules),
        "checkpointing": sorted({how for module in modules if (how := _recomputed(module))}),
        "spread out": any(hasattr(parameter, "ds_id") for parameter in model.parameters()),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_root(case.cache_dir) / "leakage" / f"{key}.json"


def _recomputed(module: torch.nn.Module) -> str:
    """How a layer's activations are computed again: the names of what checkpointing was given; "" if they are not."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    wanted = getattr(module, "gradient_checkpointing", False)
    return f"with {', '.join(sorted(getattr(function, 'keywords', ())))}" if wanted else ""


def _source(kind: type) -> str:
    """The digest of the file that a class comes from, where no version says what is in it."""
    if kind.__module__.partition(".")[0] in ("torch", "transformers", "btrm_core"):
        return ""
    with contextlib.suppress(OSError, TypeError):
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    return ""
