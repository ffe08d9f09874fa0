"""LLMBar: does a judge follow the instruction, or the better-looking answer?

Score: accuracy of each subset (a tie is wrong); Adversarial is the mean of its four subsets, the total the mean of all
five.

Rows: input, output_1, output_2, label (1 or 2), the subset being the name of the file or folder; also btrm's standard
form with its subset.

Reference: Zeng et al., Evaluating Large Language Models at Evaluating Instruction Following, arXiv:2310.07641.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from btrm_core.errors import DataError
from btrm_core.evaluation.suites.base import (
    Item,
    Rewards,
    Row,
    SuiteScores,
    asked,
    is_standard,
    mean,
    right,
    shares,
    standard,
    text,
    unit_of,
)

NAME = "llmbar"
ADVERSARIAL = ("Neighbor", "GPTInst", "GPTOut", "Manual")
SUBSETS = ("Natural", *ADVERSARIAL)
SOURCES = tuple(
    f"princeton-nlp/LLMBar:LLMBar:{name}" for name in ("Natural", *(f"Adversarial_{a}" for a in ADVERSARIAL))
)


def items(row: Row, where: str) -> list[Item]:
    """One pair.

    Args:
        row: input, output_1, output_2 and label (1 or 2), or btrm's standard form.
        where: the subset, if the row names none.

    Raises:
        DataError: the label is neither 1 nor 2, or a text is missing.
    """
    if is_standard(row):
        return [standard(row, subset_of(str(row.get("subset") or where)))]
    label = row.get("label")
    if label not in (1, 2):
        raise DataError(f"'label' is {label!r}, expected 1 or 2")
    outputs = text(row, "output_1"), text(row, "output_2")
    subset, prompt = subset_of(str(row.get("subset") or where)), asked(row, "input")
    responses = outputs if label == 1 else outputs[::-1]
    return [Item(str(row.get("id", "")), subset, unit_of(subset, "", prompt), prompt, responses, row=row)]


def subset_of(name: str) -> str:
    """The subset that a name means.

    Args:
        name: of a file, or a row's own.

    Returns:
        A name of `SUBSETS`, or the same name if it holds none of them.

    >>> subset_of("llmbar-adver-neighbor"), subset_of("Adversarial_GPTOut"), subset_of("other")
    ('Neighbor', 'GPTOut', 'other')
    """
    return next((subset for subset in SUBSETS if subset.lower() in name.lower()), name)


def score(items: Sequence[Item], rewards: Rewards) -> SuiteScores:
    """Natural, adversarial and the mean of all five subsets.

    Args:
        items: pairs, the right answer first.
        rewards: two for each pair; a tie is wrong.
    """
    subsets = shares(items, rewards)
    sections = {"Natural": subsets["Natural"]} if "Natural" in subsets else {}
    hard = [subsets[name] for name in ADVERSARIAL if name in subsets]
    if hard:
        sections["Adversarial"] = mean(hard)
    whole = all(name in subsets for name in SUBSETS)
    return SuiteScores(mean([subsets[name] for name in SUBSETS]) if whole else None, sections, subsets)


def results(items: Sequence[Item], rewards: Rewards, model: str) -> Any:
    """The rows with whether each was right.

    Args:
        items: pairs, the right answer first.
        rewards: two for each pair.
        model: not entered; the rows have no place for it.
    """
    return [
        {**item.row, "scores": list(given), "correct": right(item, given)}
        for item, given in zip(items, rewards, strict=True)
    ]
