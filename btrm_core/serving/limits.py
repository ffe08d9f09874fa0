"""What a server takes on: sizes, times and who may ask. Every refusal is a status and one line.

Decides: which status a refusal has. A full queue is 503 with Retry-After and never 429, because trainers that retry
treat every 4xx as final.
"""

from __future__ import annotations

from dataclasses import dataclass

from btrm_core.errors import BtrmError, ConfigError

HELD_BYTES = 256 << 20
COMPARED = 512
"""Responses that are compared with each other: the answer has their square, 5 MB of JSON for so many."""


@dataclass(frozen=True)
class Limits:
    """The bounds of a server.

    Attributes:
        queue_tokens: tokens that may wait for the device; beyond it requests get 503.
        items: conversations of one request; beyond it 422.
        max_length: tokens of one conversation; None takes the model's own. Beyond it 422, or the beginning is cut.
        truncate: cut conversations that are too long although the request does not ask for it.
        body_bytes: bytes of a request's body; beyond it 413.
        body_seconds: time for a client to send its body; beyond it 408.
        deadline_seconds: time for an answer; beyond it 504. Below the 180 s after which OpenRLHF gives up.
        retry_seconds: what Retry-After says.
        token: what clients send as `Authorization: Bearer TOKEN`; None lets everyone in.
    """

    queue_tokens: int = 1 << 20
    items: int = 1024
    max_length: int | None = None
    truncate: bool = False
    body_bytes: int = 16 << 20
    body_seconds: float = 30.0
    deadline_seconds: float = 150.0
    retry_seconds: int = 1
    token: str | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of all bodies that are being read or wait for their answer; beyond it requests get 503."""
        return max(HELD_BYTES, self.body_bytes)

    def __post_init__(self) -> None:
        for name in ("queue_tokens", "items", "body_bytes", "body_seconds", "deadline_seconds", "retry_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length is {self.max_length}; expected at least 1")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise ConfigError("the bearer token is empty or not ASCII; expected some ASCII characters on one line")


class Refused(BtrmError):
    """A request that is not answered with rewards.

    Attributes:
        status: the HTTP status.
        reason: a word for the metrics.
        headers: headers of the answer.
    """

    def __init__(self, status: int, reason: str, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason
        self.headers = headers or {}


class Unavailable(Refused):
    """What computes the rewards cannot be reached, or is overloaded: none of a batch can be computed now.

    Args:
        text: one line.
    """

    def __init__(self, text: str) -> None:
        super().__init__(503, "backend", text, {"Retry-After": "5"})


def too_many(what: str, found: int, limit: int) -> Refused:
    """The refusal of a request that is larger than a limit.

    Args:
        what: the unit, in the plural.
        found: how many the request has.
        limit: how many are allowed.

    Returns:
        To be raised; status 422.
    """
    return Refused(422, "too_large", f"{found} {what} are more than the limit of {limit}; send fewer at a time")


def too_long(which: str, tokens: int, limit: int) -> Refused:
    """The refusal of a conversation over the maximum length.

    Args:
        which: its place in the request.
        tokens: its length.
        limit: the maximum length, in tokens.

    Returns:
        To be raised; status 422.
    """
    return Refused(
        422,
        "too_long",
        f"{which} has {tokens} tokens, the limit is {limit}; shorten it, or ask for truncation of its beginning",
    )
