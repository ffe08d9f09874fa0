"""The Bradley-Terry loss and its variations, per pair and in fp32.

Decides: the number that one pair contributes. Summing over pairs and dividing by the step's total weight is the
trainer's task, because only there all micro-batches and processes are known.

Shapes: P pairs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def bradley_terry(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    margin_P: Tensor | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """Loss of each pair, fp32: -log sigmoid(r_chosen - r_rejected - margin), smoothed and centred if asked.

    Args:
        chosen_P: Rewards of the chosen conversations.
        rejected_P: Rewards of the rejected conversations.
        margin_P: How much better the chosen one is said to be, in units of reward; subtracted from the reward margin
            (Llama 2, arXiv:2307.09288, section 3.2.2, equation 2).
        label_smoothing: Probability that a label is wrong: the loss is the expectation over both labels.
        centering: Coefficient of (r_chosen + r_rejected)^2 (arXiv:2312.09244, section 2, "auxiliary loss").

    >>> import torch
    >>> bradley_terry(torch.tensor([0.0]), torch.tensor([0.0])).item() == torch.log(torch.tensor(2.0)).item()
    True

    Reference: Bradley and Terry 1952; as a reward-model loss Christiano et al., arXiv:1706.03741, section 2.2.3.
    """
    chosen_P, rejected_P = chosen_P.float(), rejected_P.float()
    logit_P = chosen_P - rejected_P
    if margin_P is not None:
        logit_P = logit_P - margin_P.float()
    loss_P = -functional.logsigmoid(logit_P)
    if label_smoothing:
        # -(1-e) log s(x) - e log s(-x), and log s(-x) = log s(x) - x
        loss_P = loss_P + label_smoothing * logit_P
    if centering:
        loss_P = loss_P + centering * (chosen_P + rejected_P).square()
    return loss_P
