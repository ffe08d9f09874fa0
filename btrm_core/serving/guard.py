"""Around every request: who may ask, how large and how slow a body may be, what is counted and logged.

No text of a client's is ever logged. A body is read whole before the routes see it, within a size and a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from btrm_core.serving.limits import Limits, Refused
from btrm_core.serving.metrics import Metrics

OPEN = frozenset({"/", "/health", "/ready"})
"""Paths that need no token: what a load balancer asks, and the page, which asks the person for it."""
OPEN_BELOW = "/page/"
LINGER = 1.0
"""Seconds for which a refused body is still taken, and thrown away."""

_log = logging.getLogger("btrm.serving")


def error_body(text: str, reason: str) -> dict[str, Any]:
    """The body of every refusal, in the shape of OpenAI's errors, and `detail` for clients of FastAPI servers.

    Args:
        text: one line for people.
        reason: one word for programs, such as `queue_full`.
    """
    return {"error": {"message": text, "type": reason}, "detail": text}


class Guard:
    """ASGI middleware that checks the token, reads the body, counts and logs.

    Args:
        app: the routes.
        limits: sizes, times, the token.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["btrm_since"] = since = time.monotonic()
        status: int | None = None
        held = [0]
        rest: Receive | None = receive

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_token(scope)
            body = await self._body(scope, receive, held)
            rest = None
            if body:
                _check_type(dict(scope["headers"]))
            await self._app(scope, _replay(body, receive), counted)
        except Refused as refused:
            await self._refuse(refused, counted, rest)
        except asyncio.CancelledError:  # the time to drain is over
            if status is None:
                await self._refuse(Refused(503, "stopping", "the server is stopping", {"Retry-After": "5"}), counted)
        finally:
            self._held -= held[0]
            route = getattr(scope.get("route"), "path", "other")
            took = time.monotonic() - since
            self._metrics.requests.labels(route, str(status or 500)).inc()
            self._metrics.seconds.labels(route).observe(took)
            _log.debug("%s", json.dumps({"route": route, "status": status, "seconds": round(took, 4)}))

    def _check_token(self, scope: Scope) -> None:
        token, path = self._limits.token, scope["path"]
        if token is None or path in OPEN or path.startswith(OPEN_BELOW):
            return
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                given = value
        scheme, _, secret = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(secret.strip(), token.encode("ascii")):
            raise Refused(401, "unauthorized", "expected `Authorization: Bearer TOKEN`", {"WWW-Authenticate": "Bearer"})

    async def _body(self, scope: Scope, receive: Receive, held: list[int]) -> bytes:
        """Read a body; `held` counts its bytes, which stay in memory until the answer."""
        limit = self._limits.body_bytes
        refusal = Refused(413, "body_too_large", f"the body is larger than the limit of {limit} bytes")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced[:20]) > limit:
            raise refusal
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(499, "client_gone", "the client left")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    held[0] = size
                    self._held += len(parts[-1])
                    if self._held > self._limits.held_bytes:
                        retry = {"Retry-After": str(self._limits.retry_seconds)}
                        raise Refused(503, "queue_full", "too much is waiting; try again", retry)
                    if size > limit:
                        raise refusal
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(
                408, "body_too_slow", f"the body did not arrive within {self._limits.body_seconds:g} s"
            ) from None

    async def _refuse(self, refused: Refused, send: Send, rest: Receive | None = None) -> None:
        """Answer, and take what is left of a body before the connection is closed: else it is reset, answer and all."""
        self._metrics.refused.labels(refused.reason).inc()
        body = json.dumps(error_body(str(refused), refused.reason)).encode("ascii")
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers |= {name.lower(): value for name, value in refused.headers.items()}
        pairs = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
        await send({"type": "http.response.body", "body": body, "more_body": rest is not None})
        if rest is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    while (await rest()).get("more_body", False):
                        pass
            await send({"type": "http.response.body", "body": b""})


def _check_type(headers: dict[bytes, bytes]) -> None:
    """Refuse a body that no route would understand: one that is packed, or is not said to be JSON."""
    packed = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if packed not in ("", "identity"):
        raise Refused(415, "bad_type", f"the body is packed ({packed[:20]!r}); send it without Content-Encoding")
    said = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
    if not (said.startswith("application/") and said.endswith(("/json", "+json"))):
        raise Refused(
            415, "bad_type", f"the body's type is {said[:40]!r}; expected the header Content-Type: application/json"
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand out a body that was read already, then whatever comes."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
