"""What is measured on pairs: sums that add up exactly over any split into micro-batches and processes.

Decides: which sums are kept and how they become loss, accuracy and the rest. Every mean is a quotient of sums over
pairs, so no partial last batch is weighted too high. One vector is reduced over processes once per step.

Shapes: P pairs, F fields.
"""

from __future__ import annotations

import math
import resource
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from btrm_core.training.micro_batches import StepBatches
    from btrm_core.training.schedule import Schedule

FIELDS = (
    "pairs",
    "weight",
    "weighted_loss",
    "correct",
    "ties",
    "margin",
    "margin_squared",
    "chosen",
    "chosen_squared",
    "rejected",
    "rejected_squared",
    "computed_tokens",
    "useful_tokens",
    "shared_tokens",
    "padding_tokens",
    "asked_to_stop",
)


NORM = "grad_norm"
"""What the norm of a step's gradient is called beside the sums."""


class PairSums:
    """Running sums over pairs in float64: rewards on one device, counts on the host.

    Nothing is copied between host and device while rows are added; `vector` does it once per step.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rewards = torch.zeros(FIELDS.index("computed_tokens"), dtype=torch.float64, device=device)
        self.counts = [0, 0, 0, 0, 0]

    def add_pairs(
        self,
        chosen_P: Tensor,
        rejected_P: Tensor,
        loss_P: Tensor,
        weight_P: Tensor,
        probability_P: Tensor | None = None,
    ) -> None:
        """Add the rewards and losses of P pairs; a pair with probability 0.5 is a tie whatever its rewards.

        Args:
            chosen_P: Rewards of the chosen conversations, in any floating type; gradients are not followed.
            rejected_P: Likewise of the rejected ones.
            loss_P: Loss of each pair, not yet weighted.
            weight_P: Weight of each pair in the loss; accuracy and means of rewards count every pair once.
            probability_P: How likely it is that chosen is the better one; None is 1 for all.
        """
        chosen_P, rejected_P = chosen_P.detach().double(), rejected_P.detach().double()
        margin_P, weight_P = chosen_P - rejected_P, weight_P.double()
        won_P = margin_P if probability_P is None else margin_P * (probability_P > 0.5)
        columns = [
            torch.ones_like(margin_P),
            weight_P,
            loss_P.detach().double() * weight_P,
            (won_P > 0).double(),
            (won_P == 0).double(),
            margin_P,
            margin_P.square(),
            chosen_P,
            chosen_P.square(),
            rejected_P,
            rejected_P.square(),
        ]
        self.rewards += torch.stack(columns).sum(1)

    def add_tokens(self, *, computed: int, useful: int, shared: int) -> None:
        """Add one row's tokens: all computed, those of its sequences by themselves, and of these the shared ones.

        Args:
            computed: Tokens that pass through the layers, padding included.
            useful: Tokens of all sequences, as if none shared any; a dummy row has none.
            shared: Those of `useful` that another sequence of the row has computed already.
        """
        for i, count in enumerate((computed, useful, shared, computed + shared - useful)):
            self.counts[i] += count

    def add_stop(self, asked: bool) -> None:
        """Count this process if it was asked to stop.

        Args:
            asked: Whether it was.
        """
        self.counts[-1] += int(asked)

    def vector(self) -> Tensor:
        """All sums in the order of `FIELDS`, float64 [F], to be added up over processes; nobody waits for a GPU."""
        host = torch.tensor(self.counts, dtype=torch.float64)
        if self.rewards.is_cuda:
            host = host.pin_memory()
        return torch.cat([self.rewards, host.to(self.rewards.device, non_blocking=True)])


def named(vector: Tensor, norm: Tensor | float | None = None) -> dict[str, float]:
    """The sums by name; this copies them to the host, all at once.

    Args:
        vector: Sums in the order of `FIELDS`, as `PairSums.vector` gives them and added up over processes.
        norm: The norm of the gradient where the engine has it; None where it knows none.

    Returns:
        The sums, and the norm as `NORM` (NaN if it is None).
    """
    if isinstance(norm, Tensor) and norm.device == vector.device:
        *values, norm = torch.cat([vector, norm.detach().reshape(1).to(vector)]).tolist()
    else:
        values = vector.tolist()
    return {**dict(zip(FIELDS, values, strict=True)), NORM: math.nan if norm is None else float(norm)}


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """Turn sums over pairs into the logged figures; ties count half in the accuracy and are reported.

    Args:
        sums: Sums by the names of `FIELDS`.

    Returns:
        Keys: loss, accuracy, ties, reward_margin, reward_margin_std, chosen_mean, chosen_std, rejected_mean,
        rejected_std, pairs; without pairs, `pairs` alone.
    """
    n = sums["pairs"]
    if n == 0:
        return {"pairs": 0}

    def mean(name: str) -> float:
        return sums[name] / n

    def std(name: str) -> float:
        return math.sqrt(max(0.0, sums[f"{name}_squared"] / n - mean(name) ** 2))

    return {
        "loss": sums["weighted_loss"] / sums["weight"] if sums["weight"] else math.nan,
        "accuracy": (sums["correct"] + 0.5 * sums["ties"]) / n,
        "ties": int(sums["ties"]),
        "reward_margin": mean("margin"),
        "reward_margin_std": std("margin"),
        "chosen_mean": mean("chosen"),
        "chosen_std": std("chosen"),
        "rejected_mean": mean("rejected"),
        "rejected_std": std("rejected"),
        "pairs": int(n),
    }


def token_figures(sums: dict[str, float], seconds: float) -> dict[str, float]:
    """Speed and waste of a step: tokens and pairs a second, padding and sharing in percent.

    Useful tokens are those of all sequences, each counted by itself: what separate passes would compute. The shared
    ones among them are not computed again.

    Args:
        sums: Sums of the step over all processes, by the names of `FIELDS`.
        seconds: Wall time of the step.

    Returns:
        Keys: tokens_per_second, useful_tokens_per_second, pairs_per_second, padding_percent, shared_percent.
    """
    return {
        "tokens_per_second": sums["computed_tokens"] / seconds,
        "useful_tokens_per_second": sums["useful_tokens"] / seconds,
        "pairs_per_second": sums["pairs"] / seconds,
        "padding_percent": 100.0 * sums["padding_tokens"] / max(1.0, sums["computed_tokens"]),
        "shared_percent": 100.0 * sums["shared_tokens"] / max(1.0, sums["useful_tokens"]),
    }


def step_figures(sums: dict[str, float], step: StepBatches, schedule: Schedule, seconds: float) -> dict[str, Any]:
    """Everything logged of a training step, under stable names.

    Args:
        sums: What `train_step` returned.
        step: Its index and micro-batches on this process.
        schedule: Learning rate and length of an epoch.
        seconds: Wall time of the step, waiting for its rows included.
    """
    return {
        **summarise(sums),
        "grad_norm": sums[NORM],
        "learning_rate": schedule.learning_rate(step.index),
        "epoch": (step.index + 1) / schedule.steps_per_epoch,
        "seconds": seconds,
        **token_figures(sums, seconds),
        "rank_imbalance": step.rank_imbalance,
        "micro_batches": len(step.micro_batches),
        "peak_memory_gib": peak_memory_gib(),
    }


def peak_memory_gib() -> float:
    """Most memory this process has held: on the GPU since `forget_peak_memory` if there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget_peak_memory() -> None:
    """Begin anew with the most GPU memory held, so that the checks before the first step do not count."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
