"""What PostgreSQL needs to keep a session read-only, whichever driver has opened its connection."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from ..errors import ReadOnlyError

MODE: Final = "default_transaction_read_only"
"""PostgreSQL's setting for the transactions that begin without saying whether they may write."""

SET_MODE: Final = {"on": f"SET {MODE} TO on", "off": f"SET {MODE} TO off"}
"""What sets it, by value."""

FIX_SNAPSHOT: Final = "SELECT"
"""A query as the first of a read-only transaction: after it PostgreSQL refuses to make the transaction writable."""

# Where a comment has another within it, no keyword is found, and the statement counts as none that is known.
_SKIP = r"(?:[ \t\n\r\f\v]|--[^\n\r]*(?:[\n\r]|\Z)|/\*(?:[^*/]|\*(?!/)|/(?!\*))*\*/)"

_PLAIN = re.compile(
    rf"{_SKIP}*(?:\({_SKIP}*)*(?:SELECT|WITH|VALUES|TABLE|INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE | re.ASCII
)
_KEYWORD = re.compile(rf"{_SKIP}*[A-Z(]", re.IGNORECASE | re.ASCII)
_CONTROL = re.compile(
    rf"{_SKIP}*(?:(?:BEGIN|START|COMMIT|END|ABORT)\b|PREPARE{_SKIP}+TRANSACTION\b"
    rf"|ROLLBACK\b(?!(?:{_SKIP}+(?:WORK|TRANSACTION))?{_SKIP}+TO\b))",
    re.IGNORECASE | re.ASCII,
)


# what is no code: strings, quoted names and comments
_OPAQUE = re.compile(
    r"""[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|"(?:[^"]|"")*"|\$((?:[A-Za-z_]\w*)?)\$.*?\$\1\$"""
    r"""|--[^\n\r]*|/\*.*?\*/""",
    re.DOTALL,
)
_FIRST = re.compile(r"[\s(]*([A-Z]+)", re.IGNORECASE)
_WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "TRUNCATE"})
_CHANGES = frozenset({"ALTER", "COMMENT", "CREATE", "DROP", "GRANT", "REVOKE"})
_WRITES_WITHIN = re.compile(r"[()]\s*(?:INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE)
_LOCKS = re.compile(r"\bFOR\s+(?:(?:NO\s+KEY\s+)?UPDATE|(?:KEY\s+)?SHARE)\b", re.IGNORECASE)


@lru_cache(maxsize=1_000)
def what_it_does(statement: str) -> str | None:
    """Return what a text does that no replica does: it "writes", "locks rows" or "changes the schema".

    None where that is not seen: a function may do it.
    """
    code = _OPAQUE.sub(" ", statement)
    found = _FIRST.match(code)
    first = "" if found is None else found[1].upper()
    if first in _CHANGES:
        return "changes the schema"
    if first in _WRITES or (first == "WITH" and _WRITES_WITHIN.search(code)):
        return "writes"
    return "locks rows" if _LOCKS.search(code) else None


def is_plain(statement: str) -> bool:
    """Whether a statement is one that PostgreSQL plans: a query, INSERT, UPDATE, DELETE or MERGE.

    None of these can end its transaction, as procedures and DO can.
    """
    return _PLAIN.match(statement) is not None


def controls_transaction(statement: str) -> bool:
    """Whether a statement begins or ends a transaction, as far as is known; not where it concerns a savepoint."""
    return _CONTROL.match(statement) is not None or _KEYWORD.match(statement) is None


def control_refused(slug: str) -> ReadOnlyError:
    """The error for a statement of a read-only session that begins or ends a transaction."""
    return ReadOnlyError(
        f"tenant {slug!r}: a read-only session begins and ends its transactions itself; use session.commit() or "
        "session.rollback(), or a session that may write"
    )


def mode_not_kept() -> ReadOnlyError:
    """The error for what a read-only session does on the driver's connection, where only a transaction is read-only."""
    return ReadOnlyError(
        "behind a connection pooler only a transaction is read-only, and this is outside one; begin one first: "
        "async with connection.transaction(), or use the session's own methods"
    )


__all__ = [
    "FIX_SNAPSHOT",
    "MODE",
    "SET_MODE",
    "control_refused",
    "controls_transaction",
    "is_plain",
    "mode_not_kept",
    "what_it_does",
]
