"""What is seen of a text without PostgreSQL: whether it writes, locks or changes the schema."""

from __future__ import annotations

import pytest

from tenancy_orm.routing.reading import what_it_does


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("SELECT 1", None),
        ("  (SELECT 1) UNION (SELECT 2)", None),
        ("VALUES (1)", None),
        ("TABLE notes", None),
        ("SELECT 'INSERT', ' FOR UPDATE', E'\\' FOR SHARE' FROM notes", None),
        ('SELECT "for update" FROM notes -- FOR UPDATE', None),
        ("SELECT $$ FOR UPDATE $$, $q$ FOR SHARE $q$, $1", None),
        ("WITH a AS (SELECT 'x' AS insert) SELECT * FROM a", None),
        ("SELECT update FROM notes", None),
        ("insert INTO notes DEFAULT VALUES", "writes"),
        ("/* SELECT */ -- SELECT\n DELETE FROM notes", "writes"),
        ("WITH a AS (UPDATE notes SET body = 'x' RETURNING 1) SELECT * FROM a", "writes"),
        ("WITH a AS (SELECT 1) MERGE INTO notes USING a ON true WHEN MATCHED THEN DELETE", "writes"),
        ("TRUNCATE notes", "writes"),
        ("CREATE TABLE a (n integer)", "changes the schema"),
        ("SELECT * FROM notes FOR UPDATE SKIP LOCKED", "locks rows"),
        ("SELECT * FROM notes FOR\nNO KEY UPDATE", "locks rows"),
        ("SELECT * FROM (SELECT * FROM notes FOR KEY SHARE) a", "locks rows"),
    ],
)
def test_a_text_is_read_by_its_keywords_alone(statement: str, what: str | None) -> None:
    assert what_it_does(statement) == what
