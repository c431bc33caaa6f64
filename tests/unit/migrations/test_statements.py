"""A text of SQL is taken apart where PostgreSQL would."""

from __future__ import annotations

import pytest

from tenancy_orm.migrations.statements import keep_schema, statements

FUNCTION = "CREATE OR REPLACE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; SELECT 2; END"
PERIODS = "CREATE PROCEDURE p() BEGIN ATOMIC DELETE FROM t WHERE t.begin < t.end; SELECT 1 AS end; END"
NESTED = "/* a; /* b; */ c; */"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (";; -- only; a comment", []),
        ("SELECT 1", ["SELECT 1"]),
        ("SELECT 1; -- the end;", ["SELECT 1"]),
        ("a; b;", ["a", "b"]),
        ("-- x;\nSELECT 1", ["SELECT 1"]),
        (f"{NESTED} SELECT 1 {NESTED}; b", ["SELECT 1", "b"]),
        ("SELECT ';''; '; b", ["SELECT ';''; '", "b"]),
        (r"SELECT E'\'; '; b", [r"SELECT E'\'; '", "b"]),
        (r"SELECT '\'; b", [r"SELECT '\'", "b"]),
        ('SELECT "a;""b"; c', ['SELECT "a;""b"', "c"]),
        ("DO $$ begin a; b; end $$; c", ["DO $$ begin a; b; end $$", "c"]),
        ("DO $x$ a; $$ b; $$ $x$; c", ["DO $x$ a; $$ b; $$ $x$", "c"]),
        ("SELECT a$b$c; d$b$", ["SELECT a$b$c", "d$b$"]),
        ("SELECT $1; x", ["SELECT $1", "x"]),
        ("CREATE RULE r AS ON INSERT TO t DO (a; b); c", ["CREATE RULE r AS ON INSERT TO t DO (a; b)", "c"]),
        (f"{FUNCTION}; SELECT 3", [FUNCTION, "SELECT 3"]),
        (f"{PERIODS}; SELECT 3", [PERIODS, "SELECT 3"]),
        ("SELECT CASE WHEN a THEN b END; c", ["SELECT CASE WHEN a THEN b END", "c"]),
        ("BEGIN; a; END; b", ["BEGIN", "a", "END", "b"]),
        ("SELECT 'not ended; b", ["SELECT 'not ended", "b"]),
    ],
)
def test_semicolons_separate_statements(text: str, expected: list[str]) -> None:
    assert [text[found.start : found.end] for found in statements(text)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "BEGIN; start transaction; COMMIT AND CHAIN; end; ABORT; ROLLBACK; ROLLBACK WORK; PREPARE TRANSACTION 'x'",
            True,
        ),
        (
            "SAVEPOINT s; RELEASE s; ROLLBACK TO s; rollback work to savepoint s; PREPARE x AS SELECT 1; (SELECT 1)",
            False,
        ),
        (f"{FUNCTION}; SELECT 'COMMIT'; DO $$ begin commit; end $$", False),
    ],
)
def test_what_ends_a_transaction_is_known(text: str, expected: bool) -> None:
    assert {found.controls_transaction for found in statements(text)} == {expected}


def test_what_only_reads_is_known() -> None:
    reads = "SELECT 1; set x = 1; SHOW x; WITH a AS (SELECT 1) SELECT * FROM a; LOCK TABLE t; VALUES (1)"
    changes = "ALTER TABLE t ADD a int; INSERT INTO t VALUES (1); WITH a AS (DELETE FROM t RETURNING 1) TABLE a; DO ''"
    assert {found.changes for found in statements(reads)} == {False}
    assert {found.changes for found in statements(changes)} == {True}
    assert [found.reads_input for found in statements("COPY t FROM stdin; COPY t TO STDOUT; COPY t FROM 'stdin'")] == [
        True,
        False,
        False,
    ]


def test_commands_of_psql_are_known() -> None:
    text = r"\restrict abc" + "\n" + r"SELECT 1; SELECT E'\n', '\x', $$\y$$; SELECT 'x' \gexec"
    assert [found.psql_command for found in statements(text)] == [r"\restrict", None, r"\gexec"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("create schema App", "create schema IF NOT EXISTS App"),
        ('-- c\nCREATE SCHEMA "app";', '-- c\nCREATE SCHEMA IF NOT EXISTS "app";'),
        (
            "CREATE SCHEMA app AUTHORIZATION x; CREATE TABLE app.t()",
            "CREATE SCHEMA IF NOT EXISTS app AUTHORIZATION x; CREATE TABLE app.t()",
        ),
        ("CREATE SCHEMA IF NOT EXISTS app", "CREATE SCHEMA IF NOT EXISTS app"),
        ('CREATE SCHEMA other; CREATE SCHEMA "App"', 'CREATE SCHEMA other; CREATE SCHEMA "App"'),
        ("SELECT 'CREATE SCHEMA app'", "SELECT 'CREATE SCHEMA app'"),
        # PostgreSQL takes no IF NOT EXISTS here
        ("CREATE SCHEMA app CREATE TABLE t ()", "CREATE SCHEMA app CREATE TABLE t ()"),
    ],
)
def test_a_schema_that_exists_is_kept(text: str, expected: str) -> None:
    assert keep_schema(text, "app") == expected


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("CREATE INDEX CONCURRENTLY IF NOT EXISTS a ON t (a)", True),
        ("CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS a ON t (a) WHERE b", True),
        ("DROP INDEX CONCURRENTLY IF EXISTS a", True),
        ("ALTER TYPE app.kind ADD VALUE IF NOT EXISTS 'x'", True),
        ("REINDEX INDEX CONCURRENTLY a; VACUUM t; ANALYZE t; SET lock_timeout = '1s'; SHOW work_mem", True),
        ("-- nothing", True),
        # a name of its own each time, or an error that hides the first one
        ("CREATE INDEX CONCURRENTLY ON t (a)", False),
        ("CREATE INDEX CONCURRENTLY a ON t (a)", False),
        ("DROP INDEX a", False),
        ("ALTER INDEX IF EXISTS a RENAME TO b", False),
        ("ALTER TYPE kind ADD VALUE 'x'", False),
        ("ALTER TABLE IF EXISTS t ALTER a TYPE bigint USING a * 100", False),
        ("DROP TABLE IF EXISTS t", False),
        ("CREATE VIEW v AS SELECT 1 WHERE NOT EXISTS (SELECT FROM t)", False),
        ("CREATE TABLE IF NOT EXISTS t AS SELECT f()", False),
        ("SELECT f()", False),
        ("WITH a AS (SELECT f()) SELECT * FROM a", False),
        ("EXPLAIN ANALYZE UPDATE t SET a = a + 1", False),
        ("DO $$ BEGIN END $$", False),
        ("SET lock_timeout = '1s'; UPDATE t SET a = a + 1", False),
    ],
)
def test_what_may_be_done_twice(text: str, again: bool) -> None:
    """Where the connection was lost, nobody knows whether a statement was done."""
    assert all(statement.may_be_repeated for statement in statements(text)) is again
