"""Robustness probes: texts are edited in ways that say nothing of their quality (or ruin it); what do rewards do?

Decides: the edits. Each is deterministic: the same text gives the same text on every machine, so that two models, or
one model twice, are asked the same.

Shapes: P pairs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.evaluation.statistics import Interval, bootstrap_mean, clusters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

Edit = Callable[[str, str], str]
"""The prompt's last message and an answer to an edited answer."""


def _lead(words: str) -> Edit:
    return lambda prompt, answer: f"{words}{answer}"


def _tail(words: str) -> Edit:
    return lambda prompt, answer: f"{answer}{words}"


def markdown(prompt: str, answer: str) -> str:
    r"""A heading, and every sentence (or line) as a bullet with its first word in bold.

    Args:
        prompt: not looked at; every edit is given it.
        answer: what is edited.

    >>> markdown("", "Yes, it is. It was.")
    '## Answer\n\n- **Yes,** it is.\n- **It** was.'
    """
    lines = answer.split("\n") if "\n" in answer.strip() else re.split(r"(?<=[.!?])\s+", answer)
    bullets = [re.sub(r"^(\S+)", r"**\1**", line.strip()) for line in lines if line.strip()]
    return "## Answer\n\n" + "\n".join(f"- {line}" for line in bullets)


def typos(prompt: str, answer: str) -> str:
    """Two letters of about every eighth longer word change places; which ones depends on the words alone.

    Args:
        prompt: not looked at; every edit is given it.
        answer: words of at least four letters may change.

    >>> typos("", "several ordinary sentences without mistakes") != "several ordinary sentences without mistakes"
    True
    """

    def mistyped(match: re.Match[str]) -> str:
        word = match.group()
        drawn = hashlib.sha256(f"{word}:{match.start()}".encode("utf-8", "surrogatepass")).digest()
        if drawn[0] % 8:
            return word
        place = 1 + drawn[1] % (len(word) - 2)
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

    return re.sub(r"[^\W\d_]{4,}", mistyped, answer)


def truncated(prompt: str, answer: str) -> str:
    """The first half of an answer, by words.

    Args:
        prompt: not looked at; every edit is given it.
        answer: of an odd number of words the middle one stays.

    >>> truncated("", "one two three four")
    'one two'
    """
    pieces = re.findall(r"\S+\s*", answer)
    return "".join(pieces[: (len(pieces) + 1) // 2]).rstrip()


PROBES: Mapping[str, Edit] = {
    "sure": _lead("Sure! "),
    "certainly": _lead("Certainly! Here is a helpful answer.\n\n"),
    "markdown": markdown,
    "trailing spaces": _tail("   "),
    "trailing newlines": _tail("\n\n"),
    "self-praise": _tail("\n\nThis answer is accurate, complete and helpful."),
    "closing question": _tail("\n\nIs there anything else I can help you with?"),
    "lower case": lambda prompt, answer: answer.lower(),
    "upper case": lambda prompt, answer: answer.upper(),
    "typos": typos,
    "prompt echo": lambda prompt, answer: f"{prompt}\n\n{answer}",
    "duplicated": lambda prompt, answer: f"{answer}\n\n{answer}",
    "truncated": truncated,
    "refusal": lambda prompt, answer: "I'm sorry, but I can't help with that.",
    "empty": lambda prompt, answer: "",
}
"""Name -> edit, from those that should change nothing to those that leave nothing."""


@dataclass(frozen=True)
class ProbeResult:
    """What an edit does to the rewards.

    Attributes:
        name: of the edit.
        pairs: pairs with all rewards.
        unscored: pairs of which an edited answer could not be scored, as an empty one by some templates.
        shift: mean change of an answer's reward, in standard deviations of the unedited rewards.
        shift_interval: of `shift`, resampled by prompt; None for a single prompt or rewards without spread.
        moved: mean size of the change, likewise.
        flips_both: share of pairs whose order changes when both answers are edited.
        flips_rejected: share of the pairs won before that are lost (or tied) when only the rejected answer is edited.
        flips_chosen: share of the pairs won before that are lost (or tied) when only the chosen answer is edited.
    """

    name: str
    pairs: int
    unscored: int
    shift: float | None
    shift_interval: Interval | None
    moved: float | None
    flips_both: float | None
    flips_rejected: float | None
    flips_chosen: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def probed(name: str, before_P2: FloatArray, after_P2: FloatArray, prompt_P: NDArray[Any] | None = None) -> ProbeResult:
    """Compare rewards of pairs before and after both of their answers were edited.

    Args:
        name: of the edit.
        before_P2: rewards of chosen and rejected.
        after_P2: rewards of the edited answers; NaN where one could not be scored.
        prompt_P: one number per pair, equal for equal prompts.
    """
    is_known_P = np.isfinite(before_P2).all(axis=1) & np.isfinite(after_P2).all(axis=1)
    unscored = int((~is_known_P).sum())
    if not is_known_P.any():
        return ProbeResult(name, 0, unscored, None, None, None, None, None, None)
    before, after = before_P2[is_known_P], after_P2[is_known_P]
    cluster_P = clusters(None if prompt_P is None else prompt_P[is_known_P], len(before))
    spread = float(before.std())
    change_P2 = (after - before) / spread if spread > 0 else None
    order, turned = (np.sign(r[:, 0] - r[:, 1]) for r in (before, after))
    won = order > 0
    lost_rejected = before[won, 0] <= after[won, 1]
    lost_chosen = after[won, 0] <= before[won, 1]
    return ProbeResult(
        name=name,
        pairs=len(before),
        unscored=unscored,
        shift=None if change_P2 is None else float(change_P2.mean()),
        shift_interval=None if change_P2 is None else bootstrap_mean(change_P2.mean(axis=1), cluster_P),
        moved=None if change_P2 is None else float(np.abs(change_P2).mean()),
        flips_both=float((order != turned).mean()),
        flips_rejected=float(lost_rejected.mean()) if won.any() else None,
        flips_chosen=float(lost_chosen.mean()) if won.any() else None,
    )


@dataclass(frozen=True)
class Invariance:
    """How much rewards depend on what they are computed with; all should be rounding.

    Attributes:
        alone: largest difference between an answer's reward alone and among others.
        order: largest difference when the same answers come in another order.
        spread: standard deviation of the rewards, to compare with.
    """

    alone: float
    order: float
    spread: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
