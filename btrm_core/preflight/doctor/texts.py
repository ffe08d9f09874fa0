"""What `btrm doctor` says of texts: one function per check, each ending in a verdict.

Decides: what is looked at, and from which figure on a finding is a warning or a failure. No weights are needed here;
the checks of tokens are `tokens`', those of a model `model`'s.

Shapes: P pairs, S sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from btrm_core.data import (
    Finding,
    PairData,
    contradictory_pairs,
    duplicate_pairs,
    duplicate_prompts,
    longer_wins_characters,
)
from btrm_core.evaluation import standard_error
from btrm_core.preflight import Check

TRUNCATED_WARN = 0.05
"""Share of pairs that lose a part of their prompt."""


DROPPED_WARN, DROPPED_FAIL = 0.01, 0.5
"""Share of pairs that cannot be trained on."""


REPEATED_PROMPTS_WARN = 0.1
"""Share of pairs whose prompt an earlier pair has."""


LABELS_WARN, LABELS_FAIL = 0.001, 0.05
"""Share of pairs that repeat or contradict another one, or have two equal sides."""


LENGTH_BIAS_WARN = 0.1
"""Distance of the "longer wins" accuracy from 0.5 that a model can live on."""


def truncation(reports: Sequence[Mapping[str, Any]]) -> Check:
    """How many prompts are cut to keep to the maximum length.

    Args:
        reports: what became of the pairs of each part of the data, from the token store.
    """
    given, cut = _total(reports, "given"), _total(reports, "truncated")
    limit, longest = reports[0]["max_length"], max(report["longest"] for report in reports)
    figures = {"pairs": given, "truncated": cut, "max_length": limit, "longest": longest}
    if not cut:
        what = f"no conversation is over {limit:,} tokens, the longest has {longest:,}"
        return Check("truncation", "ok", what, figures=figures)
    share = cut / given
    what = f"{cut:,} of {given:,} pairs ({share:.1%}) lose the beginning of their prompt to keep to {limit:,} tokens"
    if share < TRUNCATED_WARN:
        return Check("truncation", "ok", what, figures=figures)
    why = "the model judges answers to a question it does not see whole"
    return Check("truncation", "warn", what, why, "raise --max-length", figures)


def shared_tokens(reports: Sequence[Mapping[str, Any]]) -> Check:
    """What computing a prompt's conversations as one tree saves, if all its pairs share a step.

    Args:
        reports: what became of the pairs of each part of the data, from the token store.
    """
    pairs, groups = _total(reports, "encoded"), _total(reports, "groups")
    separate, own = _total(reports, "pair_tokens"), _total(reports, "tokens")
    what = (
        f"{1 - own / max(separate, 1):.1%} of the {separate:,} tokens of {pairs:,} pairs of {groups:,} prompts are "
        "shared and need computing once"
    )
    return Check("shared tokens", "ok", what, figures={"pair_tokens": separate, "tokens": own, "prompts": groups})


def dropped_pairs(reports: Sequence[Mapping[str, Any]], overlap: int) -> Check:
    """How many pairs cannot be trained on, by reason.

    Args:
        reports: what became of the pairs of each part of the data, from the token store.
        overlap: training pairs left out because their prompt is in the evaluation data.
    """
    given, reasons = _total(reports, "given"), dropped_reasons(reports)
    number = sum(reasons.values())
    figures = {"pairs": given, "dropped": reasons, "prompts_in_evaluation": overlap}
    aside = f"; {overlap:,} more because their prompt is in the evaluation data" if overlap else ""
    if not number:
        return Check("dropped pairs", "ok", f"none of {given:,} pairs is dropped{aside}", figures=figures)
    reason, most = max(reasons.items(), key=lambda item: item[1])
    examples = next(report["examples"][reason] for report in reports if reason in report["examples"])
    what = (
        f"{number:,} of {given:,} pairs ({number / given:.1%}) are dropped{aside}; most ({most:,}) for "
        f"'{reason}' (first: {examples[0]})"
    )
    share = number / given
    if share < DROPPED_WARN:
        return Check("dropped pairs", "ok", what, figures=figures)
    advice = "raise --max-length" if "max_length" in reason else "mend or remove these pairs"
    verdict = "fail" if share > DROPPED_FAIL else "warn"
    return Check("dropped pairs", verdict, what, "they are lost to the training", advice, figures)


def dropped_reasons(reports: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Dropped pairs by reason, over all parts of the data.

    Args:
        reports: what became of the pairs of each part of the data, from the token store.
    """
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report["dropped"])
    return dict(total.most_common())


def repeated_prompts(data: PairData) -> Check:
    """How many pairs compare answers to a prompt that came before.

    Args:
        data: the pairs as they were read.
    """
    found = duplicate_prompts(data)
    figures = {"pairs": found.pairs, "repeated": found.count}
    number = f"{found.count:,} of {found.pairs:,} pairs ({found.share:.1%})" if found.count else "none of the pairs"
    what = f"{number} {'have' if found.count else 'has'} the prompt of an earlier one"
    if found.share < REPEATED_PROMPTS_WARN:
        return Check("repeated prompts", "ok", what, figures=figures)
    return Check(
        "repeated prompts",
        "warn",
        f"{what} (first: {found.examples[0]})",
        "prompts with many pairs weigh more, and a second pass over their answers overfits",
        "train for one epoch, keep fewer pairs of a prompt, or give each pair a `weight` of 1 over their number",
        figures,
    )


def labels(data: PairData, reasons: Mapping[str, int]) -> Check:
    """Pairs with two equal sides, pairs that come twice, and pairs that contradict each other.

    Args:
        data: the pairs as they were read.
        reasons: dropped pairs by reason.
    """
    repeated, opposed = duplicate_pairs(data), contradictory_pairs(data)
    kinds = data.issues.counts | data.issues.skipped
    identical = kinds.get("chosen equals rejected", 0) + sum(
        number for reason, number in reasons.items() if reason.startswith("chosen and rejected are the same")
    )
    figures = {"identical": identical, "repeated": repeated.count, "contradictory": opposed.count}
    total = len(data) + identical
    worst = max(identical, repeated.count, opposed.count) / max(1, total)
    found = [
        _labelled(identical, "with two equal sides"),
        _labelled(repeated.count, "given twice", repeated),
        _labelled(opposed.count, "that contradict another one", opposed),
    ]
    what = ", ".join(found) if worst else f"of {total:,} pairs none has equal sides, comes twice or contradicts another"
    if worst < LABELS_WARN:
        return Check("labels", "ok", what, figures=figures)
    return Check(
        "labels",
        "fail" if opposed.count / max(1, total) > LABELS_FAIL else "warn",
        what,
        "equal sides teach nothing, repeats count double, and no model can satisfy a contradiction",
        "remove the repeats, and decide each contradiction or remove both of its pairs",
        figures,
    )


def length_bias(data: PairData, of: str = "") -> Check:
    """What preferring the longer answer gets: the baseline of length alone.

    Args:
        data: the pairs as they were read.
        of: which part of the data, to add to the check's name.
    """
    accuracy = longer_wins_characters(data)
    error = standard_error(accuracy, len(data))
    name = f"length bias{of}"
    figures = {"pairs": len(data), "longer_wins_characters": accuracy, "standard_error": error}
    what = f'"longer wins" gets {accuracy:.3f} ± {error:.3f} of {len(data):,} pairs right'
    distance = abs(accuracy - 0.5)
    if distance < LENGTH_BIAS_WARN or distance < 2 * error:
        return Check(name, "ok", what, figures=figures)
    longer = "longer" if accuracy > 0.5 else "shorter"
    return Check(
        name,
        "warn",
        what,
        f"a model can reach {max(accuracy, 1 - accuracy):.2f} by preferring the {longer} answer alone",
        "balance the lengths, or judge the model by how far it is above that",
        figures,
    )


def _labelled(number: int, text: str, finding: Finding | None = None) -> str:
    first = f" (first: {finding.examples[0]})" if finding and finding.examples else ""
    return f"{number:,} {text}{first}"


def _total(reports: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(report[key] for report in reports)
