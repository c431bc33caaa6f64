"""Values of PostgreSQL in the output of ``tenancy sql``: typed in JSON, text in tables and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg

_JSON = frozenset({114, 3802})  # the types json and jsonb, which the driver gives as text
_JSON_ARRAYS = frozenset({199, 3807})
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets calculate


def plain(value: Any, type_oid: int = 0) -> Any:
    """Return a value as JSON has it.

    A numeric is a number where that is exact, and else text, as are ``NaN`` and the infinities. A bytea is PostgreSQL's
    hexadecimal text, an interval ISO 8601, a moment ISO 8601 with its offset.
    """
    if type_oid in _JSON and isinstance(value, str):
        return json.loads(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_mapping"):
        inner = 114 if type_oid in _JSON_ARRAYS else 0
        return [plain(one, inner) for one in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Decimal):
        return _number(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "\\x" + bytes(value).hex()
    if isinstance(value, timedelta):
        return _duration(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, asyncpg.Range):
        return _range(value)
    if isinstance(value, asyncpg.BitString):
        return value.as_string().replace(" ", "")
    if hasattr(value, "keys"):  # a composite value
        return {name: plain(value[name]) for name in value.keys()}  # noqa: SIM118 - it is no mapping
    return str(value)


def shown(value: Any, type_oid: int = 0) -> Any:
    """Return a value as text for a table or CSV, and None as it is."""
    found = plain(value, type_oid)
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(found, bool):
        return "true" if found else "false"
    if isinstance(found, (list, dict)) or (type_oid in _JSON and found is not None):
        return json.dumps(found, ensure_ascii=False)
    return found


def csv_lines(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yield lines of CSV (RFC 4180). NULL is an empty field.

    A text that a spreadsheet would calculate gets an apostrophe first: a tenant may have written it.
    """
    buffer = io.StringIO()
    # with both in the line's end, both are quoted in a field
    writer = csv.writer(buffer, lineterminator="\r\n")
    for row in (header, *rows):
        writer.writerow([_harmless(value) for value in row])
        yield buffer.getvalue().removesuffix("\r\n") + "\n"
        buffer.seek(0)
        buffer.truncate()


def distinct(columns: Iterable[str]) -> list[str]:
    """Return the columns' names, a repeated one with a number: PostgreSQL lets several have one name."""
    names: list[str] = []
    for column in columns:
        name, number = column, 1
        while name in names:
            number += 1
            name = f"{column}_{number}"
        names.append(name)
    return names


def parameter(text: str) -> Any:
    """Read a parameter's value: a number, true, false and null as in JSON, anything else as text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if found is None or isinstance(found, (bool, int, float)) else text


def _number(value: Decimal) -> int | float | str:
    if not value.is_finite():
        return str(value)
    if value == value.to_integral_value() and abs(value) < 2**53:
        return int(value)
    nearest = float(value)
    return nearest if math.isfinite(nearest) and Decimal(repr(nearest)) == value else str(value)


def _range(value: Any) -> str:
    """As PostgreSQL writes it."""
    if value.isempty:
        return "empty"
    ends = ("" if end is None else str(plain(end)) for end in (value.lower, value.upper))
    return f"{'[' if value.lower_inc else '('}{','.join(ends)}{']' if value.upper_inc else ')'}"


def _duration(value: timedelta) -> str:
    if value < timedelta(0):
        return "-" + _duration(-value)
    seconds = f"{value.seconds + value.microseconds / 1_000_000:.6f}".rstrip("0").rstrip(".")
    return f"P{value.days}DT{seconds}S" if value.days else f"PT{seconds}S"


def _harmless(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_FORMULAS):
        try:
            float(value)  # a negative number
        except ValueError:
            return f"'{value}"
    return value
