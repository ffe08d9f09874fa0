"""Whether a model computes the same with its rows divided: heads beforehand, rewards on the model at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from btrm_core.errors import ConfigError
from btrm_core.model.parallel.share import RowShare, require_heads
from btrm_core.model.selfcheck import CHECKED_TOKENS, shortened, small_and_exact
from btrm_core.packing import PADDED, Tree, collate, row_multiple

if TYPE_CHECKING:
    from btrm_core.model.reward import RewardModel


def check_heads(config: Any, count: int) -> None:
    """Refuse a number of processes that a model's heads cannot be divided among, before weights are read.

    Args:
        config: the transformers configuration of the base model.
        count: how many processes share a row.

    Raises:
        ConfigError: the heads do not divide; says which numbers do.
    """
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if count > 1 and isinstance(heads, int):  # layers with heads of their own are looked at when they compute
        require_heads(heads, count)


@torch.no_grad()
def divide_rows(
    model: RewardModel,
    share: RowShare,
    groups: Sequence[Tree],
    agree: Callable[[bool], bool] = lambda bad: bad,
) -> None:
    """Let a model compute this process's share of its rows from now on, after comparing with whole rows.

    Args:
        model: the reward model, proven to compute packed rows; it is given `share`.
        share: the part of this process; all that share rows with it call this.
        groups: real groups; up to three are compared.
        agree: tells whether something is true on any process; called equally often on all.

    Raises:
        ConfigError: the model's rows are padded lines, its heads do not divide, or its rewards change.
    """
    flag = f"--sequence-parallel {share.count}"
    if model.kernel == PADDED:
        raise ConfigError(
            f"{flag} needs packed rows, and this model cannot be computed in them (the reason is above); leave it out"
        )
    trees = [shortened(tree, CHECKED_TOKENS) for tree in groups[:3]]
    row = collate(trees, kernel=model.kernel, multiple_of=row_multiple(model.kernel, model.device.type))
    training = model.training
    model.eval()
    try:
        with small_and_exact(model) as tolerance:
            row = row.to(model.device)
            whole_S = model(row)
            model.share = share
            divided_S = model(row)
    except NotImplementedError as error:
        raise ConfigError(f"{flag}: {error}; leave it out") from error
    finally:
        model.train(training)
    difference = float((divided_S - whole_S).abs().max()) / max(1.0, float(whole_S.abs().max()))
    if agree(not difference <= tolerance):  # also for NaN
        raise ConfigError(
            f"{flag}: rewards differ from those of whole rows by {difference:.1e} (accepted: {tolerance:.0e}), so this "
            "model mixes tokens outside its attention; leave it out"
        )
