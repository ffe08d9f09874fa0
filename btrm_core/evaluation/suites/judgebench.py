"""JudgeBench: pairs of answers of which one is objectively right.

Score: accuracy per source (by the beginning of its name) and over all pairs. Its reward models say "A>B" only where
A's reward is higher, so a tie means B.

Rows: pair_id, source, question, response_A, response_B, label ("A>B" or "B>A").

Reference: Tan et al., JudgeBench, arXiv:2410.12784.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from btrm_core.errors import DataError
from btrm_core.evaluation.suites.base import Item, Rewards, Row, SuiteScores, asked, mean, text, unit_of

NAME = "judgebench"
SOURCES = ("ScalerLab/JudgeBench:gpt", "ScalerLab/JudgeBench:claude")
PARTS = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")


def items(row: Row, where: str) -> list[Item]:
    """One pair; the responses stay A and B, because a tie means B.

    Args:
        row: question, response_A, response_B, label, source, pair_id.
        where: not needed; the source is the subset.

    Raises:
        DataError: the label is neither A>B nor B>A, or a text is missing.
    """
    label = text(row, "label")
    if label not in ("A>B", "B>A"):
        raise DataError(f"'label' is '{label}', expected A>B or B>A")
    source, name = text(row, "source"), str(row.get("pair_id", ""))
    part = next((part for part in PARTS if source.startswith(part)), source)
    responses = (text(row, "response_A"), text(row, "response_B"))
    gold = (1.0, 0.0) if label == "A>B" else (0.0, 1.0)
    prompt = asked(row, "question")
    unit = unit_of(part, str(row.get("original_id") or name), prompt)
    return [Item(name, part, unit, prompt, responses, gold=gold, row=row)]


def score(items: Sequence[Item], rewards: Rewards) -> SuiteScores:
    """Accuracy per source and overall, over pairs.

    Args:
        items: pairs.
        rewards: of A and B for each pair.
    """
    won: dict[str, list[bool]] = {}
    for item, given in zip(items, rewards, strict=True):
        won.setdefault(item.subset, []).append(_right(item, given))
    subsets = {part: mean(won[part]) for part in sorted(won, key=lambda part: (part not in PARTS, part))}
    return SuiteScores(mean([one for part in won.values() for one in part]), dict(subsets), subsets)


def _right(item: Item, rewards: Sequence[float]) -> bool:
    return all(math.isfinite(r) for r in rewards) and decision(rewards) == ("A>B" if item.gold[0] else "B>A")


def decision(rewards: Sequence[float]) -> str:
    """What a reward model says.

    Args:
        rewards: of A and of B.

    Returns:
        A>B or B>A; a tie or NaN is B>A.
    """
    return "A>B" if rewards[0] > rewards[1] else "B>A"


def results(items: Sequence[Item], rewards: Rewards, model: str) -> Any:
    """The rows with the model's judgement.

    Args:
        items: pairs.
        rewards: of A and B for each pair.
        model: entered as `judge_model`.
    """
    return [
        {
            **item.row,
            "judge_name": "reward_model",
            "judgments": [{"judgment": {"judge_model": model, "scores": list(r)}, "decision": decision(r)}],
        }
        for item, r in zip(items, rewards, strict=True)
    ]
