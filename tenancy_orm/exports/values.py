"""How values are written: the SQL by which PostgreSQL writes each column of a row, and reads a large value in pieces.

PostgreSQL writes the rows itself, as JSON or as text for CSV, so that no digit is lost on the way and nothing is
converted in Python. A value that is larger than the bound is left out of its row, which names a file in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..postgres.quoting import quote_identifier, quote_literal
from .catalogue import Column, Type

ExportFormat = Literal["jsonl", "csv"]

SETTINGS = {
    "search_path": "pg_catalog, pg_temp",
    # what a policy would hide is an error, and never left out
    "row_security": "off",
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "iso_8601",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "xmlbinary": "base64",
    # an export is not urgent, and one core of the server is enough
    "max_parallel_workers_per_gather": "0",
}
"""The settings of the transaction, on which the text of values depends."""

_EXACT = frozenset({"numeric", "money"})
_JSON = frozenset({"json", "jsonb"})
_TIMES = frozenset({"date", "timestamp", "timestamptz", "time", "timetz"})
# how much smaller than its text a compressed value can be stored: lz4 255 times, and JSON may escape each byte by six
_COMPRESSION = 2_048


@dataclass(frozen=True, slots=True)
class Value:
    """How one column is written.

    Attributes:
        column: The column.
        select: The SQL of its value in a row.
        encoding: The same for people.
        large: The SQL condition that the value is larger than the bound; None where it cannot be.
        size: The SQL of its size in bytes.
        content: The SQL of its content as bytea, for a file.
        extension: The extension of such a file.
        directory: Where such files are, in the archive.
    """

    column: Column
    select: str
    encoding: str
    large: str | None = None
    size: str = ""
    content: str = ""
    extension: str = ""
    directory: str = ""


def value_of(
    column: Column, types: Mapping[int, Type], *, row_format: ExportFormat, bound: int, directory: str, key: str
) -> Value:
    """Return how a column is written.

    Args:
        column: The column.
        types: The types by number.
        row_format: What the rows are.
        bound: From how many bytes on a value is a file.
        directory: Where such files are, in the archive.
        key: The SQL of the part of a file's name that tells its row.
    """
    name = quote_identifier(column.name)
    base = _base(types[column.type_oid], types)
    json, encoding = _json_of(name, base, types)
    plain = json if row_format == "jsonl" else _text_of(name, base, types, json)
    if base.length != -1 or base.name in _EXACT:
        return Value(column, f"{plain} AS {name}", encoding)
    size, content, extension = _content_of(name, base, json)
    large = f"{size} > {bound}"
    if base.name not in ("bytea", "text", "varchar"):
        # these sizes are known only once the value has been written
        large = f"(pg_catalog.pg_column_size({name}) > {max(bound // _COMPRESSION, 1)} AND {large})"
    path = f"{quote_literal(directory + '/')} || {key} || {quote_literal(extension)}"
    if row_format == "jsonl":
        reference = f"pg_catalog.json_build_object('$file', {path}, 'bytes', {size})"
        whole = f"CASE WHEN {large} THEN {reference} ELSE pg_catalog.to_json({plain}) END"
    else:
        whole = f"CASE WHEN {large} THEN '$file:' || {path} ELSE {plain} END"
    return Value(column, f"{whole} AS {name}", encoding, large, size, content, extension, directory)


def _base(kind: Type, types: Mapping[int, Type]) -> Type:
    while kind.kind == "d":
        kind = types[kind.base]
    return kind


def _is_builtin(kind: Type, names: frozenset[str]) -> bool:
    return kind.schema == "pg_catalog" and kind.name in names


def _json_of(name: str, base: Type, types: Mapping[int, Type]) -> tuple[str, str]:
    """The SQL of a value that ``to_json`` writes, and in words what comes out."""
    if _is_builtin(base, _EXACT):
        return (
            f"{name}::pg_catalog.numeric::pg_catalog.text",
            "text: a decimal number with all digits, or NaN, Infinity",
        )
    if base.is_array:
        element = _base(types[base.element], types)
        if _is_builtin(element, _EXACT):
            # money as a number first: its own text is that of a locale
            exact = f"{name}::pg_catalog.numeric[]" if element.name == "money" else name
            return f"{exact}::pg_catalog.text[]", "an array of texts, each a decimal number with all digits"
        return name, "an array"
    if base.kind == "c":
        return name, "an object with a member for each field"
    if _is_builtin(base, _JSON):
        return name, "the JSON value itself"
    if _is_builtin(base, frozenset({"bytea"})):
        return name, "text: \\x and two hexadecimal digits for each byte"
    if _is_builtin(base, frozenset({"bool"})):
        return name, "true or false"
    if _is_builtin(base, frozenset({"int2", "int4", "int8"})):
        return name, "a whole number"
    if _is_builtin(base, frozenset({"float4", "float8"})):
        return name, "a number, or the text NaN, Infinity or -Infinity"
    if _is_builtin(base, _TIMES):
        return (
            name,
            "text: ISO 8601, a time with zone in UTC; or infinity, -infinity; before the year 1 it ends with BC",
        )
    if _is_builtin(base, frozenset({"interval"})):
        return name, "text: ISO 8601 duration"
    if base.kind in "rm":
        return name, "text: a range as PostgreSQL writes it, [ and ] include a bound, ( and ) exclude it"
    if base.kind == "e":
        return name, "text: one of the enum's labels"
    if base.category == "S":
        return name, "text"
    return name, "as PostgreSQL converts this type to JSON: text, unless the type says otherwise"


def _text_of(name: str, base: Type, types: Mapping[int, Type], json: str) -> str:
    """The SQL of a value as the text of a CSV field."""
    if base.is_array or base.kind == "c":
        return f"pg_catalog.to_json({json})::pg_catalog.text"
    if _is_builtin(base, _TIMES):
        return f"pg_catalog.to_json({name}) #>> '{{}}'"
    if _is_builtin(base, _EXACT):
        return json
    return f"{name}::pg_catalog.text"


def _content_of(name: str, base: Type, json: str) -> tuple[str, str, str]:
    """The SQL of a large value's size and content, and the extension of its file."""
    if _is_builtin(base, frozenset({"bytea"})):
        return f"pg_catalog.octet_length({name})", f"{name}::pg_catalog.bytea", ".bin"
    if _is_builtin(base, _JSON):
        text, extension = f"{name}::pg_catalog.text", ".json"
    elif base.category == "S" or _is_builtin(base, frozenset({"xml"})):
        text, extension = f"{name}::pg_catalog.text", ".txt"
    else:
        text, extension = f"pg_catalog.to_json({json})::pg_catalog.text", ".json"
    return f"pg_catalog.octet_length({text})", f"pg_catalog.convert_to({text}, 'UTF8')", extension


__all__ = ["SETTINGS", "ExportFormat", "Value", "value_of"]
