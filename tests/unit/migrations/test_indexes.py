"""The indexes that a text of SQL creates."""

from __future__ import annotations

import pytest

from tenancy_orm.migrations.indexes import indexes_created


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CREATE INDEX ix ON notes (body)", [("ix", "notes")]),
        ("create unique index concurrently if not exists IX on only App.Notes (body)", [("ix", "App.Notes")]),
        ('CREATE INDEX /* new */ "Odd ""name" -- here\n ON "a b"."c" (x); SELECT 1', [('Odd "name', '"a b"."c"')]),
        ("CREATE INDEX ON notes (body)", []),
        ("CREATE TABLE index (ix int)", []),
        ("DROP INDEX ix", []),
        ("ALTER INDEX ix RENAME TO iy", []),
        ("ALTER TABLE ONLY notes ADD CONSTRAINT u UNIQUE (body), ADD CONSTRAINT p PRIMARY KEY (id)",
         [("u", "notes"), ("p", "notes")]),
        ("ALTER TABLE IF EXISTS notes ADD CONSTRAINT e EXCLUDE USING gist (c WITH &&)", [("e", "notes")]),
        ("ALTER TABLE notes ADD CONSTRAINT u UNIQUE USING INDEX ix", []),
        ("ALTER TABLE notes ADD CONSTRAINT f FOREIGN KEY (a) REFERENCES b", []),
        ("SELECT 1; CREATE INDEX a ON t (x); CREATE INDEX b ON t (y)", [("a", "t"), ("b", "t")]),
    ],
)  # fmt: skip
def test_names_and_tables(text: str, found: list[tuple[str, str]]) -> None:
    assert list(indexes_created(text)) == found
