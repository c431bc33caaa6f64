"""Which statements a text of SQL holds: as much of PostgreSQL's lexical rules as that takes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..postgres.quoting import quote_identifier

# Letters of any script may be part of a name. The parts are tried in this order.
_TOKEN = re.compile(
    r"""
      (?P<space> \s+ | --[^\n]* )
    | (?P<comment> /\* )
    | (?P<string> [eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*" )
    | (?P<word> [^\W\d][\w$]* )
    | (?P<dollar> \$(?:[^\W\d]\w*)?\$ )
    | (?P<other> \d[\w.]* | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_END = re.compile(r"/\*|\*/")

_SHORT = 2_000

_ENDS_TRANSACTION = frozenset({"BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT"})
# these change nothing that a failure leaves behind
_READS = frozenset(
    {"SELECT", "VALUES", "TABLE", "SHOW", "EXPLAIN", "SET", "RESET", "LOCK", "SAVEPOINT", "RELEASE", "ROLLBACK"}
)
_WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE"})
# these do again what they have done
_REPEATABLE = frozenset(
    {"SET", "RESET", "SHOW", "LOCK", "SAVEPOINT", "RELEASE", "VACUUM", "ANALYZE", "ANALYSE", "REINDEX", "REFRESH"}
)
_INDEX_OPTIONS = frozenset({"UNIQUE", "CONCURRENTLY"})
# these may do anything
_RUNS_CODE = frozenset({"COPY", "DO", "CALL"})

_CREATE_SCHEMA = re.compile(
    r"""CREATE\s+SCHEMA\s+(?P<name>"(?:[^"]|"")+"|[^\W\d][\w$]*)(?:\s+AUTHORIZATION\s+\S+)?\s*;?\s*\Z""",
    re.IGNORECASE,
)


@dataclass(slots=True)
class Statement:
    """One statement: its text from ``start`` to ``end``, without comments before it, and its words in capitals.

    ``words`` leaves out what is quoted. ``psql_command`` is one of psql in it, with the backslash that SQL lacks.
    """

    start: int
    end: int
    words: list[str] = field(default_factory=list)
    psql_command: str | None = None

    @property
    def controls_transaction(self) -> bool:
        """Whether it begins or ends a transaction; a savepoint is no transaction."""
        words = [word for word in self.words[:3] if word not in ("WORK", "TRANSACTION")]
        if words[:1] == ["ROLLBACK"]:
            return words[1:2] != ["TO"]
        return words[:1] != [] and (words[0] in _ENDS_TRANSACTION or self.words[:2] == ["PREPARE", "TRANSACTION"])

    @property
    def reads_input(self) -> bool:
        """Whether it is a COPY that reads rows from the client."""
        return self.words[:1] == ["COPY"] and "STDIN" in self.words

    @property
    def changes(self) -> bool:
        """Whether it may change data or a schema."""
        if self.words[:1] == ["WITH"]:
            return self.writes_rows
        return self.words[:1] != [] and self.words[0] not in _READS

    @property
    def writes_rows(self) -> bool:
        """Whether it may change rows: a repetition of it need not fail, as that of a CREATE would."""
        if self.words[:1] == ["WITH"]:
            return not _WRITES.isdisjoint(self.words)
        return self.words[:1] != [] and self.words[0] in _WRITES | _RUNS_CODE

    @property
    def may_be_repeated(self) -> bool:
        """Whether a repetition does no harm where nobody knows whether it was done. A function may do anything.

        Besides what has no lasting effect, these are statements on one index, and a value for an enum, that say IF
        EXISTS or IF NOT EXISTS. An index that is not finished is dropped before.
        """
        words = self.words
        if words[:1] == [] or words[0] in _REPEATABLE:
            return True
        if words[:2] == ["ALTER", "TYPE"]:
            return " ADD VALUE IF NOT EXISTS" in " ".join(words[:10])
        words = [word for word in words[:7] if word not in _INDEX_OPTIONS]
        return words[:5] == ["CREATE", "INDEX", "IF", "NOT", "EXISTS"] or words[:4] == ["DROP", "INDEX", "IF", "EXISTS"]


def statements(text: str) -> tuple[Statement, ...]:
    """Return the statements of ``text``, which semicolons separate. Comments alone are none."""
    # every tenant of a fleet gets the same texts, and some are large
    return (_remembered if len(text) <= _SHORT else _remembered_large)(text)


def _find_statements(text: str) -> tuple[Statement, ...]:
    found: list[Statement] = []
    current: Statement | None = None
    parentheses = blocks = 0
    part = ""
    for kind, start, end in tokens(text):
        before, part = part, text[start:end]
        if part == ";" and not parentheses and not blocks:
            current = None
            continue
        if current is None:
            current = Statement(start, end)
            found.append(current)
        current.end = end
        if before == "\\" and current.psql_command is None:
            current.psql_command = f"\\{part}"
        if part == "(":
            parentheses += 1
        elif part == ")":
            parentheses = max(0, parentheses - 1)
        elif kind == "word":
            word = part.upper()
            current.words.append(word)
            # the body of a function may be statements between BEGIN ATOMIC and END; CASE has an END as well; columns
            # can have these names
            if before == "." or before.upper() == "AS":
                continue
            if word == "END":
                blocks = max(0, blocks - 1)
            elif (word == "ATOMIC" and _begins_body(current.words)) or (word == "CASE" and blocks):
                blocks += 1
    return tuple(found)


_remembered = functools.lru_cache(maxsize=256)(_find_statements)
_remembered_large = functools.lru_cache(maxsize=8)(_find_statements)


def _begins_body(words: list[str]) -> bool:
    kind = words[3:4] if words[1:3] == ["OR", "REPLACE"] else words[1:2]
    return words[:1] == ["CREATE"] and kind in (["FUNCTION"], ["PROCEDURE"]) and words[-2:] == ["BEGIN", "ATOMIC"]


def tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the kind, the start and the end of each token, without spaces and comments."""
    position = 0
    while match := _TOKEN.match(text, position):
        start, position = match.span()
        kind = match.lastgroup or ""
        if kind == "comment":
            position = _end_of_comment(text, position)
        elif kind == "dollar":
            end = text.find(match[0], position)
            position = len(text) if end < 0 else end + len(match[0])
            yield kind, start, position
        elif kind != "space":
            yield kind, start, position


def _end_of_comment(text: str, position: int) -> int:
    """Comments nest."""
    depth = 1
    for match in _COMMENT_END.finditer(text, position):
        depth += 1 if match[0] == "/*" else -1
        if not depth:
            return match.end()
    return len(text)


def keep_schema(text: str, schema: str) -> str:
    """Return ``text`` with IF NOT EXISTS in a CREATE SCHEMA of ``schema``: the version table is in that one already."""
    for statement in reversed(statements(text)):
        sql = text[statement.start : statement.end]
        if (match := _CREATE_SCHEMA.match(sql)) and _same_name(match["name"], schema):
            # the name begins where it does in the text
            name = statement.start + match.start("name")
            text = f"{text[:name]}IF NOT EXISTS {text[name:]}"
    return text


def _same_name(written: str, name: str) -> bool:
    return written == quote_identifier(name) or (not written.startswith('"') and written.lower() == name)
