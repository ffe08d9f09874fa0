"""The FastAPI application: routes, the page, health, metrics, and how errors look."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import metadata, resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from btrm_core.errors import BtrmError, first_line
from btrm_core.serving import native, trainers
from btrm_core.serving.guard import Guard, error_body
from btrm_core.serving.limits import Refused
from btrm_core.serving.service import Service

_log = logging.getLogger("btrm.serving")
_PAGE = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The body is not JSON.",
        401: "The bearer token is missing or wrong.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        415: "The body is packed, or is not said to be JSON.",
        422: "The request cannot be understood, or is larger than a limit.",
        500: "The reward could not be computed.",
        503: "Not ready, or the queue is full; try again after Retry-After.",
        504: "No answer before the deadline.",
    }.items()
}

_FORMS = {
    "str": "a text",
    "list[str]": "a list of texts",
    "list[int]": "a list of ids",
    "list[list[int]]": "a list of lists of ids",
    "list[Turn]": "a list of messages (role, content)",
}


class Answer(JSONResponse):
    """JSON that is ASCII, so that broken Unicode of a client's cannot break the answer, and knows no NaN."""

    def render(self, content: Any) -> bytes:
        """Return the bytes.

        Args:
            content: JSON values; NaN and infinity are a ValueError.
        """
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def create_app(service: Service) -> FastAPI:
    """Return the application that serves a model; it runs the self-test when it starts, and drains when it ends.

    Args:
        service: not started yet.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(service.start)
        yield
        await run_in_threadpool(service.stop)

    app = FastAPI(
        title="btrm",
        version=metadata.version("btrm"),
        description="Rewards of conversations from a Bradley-Terry reward model.",
        lifespan=lifespan,
        default_response_class=Answer,
        responses=_ERRORS,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(native.router)
    app.include_router(trainers.router)
    _add_health(app, service)
    _add_page(app)
    _add_errors(app, service)
    app.add_middleware(Guard, limits=service.limits, metrics=service.metrics)
    return app


def _add_health(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", tags=["operation"])
    async def ready() -> Response:
        """The model gives the rewards that training wrote down, and requests are taken."""
        if service.not_ready is None:
            return Answer({"status": "ready"})
        return Answer({"status": "not ready", "reason": service.not_ready}, 503, {"Retry-After": "5"})

    @app.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    folder = resources.files("btrm_core.serving") / "page"
    files = {name: (folder / name).read_bytes() for name in _PAGE}

    def answer(name: str) -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(files[name], media_type=_PAGE[name], headers=headers)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return answer("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return answer(name)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """A plain list of the routes, since the usual viewers load scripts from elsewhere."""
        return Response(_docs(app.openapi()), media_type="text/plain; charset=utf-8")


def _docs(schema: dict[str, Any]) -> str:
    lines = ["btrm: routes of this server. The whole schema is at /openapi.json.", ""]
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            lines += [f"{method.upper():5}{path}", f"     {about.get('description', '')}", ""]
    return "\n".join(lines)


def _wrong(errors: Sequence[Any]) -> str:
    """What is wrong with a body, in one line; of a field that may have several forms, all of them."""
    place = [str(part) for part in errors[0]["loc"]]
    field = next((n for n, part in enumerate(place) if part in _FORMS), len(place))
    forms = dict.fromkeys(str(error["loc"][field]) for error in errors if len(error["loc"]) > field)
    if len(forms) < 2:
        return f"{'.'.join(place)}: {errors[0]['msg']}"
    return f"{'.'.join(place[:field])}: expected {' or '.join(_FORMS.get(form, form) for form in forms)}"


def _add_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        service.metrics.refused.labels(error.reason).inc()
        return Answer(error_body(str(error), error.reason), error.status, error.headers)

    @app.exception_handler(BtrmError)
    async def failed(_: Request, error: BtrmError) -> Response:
        return Answer(error_body(str(error), "failed"), 500)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        service.metrics.refused.labels("bad_request").inc()
        if error.errors()[0]["type"] == "json_invalid":
            return Answer(error_body(f"the body is not JSON: {error.errors()[0]['ctx']['error']}", "bad_request"), 400)
        return Answer(error_body(_wrong(error.errors()), "bad_request"), 422)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        text = str(error.detail)
        if error.status_code == 400 and error.__cause__ is not None:  # what the parser of the body says
            text = f"the body is not JSON: {first_line(error.__cause__)}"
        return Answer(error_body(text, "http"), error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        _log.error("a bug: %s", type(error).__name__)
        return Answer(error_body("a bug in the server; its log says more", "bug"), 500)
