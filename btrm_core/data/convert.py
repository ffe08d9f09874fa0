r"""From a row in any of the accepted formats to pairs in btrm's form.

The format is recognised per row, so one file may mix them:

============================  ===============================================================================
keys of the row               meaning
============================  ===============================================================================
chosen, rejected              lists of messages that share all but the last one (the standard format), or
                              transcripts ("\n\nHuman: ... \n\nAssistant: ...", as HH-RLHF has them)
prompt, chosen, rejected      prompt: text, messages or transcript; the answers: text, a message, or messages
                              (whole conversations may repeat the prompt). Lists of texts, as in RewardBench 2,
                              are two ranks: every chosen answer is compared with every rejected one
messages, rejected_response   a finished conversation, and another last answer (ms-swift)
output                        a list of two answers, the first preferred (LLaMA-Factory)
responses, scores             with a prompt: scored responses; also `completions` of UltraFeedback and
                              `answers` with ranks; `response` + `score` (or `helpfulness`) where the rows of
                              one prompt follow each other, as in HelpSteer; `summaries` with a `choice`
response_a, response_b        with a prompt and a `winner` ("a", "b", "tie"); also response_0/_1 with
                              better_response_id, response1/2 with overall_preference or preference_strength,
                              answer_0/_1 with score_0/_1, conversation_a/_b with winner, winner_model_a/_b/_tie,
                              human_ref_A/_B with labels
prompt with replies           a tree of messages (OpenAssistant): the ranked answers to each of its messages
============================  ===============================================================================

These and more names of answers, prompts, system texts and scores are in `shapes/keys.py`; `history` beside another
prompt holds earlier turns, and `input` its material. `margin`, `weight`, `subset` and `id` are optional everywhere, and
so is `probability` beside two answers: how likely it is that the preferred one is better, from 0.5 to 1 (a soft label).
Other names are told with `--map` (`shapes/naming.py`).

Text that spells a conversation (messages in JSON, a finished chat template) is read back into messages; tool calls
are written into the text of their message. What a row holds and nobody used is counted under `unused`.

Scored responses give one pair by default: the best against the worst, the clearest label there is, and no
prompt counts more than another. "random" draws one pair of unequal scores, by a hash of the answers, so it is the
same in every run. "best-vs-each" pairs the best with every worse one, "all" makes every pair of unequal scores; the
pairs of one prompt then weigh 1 together, as in InstructGPT (arXiv:2203.02155). The difference of their scores is
the margin of a pair whose row gives none (of ranks only where `--map margin=scores` asks for it).
Equal scores and declared ties hold no preference: they are skipped and counted, unless ties are to count half
(a pair whose answers are equally likely the better one, half a win for each as in Davidson 1970).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from btrm_core.data.formats import Shape, Ties, WhichPairs, find_shape
from btrm_core.data.shapes.conversation import Conversation, finished
from btrm_core.data.shapes.messages import Message
from btrm_core.data.shapes.naming import ROLES, Naming
from btrm_core.data.shapes.preference import Compared, compared
from btrm_core.data.shapes.tree import branches
from btrm_core.data.shapes.values import RowError, bounded_margin, bounded_weight, clean_text, label, shown
from btrm_core.data.shapes.view import RowView

if TYPE_CHECKING:
    import pyarrow

__all__ = ["ROLES", "Message", "Pair", "Reading", "conversations_of", "convert_row", "pairs_of"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a preferred and a less preferred answer.

    Attributes:
        id: the row's own id, or `file:line`; `#k` is added where a row gives several pairs.
        subset: the row's own subset, or the source's name.
        prompt: all messages but the last, at least one.
        chosen: text of the preferred answer, the last message of the assistant.
        rejected: text of the other answer.
        margin: by how much chosen should win, if the row says so (used by the loss only when asked to).
        weight: how much the pair counts in the loss, above 0.
        probability: how likely it is that chosen is the better answer, 0.5 (a tie) to 1.
        rejected_prompt: the messages before rejected, where they are not those before chosen; None where they are.
        group: a number that only the pairs of one row share, which compare several responses; 0 for a lone pair.
    """

    id: str
    subset: str
    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float | None = None
    weight: float = 1.0
    probability: float = 1.0
    group: int = 0
    rejected_prompt: list[Message] | None = None

    @property
    def chosen_conversation(self) -> list[Message]:
        """The prompt followed by the preferred answer."""
        return [*self.prompt, {"role": "assistant", "content": self.chosen}]

    @property
    def rejected_conversation(self) -> list[Message]:
        """The prompt followed by the other answer."""
        return [*(self.rejected_prompt or self.prompt), {"role": "assistant", "content": self.rejected}]


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        scored: which pairs scored responses give; see the module.
        ties: "half" makes pairs of ties, with probability 0.5; "skip" refuses them.
        naming: the user's own names for columns and roles.
        own_prompts: make pairs also of two answers whose prompts differ, each after its own; else they are refused.
    """

    scored: WhichPairs = "best-vs-worst"
    ties: Ties = "skip"
    naming: Naming = field(default_factory=Naming)
    own_prompts: bool = False


def convert_row(
    row: Mapping[str, Any],
    *,
    name: str = "row",
    line: int = 0,
    subset: str = "",
    scored: WhichPairs = "best-vs-worst",
    ties: Ties = "skip",
    group: int = 1,
) -> list[Pair]:
    """Return the pairs of one row; at least one.

    Args:
        row: the row as read.
        name: short name of the source, for the id of a row that has none.
        line: its line, likewise.
        subset: subset of a row that names none.
        scored: which pairs scored responses give; see the module.
        ties: "half" makes pairs of ties, with probability 0.5; "skip" refuses them.
        group: number of the row, for its pairs if there are several.

    Raises:
        RowError: the row gives no pair; the reason names the key and the value.

    >>> convert_row({"prompt": "2+2?", "chosen": "4", "rejected": "5"})[0].prompt
    [{'role': 'user', 'content': '2+2?'}]
    """
    return pairs_of(RowView(row), Reading(scored, ties), name=name, line=line, subset=subset, group=group)


def pairs_of(
    view: RowView, reading: Reading, *, name: str = "row", line: int = 0, subset: str = "", group: int = 1
) -> list[Pair]:
    """Return the pairs of one row, as `convert_row` does; the view then knows what was left unused, and why.

    Args:
        view: the row.
        reading: how rows are read.
        name: short name of the source, for the id of a row that has none.
        line: its line, likewise.
        subset: subset of a row that names none.
        group: number of the row, for its pairs if there are several.

    Returns:
        At least one pair.

    Raises:
        RowError: the row gives no pair; the reason names the key and the value.
    """
    if (rows := branches(view)) is not None:
        return _of_branches(rows, view, reading, {"name": name, "line": line, "subset": subset}, group)
    shape = find_shape(view)
    if shape is None:
        raise view.missing("chosen")
    comparisons = compared(shape, view, reading.scored, reading.ties)
    wanted = {id(side) for one in comparisons for side in (one.chosen, one.rejected)}
    kept = [side for side in shape.sides if id(side) in wanted]
    made = finished(replace(shape, sides=tuple(kept)), view)
    conversations = {id(side): found for side, found in zip(kept, made, strict=True)}
    identity = _label(view, "id") or f"{name}:{line}"
    part = _label(view, "subset") or subset
    margin = None if view.get("margin") is None else bounded_margin(view["margin"], "margin")
    weight = 1.0 if view.get("weight") is None else bounded_weight(view["weight"], "weight")
    pairs = []
    several = len(comparisons) > 1
    for number, one in enumerate(comparisons):
        chosen, rejected = conversations[id(one.chosen)], conversations[id(one.rejected)]
        _check(chosen, rejected, one, own_prompts=reading.own_prompts)
        gap = margin if margin is not None or one.gap is None else bounded_margin(one.gap, "margin")
        pairs.append(
            Pair(
                id=f"{identity}#{number}" if several else identity,
                subset=part,
                prompt=chosen[0],
                chosen=chosen[1],
                rejected=rejected[1],
                margin=gap,
                weight=weight / len(comparisons),
                probability=one.probability,
                group=group if several else 0,
                rejected_prompt=None if rejected[0] == chosen[0] else rejected[0],
            )
        )
    if reading.naming.margin_of_scores and all(pair.margin is None for pair in pairs):
        view.remark("no scores in the row to take a margin from")
    return pairs


def _of_branches(
    rows: list[dict[str, Any]], view: RowView, reading: Reading, place: dict[str, Any], group: int
) -> list[Pair]:
    """The pairs of every message of a tree whose answers are ranked."""
    view.use("prompt", "message_id", "role", "text", "replies")
    found: list[Pair] = []
    problem = RowError("only one response", "no message of the tree has two answers with ranks", bad=False)
    for number, row in enumerate(rows):
        inner = RowView(row)
        try:
            found += pairs_of(inner, replace(reading, naming=Naming()), **place, group=group + (number << 40))
        except RowError as error:
            problem = error
        view.remarks |= inner.remarks
    if not found:
        raise problem
    return found


def conversations_of(view: RowView) -> tuple[Shape, list[Conversation]]:
    """Return what a row holds to be scored: its shape, and the prompt and answer of every side in the row's order.

    No preference is asked for, and the prompts of the sides may differ.

    Args:
        view: the row.

    Raises:
        RowError: the row is in no known format, or a side is no finished conversation.

    >>> conversations_of(RowView({"prompt": "2+2?", "response": "4"}))[1]
    [([{'role': 'user', 'content': '2+2?'}], '4')]
    """
    if (rows := branches(view)) is not None:
        return _scored_branches(rows, view)
    shape = find_shape(view)
    if shape is None:
        has = ", ".join(list(view)[:8]) or "nothing"
        wanted = "expected 'messages', 'chosen' and 'rejected', or 'prompt' and 'responses'"
        raise RowError("missing key", f"{wanted}; the row has {has}")
    return shape, finished(shape, view)


def _scored_branches(rows: list[dict[str, Any]], view: RowView) -> tuple[Shape, list[Conversation]]:
    view.use("prompt", "message_id", "role", "text", "replies")
    found = [conversations_of(RowView(row)) for row in rows]
    if not found:
        raise RowError("only one response", "no message of the tree has two answers with ranks", bad=False)
    sides = tuple(side for shape, _ in found for side in shape.sides)
    return Shape("scored", sides, "responses"), [one for _, conversations in found for one in conversations]


def _check(chosen: Conversation, rejected: Conversation, one: Compared, *, own_prompts: bool) -> None:
    left, right = one.chosen.where, one.rejected.where
    if chosen[0] != rejected[0] and not own_prompts:
        where = _where(chosen[0], rejected[0])
        raise RowError("prompts differ", f"'{left}' and '{right}' differ before the last message: {where}")
    if chosen == rejected:
        raise RowError("chosen equals rejected", f"'{left}' and '{right}' are the same answer: {shown(chosen[1])}")


def _where(left: list[Message], right: list[Message]) -> str:
    if len(left) != len(right):
        return f"{len(left)} messages against {len(right)}"
    index = next(i for i, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1])
    return f"message {index + 1} of {len(left)}"


def _label(view: RowView, key: str) -> str:
    """The row's id or subset; what is neither text nor a number never costs the row."""
    value = view.get(key)
    found = "" if value is None else label(value)
    if found is None:
        view.remark(f"'{key}' that is neither text nor a number, left out")
        return ""
    if isinstance(value, str) and found != value:
        view.remark(f"'{key}' with half a surrogate pair, replaced")
    return found


def text_schema() -> pyarrow.Schema:
    """A row per pair as text."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("subset", pa.string()),
            ("prompt", pa.list_(message)),
            ("chosen", pa.string()),
            ("rejected", pa.string()),
            ("margin", pa.float64()),
            ("weight", pa.float64()),
            ("probability", pa.float64()),
            ("group", pa.int64()),
            ("rejected_prompt", pa.list_(message)),
        ]
    )


def text_batch(pairs: Sequence[Pair]) -> pyarrow.RecordBatch:
    """Pairs as rows of text.

    Args:
        pairs: id and subset may hold the name of a file, which need not be UTF-8.
    """
    import pyarrow

    return pyarrow.RecordBatch.from_pylist([text_values(pair) for pair in pairs], schema=text_schema())


def text_values(pair: Pair) -> dict[str, Any]:
    """The columns of one pair.

    Args:
        pair: likewise.
    """
    names = {"id": clean_text(pair.id), "subset": pair.subset and clean_text(pair.subset)}
    return {name: getattr(pair, name) for name in pair.__dataclass_fields__} | names
