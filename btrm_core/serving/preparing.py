"""What clients send to ids: conversations, rendered text, ids, each kept within the maximum length.

Decides: that rendered text gets exactly one token that opens a conversation, whether the client left it in or took it
out; where something too long is cut; when a prompt that is one string was rendered already.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from btrm_core.chat import ChatFormat, Conversation, EncodedResponses, spare
from btrm_core.serving.limits import Refused, too_long

UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Prepared:
    """A prompt's finished conversations as ids.

    Attributes:
        sequences: ids of those without error, in order.
        errors: one per response; None where there are ids.
        truncated: whether the beginning was cut.
        key: equal where sequences begin alike; None if nothing is known.
    """

    sequences: list[list[int]]
    errors: tuple[str | None, ...]
    truncated: bool = False
    key: Hashable = None


@dataclass(frozen=True)
class Preparer:
    """Turns what clients send into ids; used by one thread at a time, because tokenizers are.

    Attributes:
        chat: how conversations become ids.
        limit: tokens of one conversation.
        truncate: cut what is too long unless told otherwise.
    """

    chat: ChatFormat
    limit: int
    truncate: bool = False

    def responses(
        self, prompt: Conversation, responses: Sequence[str], truncate: bool | None = None, which: str = "conversation"
    ) -> Prepared:
        """Prepare the responses to a prompt.

        Args:
            prompt: messages.
            responses: the assistant's last words, one conversation each.
            truncate: whether to cut what is too long; None is the server's own setting.
            which: its place in the request, for the refusal.

        Returns:
            One sequence per response that can be encoded, and an error or None for each; if one is cut, all share the
            cut prompt.

        Raises:
            Refused: a conversation is too long and must not be cut.
        """
        cut = self.truncate if truncate is None else truncate
        result, errors = self._encode(prompt, responses, UNLIMITED)
        longest = max(map(len, result.sequences), default=0)
        if longest > self.limit:
            if not cut:
                raise too_long(which, longest, self.limit)
            result, errors = self._encode(prompt, responses, self.limit)
        truncated = bool(result.dropped_turns or result.cut_characters)
        key = (*(tuple(m.items()) for m in prompt), result.dropped_turns, result.cut_characters)
        return Prepared(result.sequences, errors, truncated, key)

    def _encode(
        self, prompt: Conversation, responses: Sequence[str], limit: int
    ) -> tuple[EncodedResponses, tuple[str | None, ...]]:
        result = self.chat.encode_group(prompt, responses, limit)
        if result.error and len(responses) > 1:
            return spare(self.chat, prompt, responses, limit)
        return result, (result.error,) * len(responses)

    def text(self, text: str, truncate: bool | None = None, which: str = "text", key: Hashable = None) -> Prepared:
        """Prepare a conversation that was rendered by a chat template, control tokens and all.

        Args:
            text: with its terminal token; a BOS in front is put there if it is missing.
            truncate: whether to cut what is too long; None is the server's own setting.
            which: its place in the request, for the refusal.
            key: equal for conversations with the same beginning; None leaves it to the batcher to find out.

        Raises:
            Refused: it is too long and must not be cut, or is not valid Unicode.
        """
        try:
            ids = self.chat.encoder.encode([text])[0]
        except (UnicodeError, TypeError) as error:
            raise Refused(422, "bad_text", f"{which} is not valid Unicode (half of a surrogate pair)") from error
        bos = self.chat.bos_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]  # taken out by clients that expect the server to put it back, as verl does for vLLM
        return replace(self.ids(ids, truncate, which), key=key)

    def ids(self, ids: Sequence[int], truncate: bool | None = None, which: str = "input_ids") -> Prepared:
        """Prepare ids, a doubled BOS at their beginning made one.

        Args:
            ids: one conversation, control tokens and all.
            truncate: whether to cut the beginning after BOS; None is the server's own setting.
            which: its place in the request, for the refusal.

        Raises:
            Refused: there are none, one is not in the vocabulary, or they are too long and must not be cut.
        """
        ids, bos = list(ids), self.chat.bos_id
        known = len(self.chat.tokenizer)
        if ids and not (min(ids) >= 0 and max(ids) < known):
            unknown = next(i for i in ids if not 0 <= i < known)
            raise Refused(422, "bad_ids", f"{which} holds {unknown}; expected ids from 0 to {known - 1}")
        if not ids:
            raise Refused(422, "bad_ids", f"{which} is empty; expected at least one token")
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        cut = self.truncate if truncate is None else truncate
        if len(ids) <= self.limit:
            return Prepared([ids], (None,))
        if not cut:
            raise too_long(which, len(ids), self.limit)
        head = ids[:1] if bos is not None and ids[0] == bos and self.limit > 1 else []
        return Prepared([head + ids[len(ids) - self.limit + len(head) :]], (None,), truncated=True)

    def answer(self, prompt: str | Conversation, response: str, truncate: bool | None = None) -> Prepared:
        """Prepare a prompt and a response, the prompt as messages, as a user's words, or rendered already.

        Args:
            prompt: a text with control tokens counts as rendered, another as a user's words.
            response: a terminal token after a rendered prompt is put there if it is missing.
            truncate: whether to cut what is too long; None is the server's own setting.

        Raises:
            Refused: see `responses` and `text`.
        """
        if isinstance(prompt, str) and self.chat.encoder.spells_control(prompt):
            end = "" if response.endswith(self.chat.terminal_token) else self.chat.terminal_token
            return self.text(prompt + response + end, truncate, key=prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.responses(messages, [response], truncate)

    def unterminated(self, prepared: Prepared) -> int:
        """How many sequences do not end in the terminal token, where training read the reward.

        Args:
            prepared: of one item.
        """
        return sum(ids[-1] != self.chat.terminal_id for ids in prepared.sequences)
