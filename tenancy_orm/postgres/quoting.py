"""Quoting of identifiers and constants, for statements that take no parameters."""

from __future__ import annotations

MAX_IDENTIFIER_BYTES = 63  # NAMEDATALEN - 1; PostgreSQL truncates longer ones silently


def quote_identifier(name: str) -> str:
    """Quote ``name`` for use as an SQL identifier.

    Raises:
        ValueError: it is empty, contains NUL, or is longer than 63 bytes.
    """
    if not name or "\x00" in name or len(name.encode()) > MAX_IDENTIFIER_BYTES:
        raise ValueError("an identifier must be 1 to 63 bytes without NUL")
    return '"' + name.replace('"', '""') + '"'


def quote_qualified(*parts: str | None) -> str:
    """Quote the parts of a qualified name, as schema and table, joined by full stops; None is left out.

    Raises:
        ValueError: as ``quote_identifier``.
    """
    return ".".join(quote_identifier(part) for part in parts if part is not None)


def quote_pattern(name: str) -> str:
    """Quote ``name`` as one of psql's patterns, which match it alone: for the options of ``pg_dump``."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Quote ``text`` as an SQL string constant, for the statements (DDL) that take no parameters.

    In the E'' form backslashes mean the same whatever ``standard_conforming_strings`` is.
    """
    if "\x00" in text:
        raise ValueError("a string constant cannot contain NUL")
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
