"""Conversations to token ids: one template, one encode function, for training, evaluation, scoring and serving.

Decides: what a conversation's ids are and how a group of responses to one prompt is kept within the maximum length. The
template's text is the family's answer, whether it keeps its promises is checked in `templates`, what a tokenizer does
with text is `tokenizers`'.

Nothing here raises for a row of data in the batched path: a row that cannot be encoded carries its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from btrm_core.chat.kept import lost_message
from btrm_core.chat.shorten import Shorten, smallest, ways_to_shorten
from btrm_core.chat.templates import as_written, inspect_template
from btrm_core.chat.tokenizers import Encoder, fast_backend, install_pad, self_contained
from btrm_core.console import LongWork
from btrm_core.errors import BtrmError, DataError, first_line
from btrm_core.families import Family, PadToken
from btrm_core.files import text_sha256

Message = dict[str, str]
Conversation = list[Message]


@dataclass(frozen=True)
class EncodedResponses:
    """K responses to one prompt as ids, or the reason why not."""

    sequences: list[list[int]]
    """One finished conversation per response, in their order; empty if there is an error."""
    dropped_turns: int = 0
    """Messages dropped from the beginning of the shared prompt to keep to the maximum length."""
    cut_characters: int = 0
    """Characters then cut from the left of what was left of the prompt."""
    error: str | None = None
    """Why the group cannot be encoded, in a few words fit for counting."""
    altered: tuple[str | None, ...] = ()
    """For each sequence what the template writes otherwise than the messages have it, in a few words, or None."""


@dataclass(frozen=True)
class _Finished:
    """The ids of one conversation, or the reason why there are none."""

    ids: list[int]
    error: str | None = None
    altered: str | None = None


@dataclass
class ChatFormat:
    """Everything needed to turn conversations into ids; made by `prepare_chat` or `chat_from_checkpoint`.

    Can be pickled for worker processes.
    """

    tokenizer: Any
    template: str
    template_sha256: str
    pad: PadToken
    pad_id: int
    bos_id: int | None
    """The token that opens every conversation, exactly once; None if the template writes none."""
    terminal_id: int
    """The token that ends every conversation, where the reward is read."""
    control_ids: frozenset[int]
    """Ids that only the template may produce."""
    num_new_tokens: int
    """Tokens that the model has no embedding for yet: the pad token or none (0 or 1)."""
    answers: dict[str, str]
    """Hook name -> who gave the answer."""
    encoder: Encoder = field(repr=False)
    anchors: tuple[str, ...] = field(default=(), repr=False)
    """Control tokens that the template writes and before which a text can be cut without changing any id."""
    max_length: int | None = None
    """Longest conversation a checkpoint was trained with; None when training starts from a base model."""

    @property
    def terminal_token(self) -> str:
        """The terminal token's text."""
        return str(self.tokenizer.convert_ids_to_tokens(self.terminal_id))

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """Return a conversation as the template writes it.

        Args:
            conversation: messages with `role` and `content`.
            add_generation_prompt: end where the assistant's next message would begin.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            return self._render([conversation], add_generation_prompt)[0]
        except Exception as error:  # a template is a program of its own and may fail in any way
            raise DataError(f"the chat template refuses it: {first_line(error)}") from error

    def encode(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Return the ids of finished conversations (the last message is the assistant's).

        Equal to `tokenizer.apply_chat_template` with this template, id for id, unless a message spells a control token:
        those letters stay text.

        Args:
            conversations: each a list of messages, the last one the assistant's.

        Raises:
            DataError: the template refuses a conversation, or does not end it in the terminal token.
        """
        encoded = [group[0] for group in self._encode([[c] for c in conversations])]
        for index, finished in enumerate(encoded):
            if finished.error:
                raise DataError(f"conversation {index + 1} of {len(encoded)} cannot be encoded: {finished.error}")
        return [finished.ids for finished in encoded]

    def encode_group(
        self, prompt: Conversation, responses: Sequence[str], max_length: int | None = None
    ) -> EncodedResponses:
        """Return the ids of K responses to one prompt; see `encode_groups`.

        Args:
            prompt: the messages before the response; may be empty.
            responses: texts of the assistant.
            max_length: longest conversation in tokens; None is the checkpoint's own maximum.
        """
        return self.encode_groups([(prompt, responses)], max_length)[0]

    def encode_groups(
        self, groups: Sequence[tuple[Conversation, Sequence[str]]], max_length: int | None = None
    ) -> list[EncodedResponses]:
        """Return the ids of many groups, each a prompt and its K responses.

        A group with a conversation over the maximum loses whole oldest exchanges of its prompt, then the left end of
        the last user message, then of the system message, until its longest conversation fits. All K keep the same
        prompt, and the template's head and the terminal token stay.

        Args:
            groups: the prompt is a list of messages and may be empty; the responses are the assistant's.
            max_length: tokens; None means the checkpoint's own maximum, and no limit where there is none.

        Returns:
            One result per group, in order. Never raises for a group: see `EncodedResponses.error`.
        """
        limit = self.max_length if max_length is None else max_length
        encoded = self._encode([_conversations(prompt, responses) for prompt, responses in groups])
        results = []
        for (prompt, responses), sequences in zip(groups, encoded, strict=True):
            result = _group(sequences, limit)
            results.append(result or self._fit(prompt, responses, limit or 0))
        return results

    def _render(self, conversations: Sequence[Conversation], add_generation_prompt: bool = False) -> list[str]:
        """Render many conversations; raises whatever the template raises."""
        if not conversations:
            return []
        rendered: list[str] = self.tokenizer.apply_chat_template(
            list(conversations),
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return rendered

    def _encode(self, groups: Sequence[list[Conversation]]) -> list[list[_Finished]]:
        """Encode groups of conversations that share all but their last message."""
        spelled = self.encoder.spells_control
        try:
            plain = [
                not any(spelled(text) for m in [*group[0], *(c[-1] for c in group[1:])] for text in m.values())
                for group in groups
            ]
            encoded = iter(self._encode_plain([g for g, ok in zip(groups, plain, strict=True) if ok]))
        except Exception:  # a row that the template refuses, or broken Unicode: halve until it stands alone
            if len(groups) == 1:
                return [[self._encode_alone(conversation) for conversation in groups[0]]]
            middle = len(groups) // 2
            return self._encode(groups[:middle]) + self._encode(groups[middle:])
        return [
            [self._checked(ids, altered) for ids, altered in next(encoded)]
            if ok
            else [self._encode_alone(c) for c in group]
            for group, ok in zip(groups, plain, strict=True)
        ]

    def _encode_plain(self, groups: Sequence[list[Conversation]]) -> list[list[tuple[list[int], str | None]]]:
        """Encode groups that spell no control token, what the texts of a group share only once.

        Returns:
            For every conversation its ids, and what the template changed in it.
        """
        rendered = iter(self._render([conversation for group in groups for conversation in group]))
        texts = [[next(rendered) for _ in group] for group in groups]
        cuts = [self._shared_cut(group) for group in texts]
        pieces = [
            piece
            for group, cut in zip(texts, cuts, strict=True)
            for piece in ([group[0][:cut], *(text[cut:] for text in group)] if cut else group)
        ]
        ids = iter(self.encoder.encode(pieces))
        encoded = []
        for group, rendering, cut in zip(groups, texts, cuts, strict=True):
            head = next(ids) if cut else []
            encoded.append([(head + next(ids), lost_message(c, t)) for c, t in zip(group, rendering, strict=True)])
        return encoded

    def _shared_cut(self, texts: list[str]) -> int:
        """Return where texts with a common beginning can be cut, the parts encoded apart, and no id changes."""
        if len(texts) < 2:
            return 0
        first, last = min(texts), max(texts)  # what these two share, all share
        low, high = 0, min(len(first), len(last))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if first[:middle] == last[:middle] else (low, middle - 1)
        return max((first.rfind(anchor, 0, low) for anchor in self.anchors), default=0)

    def _encode_alone(self, conversation: Conversation) -> _Finished:
        """Encode one conversation, which may spell control tokens."""
        texts = [text for message in conversation for text in message.values()]
        if not all(isinstance(text, str) for text in texts):
            return _Finished([], "a message is not text")
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            return _Finished([], "text is not valid Unicode (half of a surrogate pair)")
        try:
            hidden, marks = self.encoder.hide(conversation)
            rendered = self._render([hidden])[0]
            ids = self.encoder.encode_hidden(rendered, marks) if marks else self.encoder.encode([rendered])[0]
        except BtrmError:
            raise
        except Exception as error:  # a template is a program of its own and may fail in any way
            return _Finished([], f"the chat template refuses it: {first_line(error)}")
        return self._checked(ids, lost_message(hidden, rendered))

    def _checked(self, ids: list[int], altered: str | None) -> _Finished:
        if ids and ids[-1] == self.terminal_id:
            return _Finished(ids, altered=altered)
        return _Finished([], f"the chat template does not end it in {self.terminal_token!r}")

    def _fit(self, prompt: Conversation, responses: Sequence[str], limit: int) -> EncodedResponses:
        """Shorten the shared prompt until every conversation fits; each attempt renders and encodes anew."""
        for most, shorten in ways_to_shorten(prompt):

            def attempt(n: int, shorten: Shorten = shorten) -> EncodedResponses | None:
                kept, dropped, cut = shorten(n)
                result = _group(self._encode([_conversations(kept, responses)])[0], limit)
                fits = result is not None and result.error is None
                return replace(result, dropped_turns=dropped, cut_characters=cut) if result and fits else None

            found = smallest(most, attempt)
            if found is not None:
                return found
        return EncodedResponses([], error=f"answer longer than max_length {limit}")


def prepare_chat(tokenizer: Any, config: Any, family: Family) -> ChatFormat:
    """Ask a family how conversations become ids, put the answers in place and check that they keep their promises.

    Args:
        tokenizer: the base model's; from then on use the returned format's, which may be another object.
        config: the base model's transformers config, for the family to look at.
        family: who answers, from `families.load` or `families.detect`.

    Raises:
        FamilyError: an answer breaks the contract of its hook, or there is none.
    """
    setup = family.ask("setup_tokenizer", tokenizer=tokenizer, config=config)
    tokenizer = self_contained(tokenizer if setup.value is None else setup.value)
    pad, template = family.pad_answer(tokenizer), family.template_answer(tokenizer)
    num_new_tokens = install_pad(tokenizer, pad.value, pad.given_by)
    rows = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    if rows is not None and tokenizer.pad_token_id >= rows:  # the tokenizer has it already, and the model no row
        num_new_tokens = 1
    answers = {"setup_tokenizer": setup.given_by, "pad_token": pad.given_by, "chat_template": template.given_by}
    with LongWork(f"trying the chat template ({template.given_by})"):
        return settle(tokenizer, template.value, pad.value, num_new_tokens, answers)


def settle(
    tokenizer: Any,
    template: str,
    pad: PadToken,
    num_new_tokens: int,
    answers: dict[str, str],
    check: bool = True,
    any_end: bool = False,
) -> ChatFormat:
    """Put the settled answers on the tokenizer and check them on probe conversations.

    Args:
        tokenizer: a fast tokenizer; it is changed.
        template: Jinja source.
        pad: the pad token, which the tokenizer has; an empty one where it is refused.
        num_new_tokens: tokens that the model has no embedding for yet: the pad token or none (0 or 1).
        answers: hook name -> who gave the answer.
        check: False demands nothing of the answers, to look at what a refused template writes.
        any_end: True allows conversations to end in any one token, as those of a model by another trainer may.

    Returns:
        The format; without the check control tokens may be spelled, and `pad_id` is -1 where there is no pad token.

    Raises:
        FamilyError: an answer does not keep its promises; without the check, the template renders nothing.
    """
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    tokenizer.chat_template = template
    if check:
        facts = inspect_template(tokenizer, template, answers["chat_template"], any_end)
    else:
        facts = as_written(tokenizer, template)
    unknown = None if tokenizer.unk_token == pad.token else tokenizer.unk_token_id
    return ChatFormat(
        tokenizer=tokenizer,
        template=template,
        template_sha256=text_sha256(template),
        pad=pad,
        pad_id=tokenizer.pad_token_id if pad.token else -1,
        bos_id=facts.bos_id,
        terminal_id=facts.terminal_id,
        control_ids=frozenset(facts.controls.values()) - ({unknown} if check else set()),
        num_new_tokens=num_new_tokens,
        answers=answers,
        encoder=Encoder(fast_backend(tokenizer), facts.controls if check else {}),
        anchors=facts.anchors,
    )


def _conversations(prompt: Conversation, responses: Sequence[str]) -> list[Conversation]:
    return [[*prompt, {"role": "assistant", "content": response}] for response in responses]


def _group(conversations: list[_Finished], limit: int | None) -> EncodedResponses | None:
    """Return the finished group, or None if a conversation in it is over the limit."""
    error = next((finished.error for finished in conversations if finished.error), None)
    if error is not None:
        return EncodedResponses([], error=error)
    sequences = [finished.ids for finished in conversations]
    if limit is not None and any(len(ids) > limit for ids in sequences):
        return None
    return EncodedResponses(sequences, altered=tuple(finished.altered for finished in conversations))
