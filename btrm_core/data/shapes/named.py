"""The formats of published data by name: which keys make a row one of them, for those who do not want detection.

Decides: under a name only the keys of that format are looked at for answers, and a row without them is a bad row. What
the keys mean is said where every row is read (`convert.py`); no format has code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from btrm_core.data.shapes.keys import ANSWERS
from btrm_core.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        about: what has it.
        keys: the keys that every row of it has; with `|` between them, one of several.
        more: further keys of it that say which answer is better.
    """

    about: str
    keys: tuple[str, ...]
    more: tuple[str, ...] = ()

    @property
    def known(self) -> frozenset[str]:
        """All keys of the format."""
        return frozenset(name for key in (*self.keys, *self.more) for name in key.split("|"))

    def lacks(self, has: Callable[[str], bool]) -> str | None:
        """The first key that a row should have and has not; None for a row of this format.

        Args:
            has: whether the row has a key.
        """
        return next((key for key in self.keys if not any(has(name) for name in key.split("|"))), None)


_WINNER = ("winner", "preference", "choice", "preferred")
FORMATS = {
    "standard": Format("lists of messages, or texts after a prompt", ("chosen", "rejected")),
    "hh": Format("transcripts of HH-RLHF", ("chosen", "rejected")),
    "sharegpt": Format("turns with from and value", ("conversations|conversation", "chosen", "rejected")),
    "rewardbench": Format("RewardBench", ("prompt", "chosen", "rejected")),
    "rewardbench2": Format("RewardBench 2, lists of answers", ("prompt", "chosen", "rejected")),
    "ms-swift": Format("a conversation and another answer", ("messages", "rejected_response|rejected_messages")),
    "output-list": Format("two answers in a list", ("output",)),
    "scored": Format("responses with scores or ratings", ("responses", "scores|ratings")),
    "ultrafeedback": Format("UltraFeedback", ("completions",), ("scores", "ratings")),
    "helpsteer": Format("HelpSteer, a response and its score a row", ("responses", "scores")),
    "helpsteer3": Format("HelpSteer 3", ("response1", "response2"), ("overall_preference", "preference_strength")),
    "ranks": Format("K responses with ranks", ("responses", "ranks")),
    "nectar": Format("Nectar, answers with ranks", ("answers",), ("ranks",)),
    "summarize": Format("OpenAI's summarize comparisons", ("summaries", "choice")),
    "arena": Format("Arena and MT-bench", ("conversation_a", "conversation_b", "winner|winner_model_a"), _WINNER),
    "versus": Format("A and B with a winner", ("response_a", "response_b"), _WINNER),
    "argilla": Format("Argilla's binarized sets and NeMo-Aligner", ("chosen_response", "rejected_response")),
    "openai": Format("OpenAI's preference fine-tuning", ("preferred_output", "non_preferred_output")),
    "alpacafarm": Format("AlpacaFarm and LLMBar", ("output_1", "output_2"), (*_WINNER, "label")),
    "pku": Format("PKU-SafeRLHF", ("response_0", "response_1", "better_response_id")),
    "shp": Format("SHP", ("human_ref_A", "human_ref_B", "labels")),
}


def check_format(name: str) -> str:
    """The name of a format, if it is one.

    Args:
        name: what the user wrote.

    Raises:
        ConfigError: there is no such format; names those there are.
    """
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(f"format '{name}' is unknown, expected one of {known}.{did_you_mean(name, FORMATS)}")
    return name


def hidden(name: str | None) -> frozenset[str]:
    """Keys of answers that a row of a named format does not speak with; none where the format is found out.

    Args:
        name: a name of `FORMATS`, or None.
    """
    return frozenset() if name is None else frozenset(ANSWERS - FORMATS[name].known)
