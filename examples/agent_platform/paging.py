"""Keyset pages: each page costs the same, however deep, and new rows do not shift the next page."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Select, tuple_

from .problems import ProblemError

_MOMENT = TypeAdapter(datetime)


def encode_cursor(row: Any) -> str:
    """Return the opaque cursor of the page that begins after ``row``."""
    text = f"{row.created_at.isoformat()} {row.id}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_cursor(cursor: str, key: TypeAdapter[Any]) -> tuple[datetime, Any]:
    """Return the creation time and the ``key`` of the row that a cursor names.

    Raises:
        ProblemError: 422, it is not a cursor that ``encode_cursor`` made.
    """
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        moment, _, identity = text.partition(" ")
        created_at = _MOMENT.validate_strings(moment)
        if created_at.tzinfo is None:
            raise ValueError("a cursor's time has a zone")
        return created_at, key.validate_strings(identity)
    except (binascii.Error, ValueError, ValidationError):
        raise ProblemError(422, "after: not a cursor of this list") from None


def page(statement: Select[Any], model: Any, *, limit: int, after: tuple[datetime, Any] | None) -> Select[Any]:
    """Return ``statement`` for one page, newest first, plus one row that shows whether more follow."""
    columns = (model.created_at, model.id)
    if after is not None:
        statement = statement.where(tuple_(*columns) < tuple_(*after))
    return statement.order_by(*(column.desc() for column in columns)).limit(limit + 1)
