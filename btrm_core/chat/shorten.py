"""How an over-long prompt is shortened: what goes first, and how little of it suffices.

Decides the order: whole oldest exchanges, then the left end of the last user message, then of the system message. The
answer is never touched. What "too long" means is the caller's `attempt`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Prompt = list[dict[str, str]]


Shorten = Callable[[int], tuple[Prompt, int, int]]


_Found = TypeVar("_Found")


def ways_to_shorten(prompt: Prompt) -> list[tuple[int, Shorten]]:
    """Return the ways to shorten a prompt, mildest first; each goes on where the one before ends.

    An exchange begins with a user message. A system message at the beginning is not part of one and is kept.

    Args:
        prompt: the messages before the response; may be empty.

    Returns:
        Pairs (most, shorten): `shorten(n)` for n in 1..most returns the shorter prompt, the messages dropped from it
        and the characters cut from what is left.
    """
    system = prompt[:1] if prompt and prompt[0].get("role") == "system" else []
    rest = prompt[len(system) :]
    starts = [i for i, message in enumerate(rest) if message.get("role") == "user" and i > 0]  # of later exchanges
    dropped = starts[-1] if starts else 0
    last, after = rest[dropped : dropped + 1], rest[dropped + 1 :]
    ways: list[tuple[int, Shorten]] = [(len(starts), lambda n: (system + rest[starts[n - 1] :], starts[n - 1], 0))]
    question = last[0].get("content", "") if last and last[0].get("role") == "user" else ""
    if question:
        ways.append((len(question), lambda n: ([*system, *_cut(last, n), *after], dropped, n)))
    if system:
        head, emptied = system[0].get("content", ""), _cut(last, len(question)) if question else last
        ways.append((len(head), lambda n: ([*_cut(system, n), *emptied, *after], dropped, len(question) + n)))
    return ways


def smallest(most: int, attempt: Callable[[int], _Found | None]) -> _Found | None:
    """Return what `attempt` gives for the smallest n in 1..most that succeeds, or None if `most` fails.

    Success is taken to be monotone in n, so that few attempts are needed; what is returned did succeed in any case.

    Args:
        most: the largest n to try.
        attempt: what is tried; None is a failure.

    >>> smallest(100, lambda n: f"{n} will do" if n >= 37 else None)
    '37 will do'
    """
    found = attempt(most) if most else None
    low, high = 1, most
    while found is not None and low < high:
        middle = (low + high) // 2
        better = attempt(middle)
        found, low, high = (found, middle + 1, high) if better is None else (better, low, middle)
    return found


def _cut(messages: Prompt, n: int) -> Prompt:
    """Cut n characters from the left of a list of one message."""
    return [{**message, "content": message.get("content", "")[n:]} for message in messages]
