"""Checks of what becomes of conversations: pad policy, chat template, ids."""

from __future__ import annotations

from collections import Counter
from typing import Any

from btrm_core.chat import ONE, SYSTEM, TWO, begins_once, opens_turns
from btrm_core.errors import first_line
from btrm_core.preflight.conformance.subject import Subject
from btrm_core.preflight.conformance.verdict import Missing, NotConforming, require

Conversation = list[dict[str, str]]


_READ_AT = "the reward is read at the last token"


HARD = [
    {"role": "user", "content": "Write {{ x }} and {% if %} and {# note #}:\n\n\tfor  x in <b>&amp;</b> \\n 'a' \"b\""},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nÜber 你好 \U0001f642 e\u0301\r\n- one\n- two  spaces"},
    {"role": "user", "content": "assistant: user: system:\nNone true null 0"},
    {"role": "assistant", "content": "```python\nprint('hello')\n```\n[1] $x^2$"},
]


_CONVERSATIONS = {
    "of one exchange": ONE,
    "of two exchanges": TWO,
    "with a system message": [SYSTEM, *ONE],
    "with a system message and two exchanges": [SYSTEM, *TWO],
    "with code and unusual characters": HARD,
}


class TextChecks:
    """What the tokenizer, the pad token and the chat template do to conversations."""

    subject: Subject

    def test_answers_go_together(self) -> None:
        """Tokenizer, pad token and template pass the checks with which a run begins."""
        _ = self.subject.config
        try:
            _ = self.subject.chat
        except Missing as error:
            raise NotConforming(
                str(error), "every run with this family stops there", "put right what the message says"
            ) from error

    def test_pad_token_is_safe(self) -> None:
        """The pad token is neither EOS, BOS nor the terminal token, and never occurs in data."""
        subject, tokenizer = self.subject, self.subject.tokenizer
        pad = subject.family.ask("pad_token", tokenizer=tokenizer).value
        advice = (
            "answer with a token that the vocabulary reserves and nothing writes, or with PadToken(..., new=True) if "
            "there is none"
        )
        ids = self._rendered_ids()
        terminal = {tokenizer.convert_ids_to_tokens(sequence[-1]) for sequence in ids.values()}
        for role, tokens in (("EOS", {tokenizer.eos_token}), ("BOS", {tokenizer.bos_token}), ("terminal", terminal)):
            require(
                pad.token not in tokens,
                f"pad token {pad.token!r} is the {role} token",
                "whoever loads the checkpoint looks for the last token that is not padding, and finds the one before",
                advice,
            )
        require(
            pad.new != (pad.token in tokenizer.get_vocab()),
            f"pad token {pad.token!r} is {'already' if pad.new else 'not'} in the vocabulary",
            "btrm adds a token, with a row in the embedding, when it is told to and only then",
            "say PadToken(..., new=True) for a token that the vocabulary does not have, and only for one",
        )
        pad_id = None if pad.new else tokenizer.convert_tokens_to_ids(pad.token)
        holding = [name for name, sequence in ids.items() if pad_id in sequence]
        require(
            not holding,
            f"pad token {pad.token!r} occurs in a conversation {', '.join(holding)}",
            "a token that means something cannot also mean nothing",
            advice,
        )
        holding = [str(n + 1) for n, group in enumerate(subject.groups) if subject.chat.pad_id in group.tokens]
        require(
            not holding,
            f"pad token {pad.token!r} occurs in pair {', '.join(holding)} of btrm's sample",
            "a token that means something cannot also mean nothing",
            advice,
        )

    def test_pad_token_survives_saving(self) -> None:
        """A saved tokenizer, loaded again without the plugin, has the same pad token with the same id."""
        chat, again = self.subject.chat, self._reloaded()
        require(
            (again.pad.token, again.pad_id) == (chat.pad.token, chat.pad_id),
            f"pad token {chat.pad.token!r} ({chat.pad_id}) is {again.pad.token!r} ({again.pad_id}) after reloading",
            "a trained checkpoint is used without the plugin",
            "let setup_tokenizer change only what save_pretrained keeps",
        )

    def test_template_compiles(self) -> None:
        """The template compiles in the sandboxed Jinja environment of transformers and renders an exchange."""
        self._render(ONE)

    def test_exactly_one_bos(self) -> None:
        """Every conversation has the beginning-of-sequence token once, at its beginning."""
        tokenizer = self.subject.tokenizer
        if tokenizer.bos_token is None or tokenizer.bos_token == tokenizer.eos_token:
            raise Missing("the tokenizer has no beginning-of-sequence token")
        rendered, bos = self._rendered_ids(), tokenizer.bos_token_id
        if opens_turns(bos, rendered["of one exchange"], rendered["of two exchanges"]):
            return  # ChatML vocabularies name as BOS the token that opens every turn
        for name, ids in rendered.items():
            require(
                begins_once(bos, ids),
                f"BOS {tokenizer.bos_token!r} occurs {ids.count(bos)} times in a conversation {name}, "
                f"which begins with {tokenizer.convert_ids_to_tokens(ids[0])!r}",
                "base models were trained with it once, at the beginning; otherwise the hidden states are off",
                "begin the template with {{- bos_token }} and write it nowhere else",
            )

    def test_system_message_is_kept(self) -> None:
        """A system message is rendered, or folded into the first user message, wherever the conversation ends."""
        for conversation in ([SYSTEM, *ONE], [SYSTEM, *TWO], [SYSTEM, ONE[0]], [SYSTEM, *TWO, ONE[0]]):
            text = self._render(conversation)
            require(
                text.count(SYSTEM["content"]) == 1,
                f"the system message occurs {text.count(SYSTEM['content'])} times in a conversation of "
                f"{len(conversation)} messages that ends with the {conversation[-1]['role']}'s",
                "an answer is judged by instructions that the model does not see",
                "render the system role, or fold its text into the user message that follows",
            )

    def test_content_is_verbatim(self) -> None:
        """Every message is in the rendering, letter for letter (but for blanks at its ends) and in order."""
        for name, conversation in _CONVERSATIONS.items():
            text, position = self._render(conversation), 0
            for message in conversation:
                content = message["content"].strip()
                found = text.find(content, position)
                require(
                    found >= 0,
                    f"the {message['role']} message {content!r:.60} of a conversation {name} is lost, changed or out "
                    "of place",
                    "the reward would be for another text than the one given",
                    "write message['content'] as it is; at most strip blanks at its ends",
                )
                position = found + len(content)

    def test_terminal_token_is_fixed(self) -> None:
        """Every conversation ends in the same control token, the one where the reward is read."""
        tokenizer, ids = self.subject.tokenizer, self._rendered_ids()
        last = {name: sequence[-1] for name, sequence in ids.items()}
        shown = ", ".join(sorted({repr(tokenizer.decode([index])) for index in last.values()}))
        require(
            len(set(last.values())) == 1,
            f"conversations end in different tokens: {shown}",
            f"{_READ_AT}, which would mean different things",
            "end every message of the assistant in the same token, and write nothing after it",
        )
        added = tokenizer.added_tokens_decoder
        index = next(iter(last.values()))
        require(
            index in added and str(added[index]).strip(),
            f"conversations end in {shown}, which is no control token",
            f"{_READ_AT}; one that also occurs inside a message says less",
            "end the template in the token that ends a turn, without a line break after it",
        )

    def test_prompt_begins_the_conversation(self) -> None:
        """A prompt rendered for generation is, token for token, the beginning of the whole conversation."""
        for name, conversation in _CONVERSATIONS.items():
            if conversation is HARD:
                continue  # an answer that begins with a line break may merge with the template's
            whole = self._ids(self._render(conversation))
            prompt = self._ids(self._render(conversation[:-1], add_generation_prompt=True))
            require(
                whole[: len(prompt)] == prompt,
                f"the prompt of a conversation {name} has {len(prompt)} tokens, of which only "
                f"{_common(whole, prompt)} begin the whole conversation",
                "what a policy model saw when it answered would not be what the reward model judges",
                "let the template write a message the same way wherever it stands, and honour add_generation_prompt",
            )

    def test_rendering_is_date_free(self) -> None:
        """The same conversation is rendered the same on two dates."""
        for name, conversation in _CONVERSATIONS.items():
            # The macro takes the place of the function that transformers gives to templates as their clock.
            dated = [
                self._render(conversation, f"{{% macro strftime_now(format) %}}{day}{{% endmacro %}}", date_string=day)
                for day in ("03 Feb 2001", "27 Nov 2033")
            ]
            require(
                dated[0] == dated[1],
                f"the template writes the date into a conversation {name}",
                "the same conversation would get another reward tomorrow",
                "take strftime_now and date_string out of the template",
            )

    def test_unknown_role_is_refused(self) -> None:
        """A role that the template does not know is an error, not silence."""
        try:
            text = self._render([{"role": "gizmo", "content": "whirr"}, ONE[1]])
        except NotConforming:
            return
        require(
            False,
            f"a message of role 'gizmo' is rendered as {text!r:.80}",
            "a misspelt role in the data would train the model on a format that it never sees again",
            "end the template's chain of roles in {{- raise_exception('unknown role') }}",
        )

    def test_ids_equal_apply_chat_template(self) -> None:
        """The ids in btrm are those of the tokenizer's own `apply_chat_template`, id for id."""
        chat = self.subject.chat
        for name, ids in self._encoded().items():
            own = chat.tokenizer.apply_chat_template(_CONVERSATIONS[name], tokenize=True, return_dict=False)
            require(
                list(own) == ids,
                f"a conversation {name} has {len(ids)} ids in btrm and {len(own)} from apply_chat_template, the first "
                f"{_common(own, ids)} equal",
                "whoever uses the checkpoint with transformers alone would get other rewards",
                "let setup_tokenizer return a plain fast tokenizer",
            )

    def test_ids_survive_saving(self) -> None:
        """Tokenizer and template, saved and loaded again without the plugin, give the same ids."""
        before, again = self._encoded(), self._reloaded()
        for name, ids in before.items():
            after = again.encode([_CONVERSATIONS[name]])[0]
            require(
                after == ids,
                f"a conversation {name} has other ids after saving and loading the tokenizer (the first "
                f"{_common(after, ids)} of {len(ids)} are equal)",
                "a trained checkpoint is used without the plugin",
                "let setup_tokenizer change only what save_pretrained keeps",
            )

    def test_control_tokens_in_content_stay_text(self) -> None:
        """A message that spells control tokens is encoded as letters: nobody can end a turn by typing it."""
        chat = self.subject.chat
        names = sorted(str(chat.tokenizer.convert_ids_to_tokens(index)) for index in chat.control_ids)
        spelled = " ".join(names)
        conversation = [
            {"role": "user", "content": f"a {spelled} b"},
            {"role": "assistant", "content": f"c {spelled} d"},
        ]
        plain = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
        ids, expected = chat.encode([conversation, plain])
        extra = Counter(i for i in ids if i in chat.control_ids)
        extra.subtract(i for i in expected if i in chat.control_ids)
        wrong = [str(chat.tokenizer.convert_ids_to_tokens(index)) for index, count in extra.items() if count]
        require(
            not wrong,
            f"the letters of {', '.join(wrong[:5])} inside a message become the control token",
            "a user who types them ends the turn and forges the next one",
            "let setup_tokenizer return a tokenizer whose control tokens are added tokens of its tokenizer.json",
        )

    def _render(self, conversation: Conversation, prelude: str = "", **variables: Any) -> str:
        """Render with the family's template after a prelude; a template that fails is the family's fault."""
        subject = self.subject
        try:
            text = subject.tokenizer.apply_chat_template(
                conversation, chat_template=prelude + subject.template, tokenize=False, **variables
            )
        except Missing:
            raise
        except Exception as error:
            line = getattr(error, "lineno", None)
            roles = ", ".join(message["role"] for message in conversation)
            raise NotConforming(
                f"the template fails on the roles ({roles}): {first_line(error)}{f', line {line}' if line else ''}",
                "such conversations are dropped from the data",
                "correct the template; it must render system, user and assistant messages",
            ) from error
        return str(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.subject.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _rendered_ids(self) -> dict[str, list[int]]:
        """The probe conversations as the bare tokenizer encodes the template's text."""
        return {name: self._ids(self._render(conversation)) for name, conversation in _CONVERSATIONS.items()}

    def _encoded(self) -> dict[str, list[int]]:
        """The probe conversations as btrm encodes them."""
        encoded = self.subject.chat.encode(list(_CONVERSATIONS.values()))
        return dict(zip(_CONVERSATIONS, encoded, strict=True))

    def _reloaded(self) -> Any:
        """The format as read from a directory in which the tokenizer and the template were saved."""
        from btrm_core.model import chat_from_checkpoint

        chat, directory = self.subject.chat, self.subject.directory / "tokenizer"
        chat.tokenizer.save_pretrained(directory)
        (directory / "chat_template.jinja").write_text(chat.template, encoding="utf-8")
        (directory / "btrm.json").write_text("{}", encoding="utf-8")  # as a model of btrm's, which keeps its pad token
        return chat_from_checkpoint(directory)


def _common(first: list[int], second: list[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
