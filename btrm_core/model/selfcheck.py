"""The two checks before a model is trusted: packed rows equal separate passes, and a new head starts near ln 2."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from btrm_core.errors import TrainingError
from btrm_core.packing import PADDED, Tree, collate, grow, pad_rows, row_multiple

if TYPE_CHECKING:
    from btrm_core.model.reward import RewardModel

CHECKED_TOKENS = 4608
"""Tokens of the longest sequence of a check: more than the sliding windows in use, and few enough for a T x T matrix
for every head, which transformers' own eager attention makes."""


@dataclass(frozen=True)
class SelfCheck:
    """The outcome of `self_check`.

    Attributes:
        ok: whether packed rows may be trusted.
        difference: largest difference between a packed and a separate reward, relative to the
            largest reward where that exceeds 1; infinite if packing raised.
        tolerance: the largest difference accepted.
        reason: one line for the user.
    """

    ok: bool
    difference: float
    tolerance: float
    reason: str


def self_check(model: RewardModel, groups: Sequence[Tree], tolerance: float | None = None) -> SelfCheck:
    """Compare packed, prefix-shared rewards with separate forward passes on up to three real groups.

    The separate passes take one unpadded sequence each through transformers' own eager attention. Only as many layers
    run as it takes to have each kind of attention, and in float32 wherever the kernel can: in a deep half-precision
    model the rounding of any two arrangements would hide a wrong mask. Give the longest groups at hand: a sliding
    window longer than every sequence, or than `CHECKED_TOKENS`, is not tested. Under ZeRO-3, whose weights are spread
    out, the whole model runs as it is; call it on all ranks with equally many sequences. If the answer is no, go on
    with `model.use_kernel("padded")` and padded lines.

    Args:
        model: the reward model, set to the kernel to check; all of it is left as it was.
        groups: real groups; the first three are used.
        tolerance: accepted difference; None takes 2e-4 where float32 was used (1e-3 under ZeRO-3), 5e-2 for a few
            half-precision layers and 1e-1 for all of them.
    """
    chosen = [shortened(group, CHECKED_TOKENS) for group in groups[:3]]
    if model.kernel == PADDED:
        return SelfCheck(False, math.inf, tolerance or 0.0, "the model's own attention is in use, which cannot pack")
    config = model.base_model.config.get_text_config()
    if getattr(config, "attention_dropout", 0.0):  # off in the passes below, on in training
        reason = f"the model cannot be packed: its config asks for attention dropout ({config.attention_dropout})"
        return SelfCheck(False, math.inf, tolerance or 0.0, reason)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), small_and_exact(model) as default_tolerance:
            tolerance = default_tolerance if tolerance is None else tolerance
            row = collate(chosen, kernel=model.kernel, multiple_of=row_multiple(model.kernel, model.device.type))
            packed_S = model(row.to(model.device))
            separate_S = _separate_rewards(model, chosen)
    except NotImplementedError as error:
        return SelfCheck(False, math.inf, tolerance or 0.0, f"the model cannot be packed: {error}")
    finally:
        model.train(training)
    scale = max(1.0, float(separate_S.abs().max()))
    difference = float((packed_S - separate_S).abs().max()) / scale
    ok = difference <= tolerance  # False for NaN
    verdict = "equal" if ok else "differ from"
    return SelfCheck(
        ok,
        difference,
        tolerance,
        f"packed rewards of {len(chosen)} groups {verdict} separate ones "
        f"(difference {difference:.1e}, accepted {tolerance:.0e})",
    )


def shortened(group: Tree, longest: int) -> Tree:
    """A group whose sequences have at most so many tokens: the beginning goes first, so that the answers stay.

    >>> from btrm_core.packing import grow
    >>> [ids.tolist() for ids in shortened(grow([[1, 2, 3, 4, 5], [1, 2, 3, 6]]), 3).sequences]
    [[3, 4, 5], [3, 6]]

    Args:
        group: a group.
        longest: tokens.
    """
    lengths = group.lengths
    if lengths.max() <= longest:
        return group
    first = min(int(lengths.max()) - longest, int(lengths.min()) - 1)
    return grow([sequence[first : first + longest] for sequence in group.sequences])


@contextlib.contextmanager
def small_and_exact(model: RewardModel) -> Iterator[float]:
    """While active: few layers, float32 weights where the kernel takes them; yields the tolerance that fits.

    Args:
        model: the reward model; all of it is left as it was.
    """
    parameters = list(model.parameters())
    half = parameters[0].dtype in (torch.float16, torch.bfloat16)
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield 1e-1 if half else 1e-3
        return
    backbone = getattr(model.base_model, model.base_model.base_model_prefix)
    layers = getattr(backbone, "layers", None)
    kinds = getattr(model.base_model.config.get_text_config(), "layer_types", None) or ["full"]
    enough = max(2, *(1 + kinds.index(kind) for kind in set(kinds)))
    packed = any(not parameter.is_floating_point() for parameter in parameters)  # 4-bit weights
    half_only = half and (packed or (model.device.type == "cuda" and model.kernel in ("flash", "varlen")))
    before = {parameter: parameter.data for parameter in parameters}
    try:
        if isinstance(layers, nn.ModuleList):
            backbone.layers = layers[:enough]
        if half and not half_only:
            for parameter in model.parameters():
                parameter.data = parameter.data.float()
        yield 5e-2 if half_only else 2e-4
    finally:
        for parameter, data in before.items():
            parameter.data = data
        if isinstance(layers, nn.ModuleList):
            backbone.layers = layers


def _separate_rewards(model: RewardModel, groups: Sequence[Tree]) -> torch.Tensor:
    """Rewards of every sequence by itself, unpadded, through transformers' eager attention."""
    rewards = []
    with model.own_attention():
        for group in groups:
            for alone in group.unshared():
                rewards.append(model(pad_rows([alone]).to(model.device)))
    return torch.cat(rewards)


LN2 = math.log(2.0)


def expected_first_loss(margin_P: np.ndarray) -> tuple[float, float]:
    """The loss a random head should start with, and how far off it may be.

    A head that knows nothing orders pairs at random, so the mean loss is ln 2 plus the curvature of -log sigmoid at 0
    times the variance of the reward margin: ln 2 + var / 8. The margins of one head share its direction, hence their
    mean may be off by about their spread; more than that is not explained.

    Args:
        margin_P: reward margins of the pairs under the fresh head.

    Returns:
        The mean loss to expect, and the distance from it, either way, that is still explained.

    >>> import numpy as np
    >>> expected, slack = expected_first_loss(np.array([-0.4, 0.4, -0.4, 0.4]))
    >>> round(expected - 0.6931, 3)
    0.02
    """
    variance = float(np.var(margin_P))
    return LN2 + variance / 8, 0.05 + 0.75 * math.sqrt(variance) + variance / 4


@dataclass(frozen=True)
class FirstLoss:
    """The loss of a fresh head before the first step.

    Attributes:
        loss: the mean over the pairs.
        expected: what a head that knows nothing is expected to give.
        slack: how far off that may be.
        warning: one line for the user if it is further off; None otherwise.
    """

    loss: float
    expected: float
    slack: float
    warning: str | None


def check_first_loss(rewards_P2: np.ndarray, ids: list[str]) -> FirstLoss:
    """Compare the step-0 loss of a fresh head with ln 2.

    A loss far from it is only remarked on: sound data may have one side that is always the same text, and whether
    tokens leak between the sides is tested by itself.

    Args:
        rewards_P2: rewards of each pair, chosen then rejected, before any step.
        ids: names of the P pairs, for the error.

    Returns:
        The mean loss of the pairs, what was to be expected, and a warning if they are far apart.

    Raises:
        TrainingError: a reward is not finite, the head is all zeros, or all margins are zero.
    """
    bad = ~np.isfinite(rewards_P2).all(axis=1)
    if bad.any():
        some = ", ".join(ids[i] for i in np.flatnonzero(bad)[:3])
        raise TrainingError(
            f"{int(bad.sum())} of {len(bad)} pairs have a reward that is not finite before training (first: {some}); "
            "the base model's weights or the attention kernel are broken; try --attention eager"
        )
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    if not rewards_P2.any():
        raise TrainingError(
            "every reward is 0 before training, because the head, or the hidden states it reads, are all zero; "
            "expected random values in the head and whole weights in the base model"
        )
    if len(margin_P) > 1 and not margin_P.any():
        raise TrainingError(
            "chosen and rejected get the same reward in every pair before training, so there is nothing to learn from; "
            "the reward is read where both sides are still equal (is the chat template cut off?)"
        )
    loss = float(np.logaddexp(0.0, -margin_P).mean())
    expected, slack = expected_first_loss(margin_P)
    warning = None
    if abs(loss - expected) > slack:
        warning = (
            f"the first loss is {loss:.3f}, and an untrained head on these pairs is expected to give {expected:.3f} ± "
            f"{slack:.3f}; reward margin {margin_P.mean():+.3f} ± {margin_P.std():.3f}: is one side often the same "
            "text, or told apart by its length?"
        )
    return FirstLoss(loss, expected, slack, warning)
