"""What is written beside a setting: its range or choices, and its flag on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AtLeast:
    """A number must be `limit` or more, and if `below` is given, less than that."""

    limit: float
    below: float | None = None

    def allows(self, value: float) -> bool:
        """True for a value in the range.

        Args:
            value: what is looked at.
        """
        return value >= self.limit and (self.below is None or value < self.below)

    def __str__(self) -> str:
        return f"{self.limit} or more" if self.below is None else f"at least {self.limit} and below {self.below}"


@dataclass(frozen=True)
class Above:
    """A number must be more than `limit`."""

    limit: float

    def allows(self, value: float) -> bool:
        """True for a value in the range.

        Args:
            value: what is looked at.
        """
        return value > self.limit

    def __str__(self) -> str:
        return f"a number above {self.limit}"


@dataclass(frozen=True)
class AtMost:
    """A number must be `limit` or less; or less than it, if it is not `included`."""

    limit: float
    included: bool = True

    def allows(self, value: float) -> bool:
        """True for a value in the range.

        Args:
            value: what is looked at.
        """
        return value <= self.limit if self.included else value < self.limit

    def __str__(self) -> str:
        return f"at most {self.limit:,}" if self.included else f"below {self.limit}"


class OneOf:
    """A text must be one of `choices`."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def allows(self, value: str) -> bool:
        """True for one of the choices.

        Args:
            value: what is looked at.
        """
        return value in self.choices

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}."


Rule = AtLeast | Above | AtMost | OneOf


@dataclass(frozen=True)
class Flag:
    """The setting has a flag of its own; the others are reached with `--set section.key=value`.

    Attributes:
        name: Of the flag, without dashes; None: that of the setting.
        metavar: What the help calls the value; None: after its type.
        repeat: The flag may be given several times, each with one value of a list.
        negated: There is also `--no-NAME`.
        bare: Value of the flag given without one.
        names_choices: The help names the choices and says no more.
    """

    name: str | None = None
    metavar: str | None = None
    repeat: bool = False
    negated: bool = False
    bare: str | None = None
    names_choices: bool = False


@dataclass(frozen=True)
class Setting:
    """What is declared of one setting.

    Attributes:
        key: "section.name", or the name alone where there is no section.
        kind: int, float, bool, str, or a tuple of texts.
        optional: It may be None.
        rules: What any other value must keep.
        flag: On the command line; None if it has none of its own.
    """

    key: str
    kind: Any
    optional: bool
    rules: tuple[Rule, ...]
    flag: Flag | None
