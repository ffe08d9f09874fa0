"""How a check ends: it returns, it raises `NotConforming` with advice, or it raises `Missing` and counts as skipped.

Needs no test framework: pytest treats `unittest.SkipTest` as a skip and shows the message of any other exception.
"""

from __future__ import annotations

import unittest


class NotConforming(AssertionError):
    """A family breaks its contract.

    Attributes:
        what: what is wrong, with the offending value.
        why: what that would do to a user's run.
        what_to_do: what the author should change.
    """

    def __init__(self, what: str, why: str, what_to_do: str) -> None:
        super().__init__(f"{what}\n  why it matters: {why}\n  what to do: {what_to_do}")
        self.what = what
        self.why = why
        self.what_to_do = what_to_do


class Missing(unittest.SkipTest):
    """Something that a check looks at does not exist or could not be made; another check says why that is wrong."""


def require(condition: object, what: str, why: str, what_to_do: str) -> None:
    """Raise `NotConforming` unless the condition holds.

    Args:
        condition: what must be true.
        what: what is wrong otherwise, with the offending value.
        why: what that would do to a user's run.
        what_to_do: what the author should change.
    """
    __tracebackhide__ = True
    if not condition:
        raise NotConforming(what, why, what_to_do)
