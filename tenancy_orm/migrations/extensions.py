"""PostgreSQL extensions in migrations: those of the setting ``extensions``, and statements on extensions in revisions.

Revisions run as the owner of the tables, who may create trusted extensions only. The administrator installs those of
the setting. A revision of an existing project may still say ``CREATE EXTENSION vector``: that does nothing where the
extension is there.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import DBAPIError

from ..postgres.errors import FEATURE_NOT_SUPPORTED, INSUFFICIENT_PRIVILEGE, UNDEFINED_FILE, sqlstate_of
from .statements import statements


@dataclass(frozen=True, slots=True)
class WantedExtensions:
    """The extensions that a tenant's database should have; ``install`` installs some of them, as administrator."""

    names: tuple[str, ...]
    install: Callable[[Sequence[str]], Awaitable[None]] = field(repr=False)

    def missing(self, installed: Collection[str]) -> tuple[str, ...]:
        """Those that are not ``installed``, in the order of the setting."""
        return tuple(name for name in self.names if name not in installed)


# --- statements in revisions ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreateExtension:
    """A CREATE EXTENSION statement: the extension's name, and the offset of it in the text."""

    name: str
    if_not_exists: bool
    offset: int


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    offset: int

    @property
    def keyword(self) -> str:
        """The word in upper case; empty for what is quoted."""
        return self.text.upper() if self.kind == "word" else ""

    @property
    def identifier(self) -> str | None:
        """The name that PostgreSQL reads, or None."""
        if self.kind == "word":
            return self.text.lower()
        return self.text[1:-1].replace('""', '"') if self.kind == "quoted" else None


_TOKEN = re.compile(
    r"""(?P<space>\s+|--[^\n\r]*)
    |(?P<comment>/\*)
    |(?P<word>[A-Za-z_\u0080-\U0010ffff][\w$]*)
    |(?P<quoted>"(?:[^"]|"")+")
    |(?P<string>'(?:[^'\\]|'')*')
    |(?P<end>;)""",
    re.VERBOSE,
)
_COMMENT = re.compile(r"/\*|\*/")


def parse_create_extension(statement: str) -> CreateExtension | None:
    """Read a statement that is one CREATE EXTENSION and nothing else; None for any other text."""
    tokens = _tokens(statement)
    if tokens is None:
        return None
    while tokens and tokens[-1].kind == "end":
        tokens.pop()
    words = [token.keyword for token in tokens]
    if words[:2] != ["CREATE", "EXTENSION"]:
        return None
    if_not_exists = words[2:5] == ["IF", "NOT", "EXISTS"]
    rest = tokens[5 if if_not_exists else 2 :]
    if not rest or (name := rest[0].identifier) is None or not _are_options(rest[1:]):
        return None
    return CreateExtension(name, if_not_exists, rest[0].offset)


def skip_existing_extension(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    """Add IF NOT EXISTS to each CREATE EXTENSION, before SQLAlchemy executes it (``before_cursor_execute``).

    PostgreSQL then neither fails nor asks for rights where the extension exists.
    """
    for start, found in reversed(_created(statement)):
        if not found.if_not_exists:
            name = start + found.offset
            statement = f"{statement[:name]}IF NOT EXISTS {statement[name:]}"
    return statement, parameters


def _created(text: str) -> list[tuple[int, CreateExtension]]:
    """The CREATE EXTENSION statements of a text, and where each begins."""
    if "EXTENSION" not in text.upper():
        return []
    found = ((part.start, parse_create_extension(text[part.start : part.end])) for part in statements(text))
    return [(start, created) for start, created in found if created is not None]


def hint(error: BaseException) -> str:
    """Return the remedy for a statement on an extension that PostgreSQL refused; empty for other errors."""
    failed = _failed_statement(error)
    state = sqlstate_of(error)
    if failed is None or state not in (INSUFFICIENT_PRIVILEGE, FEATURE_NOT_SUPPORTED, UNDEFINED_FILE):
        return ""
    created = next((found for _, found in _created(failed) if _is_about(error, failed, found.name)), None)
    if created is None:
        if state == INSUFFICIENT_PRIVILEGE and _concerns_extension(failed):
            return (
                "; the extension belongs to the administrator, who installed it by the setting extensions: "
                "leave this statement out of the revision"
            )
        return ""
    if state == INSUFFICIENT_PRIVILEGE:
        return (
            f"; revisions run as the owner of the tables, who may not create this extension: add {created.name!r} to "
            "the setting extensions, and the administrator installs it before the revisions run"
        )
    return f"; the server does not have extension {created.name!r}: install its package there"


def _is_about(error: BaseException, failed: str, extension: str) -> bool:
    """Whether the error is about this one: a script may have others, and other statements."""
    return len(statements(failed)) == 1 or f'"{extension}"' in str(error)


def _failed_statement(error: BaseException) -> str | None:
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, DBAPIError):
            return found.statement
        found = found.__cause__
    return None


def _concerns_extension(statement: str) -> bool:
    words = [token.keyword for token in _tokens(statement) or ()]
    return words[:2] in (["DROP", "EXTENSION"], ["ALTER", "EXTENSION"]) or words[:3] == ["COMMENT", "ON", "EXTENSION"]


def _are_options(tokens: Sequence[_Token]) -> bool:
    """Whether these are ``[WITH] [SCHEMA name] [VERSION version] [CASCADE]``, in any order."""
    remaining = iter(tokens[1:] if tokens and tokens[0].keyword == "WITH" else tokens)
    for token in remaining:
        if token.keyword == "CASCADE":
            continue
        if token.keyword not in ("SCHEMA", "VERSION"):
            return False
        value = next(remaining, None)
        if value is None or (value.identifier is None and (token.keyword, value.kind) != ("VERSION", "string")):
            return False
    return True


def _tokens(statement: str) -> list[_Token] | None:
    """The tokens without blanks and comments; None if there is one that no such statement has."""
    return list(found) if None not in (found := list(_scan(statement))) else None  # type: ignore[arg-type]


def _scan(statement: str) -> Iterator[_Token | None]:
    offset = 0
    while offset < len(statement):
        match = _TOKEN.match(statement, offset)
        if match is None or match.lastgroup is None:
            yield None
            return
        if match.lastgroup == "comment":
            end = _end_of_comment(statement, offset)
            if end is None:
                yield None
                return
            offset = end
            continue
        if match.lastgroup != "space":
            yield _Token(match.lastgroup, match.group(), offset)
        offset = match.end()


def _end_of_comment(statement: str, offset: int) -> int | None:
    """The offset after a block comment, which may have others in it."""
    depth = 0
    for mark in _COMMENT.finditer(statement, offset):
        depth += 1 if mark.group() == "/*" else -1
        if depth == 0:
            return mark.end()
    return None
