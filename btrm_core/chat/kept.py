"""Whether a rendered conversation still says what its messages say.

A template is a program of its own: it may cut a long message, drop old turns or take thoughts out of answers. Whoever
trains on that trains on other text than the data holds, so every rendered conversation is looked at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def lost_message(conversation: Sequence[Mapping[str, str]], text: str) -> str | None:
    """Return in a few words the first difference between messages and their rendering, or None.

    The contents must stand in the text verbatim and in their order; space around them may go. A system message may
    stand anywhere: formats without such a role fold it into another message.

    Args:
        conversation: messages with `role` and `content`.
        text: their rendering.

    >>> turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    >>> lost_message(turns, "<user>one two<assistant>three<end>")
    >>> lost_message(turns, "<user>one<assistant>three<end>")
    'the chat template drops or changes the text of a message of the user'

    What is space in one message and text in a later one is no difference:

    >>> turns = [{"role": "user", "content": " "}, {"role": "assistant", "content": "0 0"}]
    >>> lost_message(turns, "<user><assistant>0 0")
    """
    position = 0
    for message in conversation:
        content, role = message.get("content", "").strip(), message.get("role", "nameless")
        folded = role == "system"
        found = text.find(content, 0 if folded else position)
        if found < 0:
            return f"the chat template drops or changes the text of a message of the {role}"
        if not folded:
            position = found + len(content)
    return None
