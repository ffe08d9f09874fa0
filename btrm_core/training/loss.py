"""The Bradley-Terry loss and its variations, per pair and in fp32.

Decides: the number that one pair contributes. Summing over pairs and dividing by the step's total weight is the
trainer's task, because only there all micro-batches and processes are known.

Shapes: P pairs, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def bradley_terry(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    margin_P: Tensor | None = None,
    probability_P: Tensor | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """Loss [P] of each pair in nats, fp32: -log sigmoid(r_chosen - r_rejected - margin), smoothed and centred if asked.

    Args:
        chosen_P: Rewards of the chosen conversations.
        rejected_P: Rewards of the rejected conversations.
        margin_P: How much better the chosen one is said to be, in units of reward; subtracted from the reward margin
            (Llama 2, arXiv:2307.09288, section 3.2.2, equation 2).
        probability_P: How likely it is that chosen is the better one: the loss is the cross-entropy with this soft
            label (arXiv:1706.03741, section 2.2.3, equation 1); 0.5 is a tie, half a win for each. None is 1.
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
    # -p log s(x) - (1-p) log s(-x) = -log s(x) + (1-p) x, because log s(-x) = log s(x) - x
    if probability_P is not None:
        loss_P = loss_P + (label_smoothing + (1 - probability_P) * (1 - 2 * label_smoothing)) * logit_P
    elif label_smoothing:
        loss_P = loss_P + label_smoothing * logit_P
    return loss_P + _centred(chosen_P, rejected_P, centering)


def plackett_luce(
    rewards_S: Tensor,
    group_S: Tensor,
    wins_S: Tensor,
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    centering: float = 0.0,
) -> Tensor:
    """Loss [P] in nats, fp32, where the loss of a group is that of its whole ranking; all its pairs get the same.

    A ranking is a sequence of choices, each the best among what is left: the sum over ranks i of
    -log(exp(r_i) / sum over all j not better than i of exp(r_j)), divided by the number of choices, so that a pair
    gives the Bradley-Terry loss and a group weighs as much as a pair. Responses of one rank are chosen from the same
    rest (Breslow's form of ties).

    Args:
        rewards_S: Rewards of all sequences.
        group_S: The group of each sequence.
        wins_S: Orders the sequences of a group: how many of it each one beats.
        chosen_P: Where the chosen sequence of each pair is.
        rejected_P: Where the rejected one is.
        centering: As in `bradley_terry`.

    >>> import torch
    >>> two = torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), torch.tensor([1, 0])
    >>> loss = plackett_luce(*two, torch.tensor([0]), torch.tensor([1]))
    >>> torch.allclose(loss, bradley_terry(two[0][:1], two[0][1:]))
    True

    Reference: Plackett 1975; Luce 1959; for language models Rafailov et al., arXiv:2305.18290, appendix A.3.
    """
    rewards_S = rewards_S.float()
    together_SS = group_S[:, None] == group_S[None, :]
    left_SS = together_SS & (wins_S[None, :] <= wins_S[:, None])
    choice_S = (together_SS & (wins_S[None, :] < wins_S[:, None])).any(1)  # the last of a ranking is no choice
    rest_S = rewards_S[None, :].expand_as(left_SS).masked_fill(~left_SS, -torch.inf).logsumexp(1)
    loss_S = torch.where(choice_S, rest_S - rewards_S, torch.zeros_like(rewards_S))
    group_P = group_S.index_select(0, chosen_P)
    total_P = (loss_S[None, :] * (group_S[None, :] == group_P[:, None])).sum(1)
    choices_P = (choice_S[None, :] & (group_S[None, :] == group_P[:, None])).sum(1).clamp(min=1)
    chosen, rejected = rewards_S.index_select(0, chosen_P), rewards_S.index_select(0, rejected_P)
    return total_P / choices_P + _centred(chosen, rejected, centering)


def _centred(chosen_P: Tensor, rejected_P: Tensor, coefficient: float) -> Tensor | float:
    return coefficient * (chosen_P + rejected_P).square() if coefficient else 0.0
