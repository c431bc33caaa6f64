"""Every kind of object has a difference that is found, whichever of two databases is as it should be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tenancy_orm.drift import Catalogue, Difference, Ignored, catalogue, queries
from tenancy_orm.drift.compare import compare
from tenancy_orm.drift.mending import TENANT_ROLE
from tenancy_orm.postgres.quoting import quote_identifier
from tests.support.postgres import Postgres

BASE = """
CREATE TABLE notes (id integer PRIMARY KEY, body varchar(80) DEFAULT 'x', n integer NOT NULL, at timestamptz,
    tag varchar(10) COLLATE "C", CONSTRAINT few CHECK (n < 70));
CREATE TABLE authors (id integer PRIMARY KEY);
CREATE TABLE books (author integer REFERENCES authors);
CREATE TABLE parts (id integer, at date) PARTITION BY RANGE (at);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
CREATE INDEX notes_n ON notes (n);
CREATE FUNCTION plus(a integer) RETURNS integer LANGUAGE sql AS 'SELECT a + 1';
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END';
CREATE TRIGGER touched BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION touch();
CREATE VIEW totals AS SELECT n, count(*) AS c FROM notes GROUP BY n;
CREATE MATERIALIZED VIEW cached AS SELECT n FROM notes;
CREATE SEQUENCE numbers;
CREATE TYPE mood AS ENUM ('bad', 'good');
CREATE DOMAIN small AS integer CHECK (VALUE < 100);
CREATE TYPE pair AS (a integer, b integer);
CREATE POLICY mine ON notes USING (n > 0);
CREATE SCHEMA billing;
CREATE RULE nothing AS ON INSERT TO totals DO INSTEAD NOTHING;
GRANT SELECT ON notes TO {tenant};
"""


@dataclass
class Case:
    """A change, the differences seen from both sides, and whether their statements undo and repeat it."""

    statements: str
    surplus: list[str]
    missing: list[str]
    undone: bool
    redone: bool


def read_cases() -> dict[str, Case]:
    """The cases of kinds.txt, which says what the signs mean."""
    cases = {}
    for part in Path(__file__).with_name("kinds.txt").read_text().split("## ")[1:]:
        name, *lines = part.strip().splitlines()
        found = {sign: [line.partition(" ")[2] for line in lines if line.startswith(sign)] for sign in "-+"}
        statements = "\n".join(line for line in lines if line[0] not in "-+")
        cases[name] = Case(
            statements, found["-"], found["+"], *(any(line.startswith(f"{sign}*") for line in lines) for sign in "-+")
        )
    return cases


CASES = read_cases()

# each in a database with the table notes and nothing else
FIRST_OF_THEIR_KIND = """
CREATE VIEW one AS SELECT 1 AS n
CREATE MATERIALIZED VIEW one AS SELECT 1 AS n
CREATE RULE one AS ON INSERT TO notes DO INSTEAD NOTHING
CREATE FUNCTION one() RETURNS integer LANGUAGE sql AS 'SELECT 1'
CREATE PROCEDURE one() LANGUAGE sql AS 'SELECT 1'
CREATE AGGREGATE one(integer) (SFUNC = int4pl, STYPE = integer)
CREATE TRIGGER one BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()
CREATE TYPE one AS ENUM ('a')
CREATE DOMAIN one AS integer CHECK (VALUE < 100)
CREATE TYPE one AS (n integer)
CREATE TYPE one AS RANGE (SUBTYPE = integer)
CREATE TYPE one
CREATE POLICY one ON notes
CREATE PUBLICATION one
CREATE STATISTICS one ON id, body FROM notes
CREATE FOREIGN DATA WRAPPER one
CREATE FOREIGN DATA WRAPPER one; CREATE SERVER one FOREIGN DATA WRAPPER one
ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC
CREATE COLLATION one FROM "C"
CREATE CONVERSION one FOR 'LATIN1' TO 'UTF8' FROM iso8859_1_to_utf8
CREATE OPERATOR === (LEFTARG = integer, RIGHTARG = integer, FUNCTION = int4eq)
CREATE OPERATOR FAMILY one USING btree
CREATE OPERATOR CLASS one FOR TYPE integer USING btree AS OPERATOR 1 <, FUNCTION 1 btint4cmp(integer, integer)
CREATE TEXT SEARCH CONFIGURATION one (COPY = simple)
CREATE TEXT SEARCH DICTIONARY one (TEMPLATE = simple)
CREATE CAST (point AS text) WITH INOUT
CREATE LANGUAGE one HANDLER plpgsql_call_handler
CREATE ACCESS METHOD one TYPE INDEX HANDLER bthandler
CREATE FUNCTION one() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; \
CREATE EVENT TRIGGER one ON ddl_command_end EXECUTE FUNCTION one()
"""


@pytest.fixture(scope="module")
def names(postgres: Postgres) -> Iterator[tuple[str, str, str]]:
    """A database with every kind of object, its owner and a tenant's role."""
    owner, tenant, database = (postgres.new_name(kind) for kind in ("owner", "tenant", "drift"))
    asyncio.run(_create(postgres, owner, tenant, database))
    yield owner, tenant, database
    asyncio.run(postgres.drop_database(database))


async def _create(postgres: Postgres, owner: str, tenant: str, database: str) -> None:
    async with postgres.connect() as connection:
        for role in (owner, tenant):
            await connection.execute(f"CREATE ROLE {quote_identifier(role)}")
        await connection.execute(f"CREATE DATABASE {quote_identifier(database)} OWNER {quote_identifier(owner)}")
    async with postgres.connect(database) as connection:
        await connection.execute(f"ALTER SCHEMA public OWNER TO {quote_identifier(owner)}")
        await connection.execute(f"SET ROLE {quote_identifier(owner)}")
        await connection.execute(BASE.format(tenant=quote_identifier(tenant)))


@dataclass
class Trial:
    """A transaction in the database, and its catalogue."""

    connection: asyncpg.Connection[Any]
    owner: str
    tenant: str

    async def read(self) -> Catalogue:
        return await catalogue.read(self.connection, owner=self.owner, role=self.tenant)

    async def execute(self, statements: str) -> None:
        """Execute statements as the owner, or as the administrator if the owner may not."""
        text = statements.format(owner=quote_identifier(self.owner), tenant=quote_identifier(self.tenant))
        try:
            async with self.connection.transaction():
                await self.connection.execute(f"SET LOCAL ROLE {quote_identifier(self.owner)}; {text}")
                await self.connection.execute("RESET ROLE")
        except asyncpg.InsufficientPrivilegeError:
            await self.connection.execute(text)

    async def mend(self, expected: Catalogue) -> bool:
        """Run all statements of what differs, and return whether nothing differs any more."""
        for _ in range(3):  # what belongs to an object follows it
            for difference in compare(expected, await self.read()):
                for statement in difference.statements:
                    text = statement.replace(TENANT_ROLE, quote_identifier(self.tenant))
                    # in a transaction nothing is built concurrently
                    with contextlib.suppress(asyncpg.DependentObjectsStillExistError):
                        async with self.connection.transaction():
                            await self.connection.execute(text.replace(" CONCURRENTLY", ""))
        return await self.read() == expected


@asynccontextmanager
async def trial(postgres: Postgres, names: tuple[str, str, str]) -> AsyncIterator[Trial]:
    owner, tenant, database = names
    async with postgres.connect(database) as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            yield Trial(connection, owner, tenant)
        finally:
            await transaction.rollback()


def texts(differences: list[Difference]) -> list[str]:
    return [difference.text for difference in differences]


@pytest.mark.parametrize("case", CASES)
async def test_every_kind_of_object_is_compared_and_mended(
    postgres: Postgres, names: tuple[str, str, str], case: str
) -> None:
    """A change is found from both sides, and the statements undo it where they say so."""
    wanted = CASES[case]
    async with trial(postgres, names) as tried:
        before = await tried.read()
        await tried.execute(wanted.statements)
        after = await tried.read()
        assert (texts(compare(before, after)), texts(compare(after, before))) == (wanted.surplus, wanted.missing)
        assert before.fingerprint != after.fingerprint
        assert await tried.mend(before) is wanted.undone
    async with trial(postgres, names) as tried:
        assert await tried.mend(after) is wanted.redone


async def test_what_has_no_meaning_for_the_schema_is_no_difference(
    postgres: Postgres, names: tuple[str, str, str]
) -> None:
    async with trial(postgres, names) as tried:
        before = await tried.read()
        await tried.execute(
            "INSERT INTO notes VALUES (1, 'a', 1); SELECT nextval('numbers'); ANALYZE notes; "
            "ALTER TABLE notes ADD COLUMN gone integer; ALTER TABLE notes DROP COLUMN gone; "
            "ALTER TABLE notes ADD COLUMN again timestamptz; ALTER TABLE notes DROP COLUMN at; "
            "ALTER TABLE notes RENAME COLUMN again TO at; ALTER TABLE notes SET (autovacuum_enabled = false); "
            "CREATE TEMPORARY TABLE passing (id integer); ALTER TABLE notes ALTER n SET STATISTICS 500; "
            "GRANT ALL ON notes TO {owner}; CREATE SCHEMA tenancy_orm; CREATE TABLE tenancy_orm.seeds (id integer)"
        )
        await tried.connection.execute(
            "SET LOCAL search_path = billing; SET LOCAL DateStyle = 'German'; SET LOCAL quote_all_identifiers = on"
        )
        after = await tried.read()
        assert compare(before, after) == []
        assert before.fingerprint == after.fingerprint
        # the settings of the caller's transaction are as they were
        assert await tried.connection.fetchval("SHOW search_path") == "billing"


async def test_objects_that_a_pattern_names_are_ignored(postgres: Postgres, names: tuple[str, str, str]) -> None:
    """A table takes along what belongs to it; a pattern without a kind means no column or index."""
    async with trial(postgres, names) as tried:
        before = await tried.read()
        await tried.execute(
            "CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM ('2021-01-01') TO ('2022-01-01'); "
            "CREATE TABLE parts_3 (id serial PRIMARY KEY); CREATE INDEX ON parts_2 (id); "
            "CREATE SCHEMA audit; CREATE TABLE audit.log (id integer); CREATE INDEX parts_n ON notes (body)"
        )
        after = await tried.read()

        def left(*patterns: str) -> list[str]:
            ignored = Ignored(patterns)
            return texts(compare(before.without(ignored), after.without(ignored)))

        index = "table notes: index parts_n should not exist"
        assert left("parts_*", "audit.*", "schema audit") == [index]
        assert left("table public.parts_*", "audit*", "index parts_n") == []
        assert left("parts_*", "audit*", "index notes.*") == []
        assert left("view parts_*", "audit*") == [
            "sequence parts_3_id_seq should not exist",
            index,
            "table parts_2 should not exist",
            "table parts_3 should not exist",
        ]


async def test_the_first_object_of_a_kind_is_found(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a database has nothing of is not read; its first object is."""
    everything = f"SELECT ARRAY{sorted(queries.EVERYTHING)}"
    connection = await asyncpg.connect(empty_url, timeout=30)
    try:
        await connection.execute("CREATE TABLE notes (id integer PRIMARY KEY, body text)")

        async def read() -> Catalogue:
            return await catalogue.read(connection, owner="nobody")

        bare = await read()
        for statements in FIRST_OF_THEIR_KIND.replace("\\\n", "").strip().splitlines():
            begun = connection.transaction()
            await begun.start()
            await connection.execute(statements)
            found = await read()
            with monkeypatch.context() as patch:
                patch.setattr(catalogue, "PRESENT", everything)
                assert (await read()).objects == found.objects, statements
            is_shell = statements == "CREATE TYPE one"
            assert len(found.objects) > len(bare.objects) or is_shell, statements
            await begun.rollback()
    finally:
        await connection.close()


async def test_an_invalid_index_is_found(postgres: Postgres, names: tuple[str, str, str]) -> None:
    async with trial(postgres, names) as tried:
        before = await tried.read()
        await tried.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'notes_n'::regclass")
        [found] = compare(before, await tried.read())
        assert found.text == "table notes: index notes_n is invalid"
        assert found.statements == ("REINDEX INDEX CONCURRENTLY public.notes_n",)


async def test_nothing_of_a_tenants_runs_while_its_catalogue_is_read(
    postgres: Postgres, names: tuple[str, str, str]
) -> None:
    """Functions, operators and types that shadow PostgreSQL's are printed, and not called."""
    async with trial(postgres, names) as tried:
        await tried.execute("GRANT CREATE ON SCHEMA public TO {tenant}")
        await tried.connection.execute(f"SET LOCAL ROLE {quote_identifier(tried.tenant)}; {HOSTILE}; RESET ROLE")
        # the attack works where the path is not set
        with pytest.raises(asyncpg.RaiseError, match="called"):
            async with tried.connection.transaction():
                await tried.connection.execute(
                    "SET LOCAL search_path = public, pg_catalog; SELECT quote_ident('a'::text)"
                )
        await tried.connection.execute("SET LOCAL search_path = public, pg_catalog")
        found = await tried.read()
        assert any(key.name == "public.bomb" for key in found.objects)


HOSTILE = """
CREATE FUNCTION bang() RETURNS text LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''called''; END';
CREATE FUNCTION quote_ident(text) RETURNS text LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''called''; END';
CREATE FUNCTION obj_description(oid, text) RETURNS text LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''called''; END';
CREATE FUNCTION wrong(name, name) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''called''; END';
CREATE OPERATOR = (LEFTARG = name, RIGHTARG = name, FUNCTION = wrong);
CREATE DOMAIN bombs AS text DEFAULT bang() CHECK (bang() IS NULL);
CREATE TYPE bomb AS (a bombs, b text);
CREATE TABLE traps (a text DEFAULT bang(), b bomb, c integer CHECK (bang() IS NULL));
CREATE VIEW trapped AS SELECT bang() AS a, ROW ('a', 'b')::bomb AS b;
CREATE INDEX traps_a ON traps ((lower(a))) WHERE a IS NOT NULL;
"""
