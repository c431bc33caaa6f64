"""Errors are reported in one line, without tenants' data."""

from __future__ import annotations

import asyncpg
from alembic.util.exc import CommandError
from sqlalchemy.exc import DBAPIError

from tenancy_orm.errors import MigrationError
from tenancy_orm.migrations.failures import describe
from tenancy_orm.postgres.errors import sqlstate_of


def unique_violation() -> asyncpg.UniqueViolationError:
    fields = {"C": "23505", "M": 'duplicate key\nvalue violates "k"', "D": "Key (email)=(a@b.c) already exists."}
    error: asyncpg.UniqueViolationError = asyncpg.PostgresError.new(fields)
    return error


def test_postgres_errors_have_message_and_sqlstate_and_no_detail() -> None:
    error = unique_violation()
    assert "a@b.c" in str(error)
    assert describe(error) == 'duplicate key value violates "k" (SQLSTATE 23505)'


def test_wrappers_are_looked_through() -> None:
    wrapped = DBAPIError("INSERT INTO t VALUES ('secret')", {"p": "secret"}, unique_violation())
    outer = RuntimeError("outer")
    outer.__cause__ = wrapped
    assert sqlstate_of(outer) == "23505"
    assert describe(wrapped) == 'duplicate key value violates "k" (SQLSTATE 23505)'


def test_a_cycle_of_causes_ends() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert sqlstate_of(first) is None


def test_other_drivers_errors_come_without_statement_and_parameters() -> None:
    assert describe(DBAPIError("SELECT 'secret'", {}, ValueError("bad"))) == "DBAPIError: bad"


def test_other_errors_are_named() -> None:
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert describe(MigrationError("it is so")) == "it is so"
    assert describe(CommandError("no such\nrevision")) == "no such revision"
    assert describe(TimeoutError()) == "timed out"


def test_a_value_in_a_message_is_left_out() -> None:
    fields = {"C": "22P02", "M": 'invalid input syntax for type integer: "a "secret""'}
    assert describe(asyncpg.PostgresError.new(fields)) == (
        'invalid input syntax for type integer: "..." (SQLSTATE 22P02)'
    )
