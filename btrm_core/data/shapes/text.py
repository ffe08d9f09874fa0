r"""Structure that was written out as text: transcripts, serialised messages, finished chat templates.

Decides: which text is a conversation and not the words of one message. A model trained on the letters of a template,
or of a list in JSON, learns the letters. Recognised, each only where the text begins with it:

* transcripts, "\n\nHuman: ... \n\nAssistant: ..." (HH-RLHF);
* a list of messages as JSON, or as Python or numpy print it (a table saved as CSV);
* finished templates with the control tokens of the known chat formats;
* turns between `<extra_id_1>` (HelpSteer2, Nemotron), whose first turn has no header;
* turns under labels (USER: and ASSISTANT:, ### Instruction: and ### Response:), in a prompt only where it ends by
  asking the assistant, and in an answer only where the row has no prompt besides.

A control token in the middle of a text is a person's letters and stays what it is.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from btrm_core.data.shapes import keys
from btrm_core.data.shapes.values import RowError, literal

TRANSCRIPT = "transcript"
SERIALISED = "serialised messages"
TEMPLATE = "finished template"
TURNS = "<extra_id_1> turns"
LABELS = "labelled turns"

ROLE_NAMES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "model", "ai", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "tool_response", "function_response"), "tool"),
}
"""What other tools call the four roles; compared in lower case."""

_HUMAN = re.compile(r"\s*Human:")
_TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")
_LOOKS_SERIALISED = re.compile(r"\s*(?:array\()?\[?\s*\{\s*['\"](role|from|content|value)['\"]\s*:")
_MAY_BE_SERIALISED = re.compile(
    r"\s*(?:array\()?[\"']?\s*[\[(]?\s*(?:\\?[\"'])?\{.*['\"](?:role|from)\\*['\"]\s*:", re.DOTALL
)
_HAS_CONTENT = re.compile(r"['\"](?:content|value)\\*['\"]\s*:")
_BEGIN = re.compile(
    r"(?:<\|begin_of_text\|>|<bos>|<s>|<\|startoftext\|>|<\|endoftext\|>|<BOS_TOKEN>|\[gMASK\]|<sop>|\s)*"
)
_TERMINALS = (
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<end_of_turn>", "<eos>", "</s>", "<|end|>"),
    *("<|endoftext|>", "<|eot|>", "<|return|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>"),
    *("[|endofturn|]", "<extra_id_1>"),
)
_HEADERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n*",
        r"<\|header_start\|>(\w+)<\|header_end\|>\n*",
        r"<\|im_start\|>(\w+)(?:<\|im_sep\|>|[ \t]*\n?)",
        r"<\|start_of_role\|>(\w+)<\|end_of_role\|>",
        r"GPT4 Correct (User|Assistant):[ \t]?",
        r"\[\|(system|user|assistant)\|\]",
        r"<start_of_turn>(\w+)\n?",
        r"<\|start\|>(\w+)(?:<\|channel\|>final)?<\|message\|>",
        r"<\|START_OF_TURN_TOKEN\|><\|(SYSTEM|USER|CHATBOT)_TOKEN\|>",
        r"<\|(system|user|assistant|tool|prompter|observation)\|>\n?",
        r"<｜(User|Assistant)｜>",
    )
)
_INST = re.compile(r"\s*(?:<s>\s*)?\[INST\](.*?)\[/INST\]", re.DOTALL)
_SYS = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>\s*", re.DOTALL)
_SYSTEM_PROMPT = re.compile(r"\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\]", re.DOTALL)
_LABELS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:\A|(?<=\s)|(?<=</s>))(?P<user>USER):|(?:\A|(?<=\s)|(?<=</s>))(?P<assistant>ASSISTANT):",
        r"(?:\A|\n)#{2,3} (?P<user>Human|User|Instruction):|(?:\A|\n)#{2,3} (?P<assistant>Assistant|Response|Answer):",
        r"(?:\A\s*|\n\n)(?P<user>Human):|\n\n(?P<assistant>Assistant):",
        r"(?:\A\s*|\n)(?P<user>User|Human):|(?:\n)(?P<assistant>Assistant|AI|Bot):",
        r"(?:\A|(?<=\s))(?P<user>prompter):|(?:\A|(?<=\s))(?P<assistant>assistant):",
    )
)
_AFTER_A_HEAD = _LABELS[:3]
"""Those that may have a system text before them: Vicuna's, Alpaca's and Anthropic's."""
_LABEL = re.compile(r"\s*(?:ASSISTANT|Assistant|assistant|AI|Bot|#{2,3} (?:Assistant|Response|Answer)):\s*")
_ALPACA_INPUT = re.compile(r"\n#{2,3} Input:\s*")
_EXTRA = re.compile(r"<extra_id_[01]>(System|User|Assistant)[ \t]*(?:\n|\Z)")

Turn = tuple[str, str]  # role as the data calls it, content


@dataclass(frozen=True)
class Found:
    """A conversation that was found in a text.

    Attributes:
        form: one of the four names above.
        turns: role and content of each; empty where `raw` is given.
        raw: the parsed value of serialised messages, not yet checked.
    """

    form: str
    turns: tuple[Turn, ...] = ()
    raw: Any = None


def conversation_in(text: str) -> Found | None:
    """Return the conversation that a text spells from its beginning on; None for a plain text.

    Args:
        text: a text of a row.

    Returns:
        Its form and turns, or the parsed value of serialised messages; or None.

    Raises:
        RowError: the text looks like serialised messages and cannot be read as such.
    """
    if _HUMAN.match(text):
        turns = transcript_turns(text)
        if len(turns) == 1:  # of single line breaks, perhaps
            turns = labelled_turns(text, asks=True) or labelled_turns(text, asks=False) or turns
        return Found(TRANSCRIPT, tuple(turns))
    if _LOOKS_SERIALISED.match(text) or _MAY_BE_SERIALISED.match(text):
        return _serialised(text)
    if "<extra_id_1>" in text and (turns := _extra_id_turns(text)):
        return Found(TURNS, tuple(turns))
    if turns := _template_turns(text):
        return Found(TEMPLATE, tuple(turns))
    return None


def labelled_turns(text: str, *, asks: bool) -> list[Turn]:
    """Split a text into its turns under labels such as USER: and ASSISTANT:; what comes before them is the system's.

    Args:
        text: a text of a row.
        asks: whether it must end with a label of the assistant, as a prompt does, or must not.

    Returns:
        Role and content, stripped, of each turn; empty if the labels do not make a conversation of it.
    """
    if asks and not text.rstrip().endswith(":"):
        return []  # long before the labels are looked for
    for labels in _LABELS:
        found = list(labels.finditer(text))
        roles = [str(match.lastgroup) for match in found]
        if roles[:1] != ["user"] or "assistant" not in roles or any(a == b for a, b in itertools.pairwise(roles)):
            continue
        ends = [*(match.start() for match in found[1:]), len(text)]
        bodies = [text[match.end() : end].strip() for match, end in zip(found, ends, strict=True)]
        if asks != (roles[-1] == "assistant" and not bodies[-1]):
            continue
        turns = [
            (role, _ALPACA_INPUT.sub("\n", body) if role == "user" else without_terminal(body))
            for role, body in zip(roles, bodies, strict=True)
        ]
        head = text[: found[0].start()].strip().removeprefix("System:").strip()
        if not head or labels in _AFTER_A_HEAD:
            return [("system", head), *turns] if head else turns
    return []


def transcript_turns(text: str) -> list[Turn]:
    """Split a transcript into its turns.

    Args:
        text: the transcript, "Human: ... Assistant: ...".

    Returns:
        Role in lower case and content, stripped, of each turn; empty if the text does not begin like a transcript.
    """
    head, *parts = _TURN.split(text)
    if head or not parts:
        return []
    return [(who.lower(), content.strip()) for who, content in zip(parts[::2], parts[1::2], strict=True)]


def without_terminal(text: str) -> str:
    """Return an answer without the control tokens at its end.

    Args:
        text: the answer; if it ends in none of them, it is returned as it stands.

    >>> without_terminal("a<|eot_id|>"), without_terminal("a b")
    ('a', 'a b')
    """
    bare = text.rstrip()
    while ending := next((token for token in _TERMINALS if bare.endswith(token)), None):
        text = bare = bare[: -len(ending)].rstrip()
    return text


def without_label(text: str) -> str:
    """Return an answer to labelled turns without the assistant's label at its beginning and a control token at its end.

    Args:
        text: the answer.

    >>> without_label("ASSISTANT: a</s>")
    'a'
    """
    return without_terminal(_LABEL.sub("", text, count=1) if _LABEL.match(text) else text).strip()


def ends_in_terminal(text: str) -> bool:
    """True if a text ends in a control token that ends a turn in some chat format (`</s>` may be HTML).

    Args:
        text: the text; space at its end does not count.
    """
    return text.rstrip().endswith(tuple(token for token in _TERMINALS if token != "</s>"))


def _serialised(text: str) -> Found | None:
    """Messages in JSON or as Python or numpy print them: a list, one alone, in an object with more, written twice."""
    value = literal(text)
    if value is None:
        value = _one_a_line(text)
    if isinstance(value, str):
        return _serialised(value) if _MAY_BE_SERIALISED.match(value) else None
    if value is None:
        _refuse_broken(text.strip())
        return None  # an answer in JSON or code, say
    if isinstance(value, dict) and (
        whole := next((key for key in keys.WHOLE if isinstance(value.get(key), list)), None)
    ):
        items = value[whole]
    else:
        value = items = value if isinstance(value, list) else [value]
        if all(isinstance(item, str) and item.lstrip().startswith("{") for item in items):
            value = items = [literal(item) for item in items]
    return Found(SERIALISED, raw=value) if items and all(_is_message(item) for item in items) else None


def _one_a_line(text: str) -> list[Any] | None:
    """The values of a text that has one in each of several lines, as JSONL has."""
    lines = text.split("\n")
    found = [literal(line) for line in lines if line.strip()] if len(lines) > 1 else []
    return found if found and all(_is_message(item) for item in found) else None


def _refuse_broken(text: str) -> None:
    """Refuse what begins as a list of messages and cannot be read, being cut off, say, or shortened by numpy."""
    kind = "messages written as text"
    if text.startswith(("[", "(", "array(")) and (_LOOKS_SERIALISED.match(text) or _HAS_CONTENT.search(text)):
        raise RowError(
            kind,
            f"the text looks like a list of messages but is no JSON ({text[:20]!r}...); "
            "write the column as JSON, or as a list",
        )
    if "array(" in text and "'" in text[:4]:
        raise RowError(
            kind, "the text looks like messages as numpy prints them inside of others; write the column as JSON"
        )


def _is_message(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    role = item.get("role", item.get("from"))
    has_content = any(key in item for key in ("content", "value", "text", "parts", "tool_calls"))
    return has_content and isinstance(role, str) and role.strip().lower() in ROLE_NAMES


def _template_turns(text: str) -> list[Turn]:
    begin = _BEGIN.match(text)
    start = begin.end() if begin else 0
    if (before := _SYSTEM_PROMPT.match(text, start)) and (turns := _template_turns(text[before.end() :])):
        return [("system", before.group(1).strip()), *turns]
    if text.startswith(("[INST]", "<s>[INST]", "<s> [INST]"), len(text) - len(text.lstrip())) or text.startswith(
        "[INST]", start
    ):
        return _inst_turns(text[start:])
    for header in _HEADERS:
        if header.match(text, start):
            _, *parts = header.split(text[start:])
            return [(who, without_terminal(body).strip()) for who, body in zip(parts[::2], parts[1::2], strict=True)]
    head, marker, _ = text[start:].partition("<｜User｜>")
    if marker and text.lstrip().startswith("<｜begin▁of▁sentence｜>"):
        system = head.replace("<｜begin▁of▁sentence｜>", "").strip()
        turns = _template_turns(text[start + len(head) :])
        return [("system", system), *turns] if system else turns
    return []


def _inst_turns(text: str) -> list[Turn]:
    turns: list[Turn] = []
    position = 0
    while match := _INST.match(text, position):
        user = match.group(1)
        if not turns and (system := _SYS.match(user)):
            turns.append(("system", system.group(1).strip()))
            user = user[system.end() :]
        turns.append(("user", user.strip()))
        following = text.find("[INST]", match.end())
        position = len(text) if following < 0 else following
        answer = without_terminal(re.sub(r"<s>\s*\Z", "", text[match.end() : position])).strip()
        if answer or following >= 0:
            turns.append(("assistant", answer))
    return turns


def _extra_id_turns(text: str) -> list[Turn]:
    head, *parts = _EXTRA.split(text)
    turns = [(who, without_terminal(body).strip()) for who, body in zip(parts[::2], parts[1::2], strict=True)]
    if not turns:
        return []
    if turns[0] == ("System", ""):
        turns = turns[1:]
    return [("user", head.strip()), *turns] if head.strip() else turns
