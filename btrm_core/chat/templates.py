"""Does a chat template keep its promises with this tokenizer?

Decides: what is read off a template by rendering probe conversations (BOS, terminal token, the control tokens it
writes) and which templates are refused. Encoding real conversations is `format`'s.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from btrm_core.chat.tokenizers import Encoder, fast_backend
from btrm_core.errors import FamilyError, first_line

OTHER_TEMPLATE = "give another one with --set tokenizer.chat_template=FILE"


SYSTEM = {"role": "system", "content": "Answer in few words."}


ONE = [{"role": "user", "content": "What is one plus two?"}, {"role": "assistant", "content": "It is three."}]


TWO = [*ONE, {"role": "user", "content": "And twice that?"}, {"role": "assistant", "content": "Six, of course."}]


PROBES = {"single-turn": ONE, "multi-turn": TWO, "system": [SYSTEM, *TWO]}
"""Conversations that a template is tried on: by a run, by doctor and by the conformance kit."""


@dataclass(frozen=True)
class TemplateFacts:
    """What probe conversations show about a template and its tokenizer."""

    bos_id: int | None
    """Written exactly once, at the beginning; None if the template writes no BOS."""
    terminal_id: int
    """The last token of every finished conversation."""
    controls: dict[str, int]
    """Control tokens, text -> id: the tokenizer's special tokens, and others that the template writes around turns."""
    anchors: tuple[str, ...]
    """Control tokens the template writes before which a text can be cut without changing any id."""


def inspect_template(tokenizer: Any, template: str, given_by: str, any_end: bool = False) -> TemplateFacts:
    """Render and encode probe conversations, and return what they show.

    Args:
        tokenizer: a fast tokenizer with its pad token set.
        template: Jinja source.
        given_by: who gave the template, for errors.
        any_end: whether conversations may end in a token that is no control token, as the line break of ChatML.

    Raises:
        FamilyError: the template does not compile, prints the date, loses or changes a message, writes BOS not exactly
            once, does not always end in the same control token, or writes the pad token.
    """
    who = f"chat template ({given_by})"
    if "strftime_now" in re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL):
        raise FamilyError(
            f"{who} prints today's date (strftime_now), so ids would change from day to day; {OTHER_TEMPLATE}"
        )
    texts = _render_probes(tokenizer, template, who)
    encoder = Encoder(fast_backend(tokenizer), {})
    ids = dict(zip(texts, encoder.encode(list(texts.values())), strict=True))
    for name in texts:
        own = tokenizer.apply_chat_template(PROBES[name], chat_template=template, tokenize=True, return_dict=False)
        if list(own) != ids[name]:
            raise FamilyError(
                f"tokenizer {type(tokenizer).__name__} does more than its fast backend, its ids cannot be reproduced; "
                "return a plain fast tokenizer from the setup_tokenizer hook"
            )
    terminal_id = _terminal(tokenizer, ids, who, any_end)
    bos_id = _bos(tokenizer, ids, who, terminal_id)
    if tokenizer.pad_token_id is not None and any(tokenizer.pad_token_id in sequence for sequence in ids.values()):
        raise FamilyError(
            f"{who} writes the pad token {tokenizer.pad_token!r}, expected one that never occurs in data; "
            "name another one with --set tokenizer.pad_token=TOKEN"
        )
    added = tokenizer.added_tokens_decoder
    around = _around_a_question(tokenizer, template, encoder)
    controls = {str(token): index for index, token in added.items() if token.special or index in {*around, terminal_id}}
    written = {index for index in ids["multi-turn"] if index in added}
    cuttable = [i for i in sorted(written) if not (added[i].normalized or added[i].lstrip or added[i].single_word)]
    anchors = tuple(str(added[i]) for i in cuttable if str(added[i]) in controls)
    if not _cuts_change_nothing(encoder, texts["multi-turn"], ids["multi-turn"], anchors):
        anchors = ()
    return TemplateFacts(bos_id, terminal_id, controls, anchors)


def _render_probes(tokenizer: Any, template: str, who: str) -> dict[str, str]:
    """Render the probes; the system one may be refused, as its rows then are, with a reason each."""
    texts = {}
    for name, conversation in PROBES.items():
        try:
            texts[name] = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
        except Exception as error:  # a template is a program of its own and may fail in any way
            if name == "system":
                continue
            line = getattr(error, "lineno", None)
            place = "" if line is None else f", line {line}"
            raise FamilyError(
                f"{who} does not render a {name} conversation: {first_line(error)}{place}; {OTHER_TEMPLATE}"
            ) from error
        position = 0
        for message in conversation:
            start = 0 if message["role"] == "system" else position  # a system text may be folded into any message
            found = texts[name].find(message["content"], start)
            if found < 0:
                raise FamilyError(
                    f"{who} loses or changes a {message['role']} message of a {name} conversation, "
                    f"expected {message['content']!r} in its place; {OTHER_TEMPLATE}"
                )
            position = position if message["role"] == "system" else found + len(message["content"])
    return texts


def _terminal(tokenizer: Any, ids: dict[str, list[int]], who: str, any_token: bool) -> int:
    """Return the id that ends every probe; `any_token` allows one that is no control token, as a line break."""
    added = tokenizer.added_tokens_decoder
    last = {sequence[-1] for sequence in ids.values()}
    named = ", ".join(repr(tokenizer.decode([index])) for index in sorted(last))
    if len(last) > 1:
        raise FamilyError(f"{who} ends conversations in different tokens ({named}), expected one; {OTHER_TEMPLATE}")
    terminal_id = last.pop()
    if not any_token and (terminal_id not in added or str(added[terminal_id]).isspace()):
        raise FamilyError(
            f"{who} ends a conversation in {named}, expected a control token such as {tokenizer.eos_token!r} "
            f"with nothing after it; {OTHER_TEMPLATE}"
        )
    if terminal_id == tokenizer.pad_token_id:
        raise FamilyError(
            f"pad token {named} is the terminal token of the {who}, expected a distinct one; "
            "name another one with --set tokenizer.pad_token=TOKEN"
        )
    return int(terminal_id)


def _bos(tokenizer: Any, ids: dict[str, list[int]], who: str, terminal_id: int) -> int | None:
    """Return the id of the BOS that opens every probe once; None where the template writes none.

    Some tokenizers name as BOS a token that opens every turn (SmolLM2: `<|im_start|>`) or ends them: no BOS then.
    """
    bos = tokenizer.bos_token_id
    one, two = ids["single-turn"], ids["multi-turn"]
    if bos is None or bos == terminal_id or not any(bos in sequence for sequence in ids.values()):
        return None
    if all(begins_once(bos, sequence) for sequence in ids.values()):
        return int(bos)
    first = all(sequence[0] == bos for sequence in ids.values())
    followers = {two[i + 1] for i, index in enumerate(two[:-1]) if index == bos}
    if first and opens_turns(bos, one, two) and not followers & set(tokenizer.added_tokens_decoder):
        return None
    raise FamilyError(
        f"{who} writes the BOS token {tokenizer.bos_token!r} {one.count(bos)} times in a conversation of one exchange "
        f"and {two.count(bos)} times in one of two, expected exactly once, at the beginning; {OTHER_TEMPLATE}"
    )


def begins_once(token_id: int, ids: Sequence[int]) -> bool:
    """Whether a token stands at the beginning and nowhere else: what is asked of BOS, of every conversation.

    Args:
        token_id: the token.
        ids: a conversation's.

    >>> begins_once(1, [1, 5, 6]), begins_once(1, [1, 5, 1]), begins_once(1, [5, 1])
    (True, False, False)
    """
    return ids[0] == token_id and ids.count(token_id) == 1


def opens_turns(token_id: int, one: Sequence[int], two: Sequence[int]) -> bool:
    """Whether a token opens every turn, as SmolLM2's BOS does, and not the conversation alone.

    Args:
        token_id: the token.
        one: ids of the probe `ONE`.
        two: ids of the probe `TWO`.

    Returns:
        True if the second exchange adds the token once for each of its messages.
    """
    return two.count(token_id) - one.count(token_id) == len(TWO) - len(ONE)


def as_written(tokenizer: Any, template: str) -> TemplateFacts:
    """What probe conversations show of a template that keeps no promise, for those who want to look at it.

    Args:
        tokenizer: a fast tokenizer.
        template: Jinja source.

    Returns:
        The terminal token is the most frequent last one; BOS is the tokenizer's unless it opens every turn; every added
        token counts as a control token, and texts are never cut.

    Raises:
        FamilyError: no probe can be rendered.
    """
    encoder, ids = Encoder(fast_backend(tokenizer), {}), {}
    for name, conversation in PROBES.items():
        with contextlib.suppress(Exception):  # a template is a program of its own and may fail in any way
            text = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
            ids[name] = encoder.encode([text])[0]
    ends = Counter(sequence[-1] for sequence in ids.values() if sequence)
    if not ends:
        raise FamilyError(f"the chat template renders none of its probe conversations; {OTHER_TEMPLATE}")
    bos_id = tokenizer.bos_token_id
    both = ids.get("single-turn"), ids.get("multi-turn")
    if bos_id is not None and both[0] and both[1] and opens_turns(bos_id, both[0], both[1]):
        bos_id = None
    controls = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    return TemplateFacts(bos_id, int(ends.most_common(1)[0][0]), controls, ())


def _around_a_question(tokenizer: Any, template: str, encoder: Encoder) -> set[int]:
    """Return the added tokens, flagged special or not, that the template writes around a user message."""
    try:
        text = tokenizer.apply_chat_template(ONE[:1], chat_template=template, tokenize=False)
    except Exception:  # it refuses unanswered questions: nothing to learn here
        return set()
    added = tokenizer.added_tokens_decoder
    return {index for index in encoder.encode([text])[0] if index in added and not str(added[index]).isspace()}


def _cuts_change_nothing(encoder: Encoder, text: str, ids: Sequence[int], anchors: Sequence[str]) -> bool:
    """Try every cut before an anchor in a probe."""
    places = [match.start() for anchor in anchors for match in re.finditer(re.escape(anchor), text)]
    halves = [encoder.encode([text[:place], text[place:]]) for place in places]
    return all(head + tail == ids for head, tail in halves)
