"""A CREATE EXTENSION in a revision is recognised exactly, and nothing else is."""

from __future__ import annotations

import pytest

from tenancy_orm.migrations.extensions import parse_create_extension, skip_existing_extension


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("CREATE EXTENSION vector", "vector"),
        ("create extension Vector;", "vector"),
        ('  CREATE\n\tEXTENSION "uuid-ossp" ; ;', "uuid-ossp"),
        ('CREATE EXTENSION "Od""d" WITH SCHEMA public', 'Od"d'),
        ("CREATE EXTENSION vector SCHEMA \"my schema\" VERSION '0.8.0' CASCADE", "vector"),
        ("CREATE EXTENSION hstore WITH VERSION v1 CASCADE", "hstore"),
        ("-- needs /* it\nCREATE /* a /* nested */ one; */ EXTENSION vector -- done", "vector"),
    ],
)
def test_the_statement_is_recognised_and_does_nothing_where_the_extension_is(statement: str, name: str) -> None:
    found = parse_create_extension(statement)
    assert found is not None
    assert (found.name, found.if_not_exists) == (name, False)
    changed, parameters = skip_existing_extension(None, None, statement, ("x",), None, False)
    again = parse_create_extension(changed)
    assert again is not None
    assert (again.name, again.if_not_exists, parameters) == (name, True, ("x",))
    assert changed.replace("IF NOT EXISTS ", "") == statement


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE EXTENSION IF NOT EXISTS vector",
        "CREATE EXTENSION IF NOT EXISTS vector; DROP TABLE notes",
        "SELECT 'CREATE EXTENSION vector'",
        "-- CREATE EXTENSION vector",
        "/* CREATE EXTENSION vector",
        "DO $$ BEGIN CREATE EXTENSION vector; END $$",
        "CREATE EXTENSION",
        "CREATE EXTENSION 'vector'",
        "CREATE EXTENSION vector FROM unpackaged",
        "CREATE EXTENSION vector SCHEMA",
        "CREATE EXTENSION vector SCHEMA 'public'",
        "CREATE EXTENSION vector VERSION E'\\x30'",
        'CREATE "EXTENSION" vector',
        "DROP EXTENSION vector",
        "CREATE EXTENSIONS vector",
        "",
    ],
)
def test_other_statements_are_left_as_they_are(statement: str) -> None:
    assert skip_existing_extension(None, None, statement, (), None, False) == (statement, ())


def test_each_of_a_script_is_changed() -> None:
    script = "-- CREATE EXTENSION a;\nCREATE EXTENSION b; SELECT 'CREATE EXTENSION c;'; CREATE EXTENSION \"d;\""
    changed, _ = skip_existing_extension(None, None, script, (), None, False)
    assert changed == script.replace("EXTENSION b", "EXTENSION IF NOT EXISTS b").replace(
        'EXTENSION "d', 'EXTENSION IF NOT EXISTS "d'
    )
