"""Errors of PostgreSQL as text: one line, without rows, whatever the driver; no handler prints their own text."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError

import tenancy_orm
from tenancy_orm.errors import ProvisioningError
from tenancy_orm.postgres.errors import describe, sqlstate_of, without_detail

DETAIL = "Key (email)=(a@b.c) already exists."
PACKAGE = Path(tenancy_orm.__file__).parent

# What handlers catch by these names may be PostgreSQL's own. Of a lock that is not free it tells no row.
POSTGRES = re.compile(
    r"\b(asyncpg\.(?!LockNotAvailable)\w+|DBAPIError|SQLAlchemyError|SERVER_FAILURES|Exception|BaseException)\b(?!\.)"
)
# the errors of the functions that `tenancy run` calls are the application's, which it shows with their tracebacks
SHOWN = {"cli/call.py"}


def unique_violation() -> asyncpg.PostgresError:
    return asyncpg.PostgresError.new({"C": "23505", "M": 'duplicate key value violates "k"', "D": DETAIL})


class OfPsycopg(psycopg.errors.UniqueViolation):
    """As psycopg raises it: the text has DETAIL, the fields are apart."""

    diag: Any = SimpleNamespace(message_primary='duplicate key value violates "k"')


def test_no_drivers_detail_is_in_the_text() -> None:
    ours = unique_violation()
    theirs = OfPsycopg(f'duplicate key value violates "k"\nDETAIL:  {DETAIL}')
    assert DETAIL in str(ours)
    assert DETAIL in str(theirs)
    for error in (ours, IntegrityError("INSERT", {}, ours), IntegrityError("INSERT", {}, theirs)):
        assert (describe(error), sqlstate_of(error)) == (
            'duplicate key value violates "k" (SQLSTATE 23505)',
            "23505",
        )


def test_own_errors_come_as_they_are_and_others_with_their_class() -> None:
    assert describe(ProvisioningError("it is so", step="prepare")) == "it is so"
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert (describe(ValueError()), describe(TimeoutError())) == ("ValueError", "timed out")
    assert describe(DBAPIError("SELECT 'secret'", {}, ValueError("bad"))) == "DBAPIError: bad"


def test_a_traceback_that_is_logged_has_no_detail(caplog: pytest.LogCaptureFixture) -> None:
    outer = RuntimeError("outer")
    outer.__cause__ = IntegrityError("INSERT", {}, unique_violation())
    outer.__cause__.__cause__ = unique_violation()
    logger = logging.getLogger("test")
    logger.error("failed", exc_info=outer)
    assert DETAIL in caplog.text
    caplog.clear()
    logger.error("failed", exc_info=without_detail(outer))
    assert "duplicate key value" in caplog.text
    assert DETAIL not in caplog.text


@dataclass(frozen=True)
class FrozenError(Exception):
    """An error of an application that refuses to be changed."""

    text: str


def test_an_error_that_refuses_to_be_changed_is_left_as_it_is() -> None:
    """Wherever it is in the chain: what follows the log entry still happens."""
    detail = f"no\nDETAIL:  {DETAIL}"
    inner, frozen = unique_violation(), FrozenError(detail)
    assert without_detail(frozen) is frozen
    outer = RuntimeError("outer")
    outer.__cause__, outer.__context__ = FrozenError(detail), inner
    group = ExceptionGroup("some", [outer])
    assert without_detail(group) is group
    assert DETAIL not in str(inner)


def test_an_applications_explanation_is_kept() -> None:
    """PostgreSQL's own message is its cause; the text of a wrapper has neither statement nor parameters."""
    explained = RuntimeError("could not seed the roles")
    explained.__cause__ = unique_violation()
    assert describe(explained) == "RuntimeError: could not seed the roles"
    assert (
        describe(RuntimeError(f"failed: {unique_violation()}"))
        == 'RuntimeError: failed: duplicate key value violates "k"'
    )
    assert describe(StatementError("no value", "SELECT :a", {"a": "secret"}, None)) == "StatementError: no value"


def test_no_handler_prints_an_error_that_may_be_postgresqls() -> None:
    """It would print DETAIL. ``describe``, ``reason_of`` and ``without_detail`` do not."""
    planted = "try:\n    pass\nexcept asyncpg.PostgresError as exc:\n    raise ValueError(f'it failed: {exc}')\n"
    assert list(printed(ast.parse(planted))) == [4]
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    named = {name for tree in trees.values() for name in names_of_errors(tree) if not name.startswith("_")}
    assert "FAILURES" in named, "the tuple of a module, which others import"
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path, tree in trees.items()
        if str(path.relative_to(PACKAGE)) not in SHOWN
        for line in printed(tree, named)
    ]
    assert not found, found


def names_of_errors(tree: ast.Module) -> set[str]:
    """The names that a module gives to tuples of errors which may be PostgreSQL's."""
    return {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and POSTGRES.search(ast.unparse(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def printed(tree: ast.Module, names: Collection[str] = ()) -> Iterator[int]:
    """The lines on which a handler of PostgreSQL's errors uses the text of the error itself."""
    known = {*names, *names_of_errors(tree)}
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler) or not handler.name or handler.type is None:
            continue
        caught = ast.unparse(handler.type)
        if POSTGRES.search(caught) or known & set(re.findall(r"\w+", caught)):
            yield from (node.lineno for node in ast.walk(handler) if prints(node, handler.name))  # type: ignore[attr-defined]


def prints(node: ast.AST, name: str) -> bool:
    """Whether a node is the error as text: in an f-string, ``str(exc)``, or an argument of a log entry."""

    def is_error(one: ast.expr) -> bool:
        return isinstance(one, ast.Name) and one.id == name

    match node:
        case ast.FormattedValue(value=value):
            return is_error(value)
        case ast.Call(func=ast.Name(id="str"), args=[value]):
            return is_error(value)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=method), args=args, keywords=keywords):
            shown = [one.value for one in keywords if one.arg == "exc_info"]
            return any(map(is_error, [*args, *shown])) or (method == "exception" and not shown)
    return False
