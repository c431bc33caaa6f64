"""Errors as RFC 9457 problem documents, which the middleware uses too."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

# PostgreSQL's errors that a client's values cause, by SQLSTATE: any other error is a fault of ours, a 500
_UNIQUE_VIOLATION = "23505"
_FOREIGN_KEY_VIOLATION = "23503"
_CHECK_VIOLATION = "23514"
_DATA_EXCEPTION_CLASS = "22"


class ProblemError(Exception):
    """Answers a request with ``status`` and a problem document with ``detail``."""

    def __init__(self, status: int, detail: str) -> None:
        """Store both."""
        super().__init__(detail)
        self.status = status
        self.detail = detail


def problem(status: int, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any) -> JSONResponse:
    """Return the problem document of ``status``, with further ``members`` beside ``detail``."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **members,
    }
    return JSONResponse(body, status_code=status, headers=headers, media_type="application/problem+json")


async def on_problem(request: Request, exc: ProblemError) -> JSONResponse:
    """Answer a ``ProblemError`` that a handler raised."""
    return problem(exc.status, exc.detail)


async def on_http_error(request: Request, exc: HTTPException) -> JSONResponse:
    """Answer Starlette's own refusals (no such path, method not allowed)."""
    return problem(exc.status_code, exc.detail, headers=exc.headers)


async def on_invalid(request: Request, exc: ValidationError) -> JSONResponse:
    """Answer a request that does not validate: every error with a pointer to its field.

    The offending values are not repeated: they are the caller's own and may be personal.
    """
    errors = [
        {
            "pointer": "/" + "/".join(str(part) for part in error["loc"]),
            "detail": error["msg"],
        }
        for error in exc.errors(include_url=False, include_context=False, include_input=False)
    ]
    return problem(422, "the request does not validate", errors=errors)


async def on_database_error(request: Request, exc: DBAPIError) -> JSONResponse:
    """Answer an error that the client's values caused; raise any other."""
    state = getattr(exc.orig, "sqlstate", None) or ""
    if state == _UNIQUE_VIOLATION:
        return problem(409, "a row with this name or address exists already")
    if state == _FOREIGN_KEY_VIOLATION:
        return problem(422, "an id in the request names a row that does not exist")
    if state == _CHECK_VIOLATION or state.startswith(_DATA_EXCEPTION_CLASS):
        return problem(422, "the request holds a value that the database does not admit")
    raise exc


HANDLERS: dict[Any, Any] = {
    ProblemError: on_problem,
    HTTPException: on_http_error,
    ValidationError: on_invalid,
    DBAPIError: on_database_error,
}
"""For Starlette's ``exception_handlers``."""
