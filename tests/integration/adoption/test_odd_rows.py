"""Rows of a shared database with objects that few databases have: nothing is lost by silence."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import sqlalchemy as sa

from tenancy_orm.adoption.source import Source, open_source
from tenancy_orm.errors import AdoptionError
from tenancy_orm.postgres import snapshots
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.sources import ForeignDatabase, foreign_database

ACME = "org_id = 1"

TABLES = """
CREATE SEQUENCE invoice_numbers;
CREATE SEQUENCE tickets;
CREATE SEQUENCE new_one START 7;
CREATE SEQUENCE shared_ids;
CREATE TABLE users ({org}id bigint PRIMARY KEY DEFAULT nextval('shared_ids'), name text NOT NULL);
CREATE TABLE invoices ({org}id bigint PRIMARY KEY DEFAULT nextval('shared_ids'),
    number text NOT NULL DEFAULT 'INV-' || nextval('invoice_numbers'));
CREATE TABLE letters (id bigint PRIMARY KEY, user_id bigint CONSTRAINT letters_user REFERENCES users (id));
CREATE TABLE events (id bigint NOT NULL, {org}body text) PARTITION BY RANGE (id);
CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (1000);
"""
TARGET = (
    TABLES.format(org="")
    + """
CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN NEW.body = upper(NEW.body); RETURN NEW; END $$;
CREATE TRIGGER shouting BEFORE INSERT ON events_1 FOR EACH ROW EXECUTE FUNCTION shout();
"""
)
SOURCE = (
    TABLES.format(org="org_id bigint NOT NULL, ").replace("CREATE SEQUENCE new_one START 7;", "")
    + """
INSERT INTO users VALUES (1, 10, 'alice'), (2, 11, 'bob');
INSERT INTO invoices VALUES (1, 20, 'INV-1'), (2, 21, 'INV-2');
INSERT INTO letters VALUES (1, 10), (2, 11), (3, NULL), (4, NULL);
INSERT INTO events VALUES (1, 1, 'low'), (2, 2, 'theirs');
SELECT setval('invoice_numbers', 2), setval('tickets', 500), setval('shared_ids', 21);
"""
)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "app")
    project.add("0001", f"op.execute('''\n{TARGET}\n''')")
    return project


@pytest.fixture
async def source(postgres: Postgres) -> AsyncIterator[ForeignDatabase]:
    async with foreign_database(postgres, SOURCE) as made:
        yield made


async def test_every_sequence_goes_on_past_the_values_in_use(fleet: Fleet, source: ForeignDatabase) -> None:
    """Of a default without an owned sequence, of one in a text, and of one that only the application asks."""
    report = await fleet.tenancy.adoption.rows.adopt("acme", source.url, where=ACME)
    async with fleet.tenancy.transaction("acme") as session:
        new = sa.text("INSERT INTO users (name) VALUES ('carol') RETURNING id")
        assert (await session.execute(new)).scalar_one() == 21
        numbered = sa.text("INSERT INTO invoices DEFAULT VALUES RETURNING id, number")
        assert (await session.execute(numbered)).one() == (22, "INV-3")
        assert (await session.execute(sa.text("SELECT nextval('tickets'), nextval('new_one')"))).one() == (501, 7)
    assert "sequence public.new_one is where the revisions leave it: the source has none of this name" in report.notes


async def test_a_trigger_of_a_partition_changes_no_row(fleet: Fleet, source: ForeignDatabase) -> None:
    await fleet.tenancy.adoption.rows.adopt("acme", source.url, where=ACME)
    assert await fleet.fetch("acme", "SELECT body FROM events") == [("low",)]
    async with fleet.tenancy.transaction("acme") as session:
        added = sa.text("INSERT INTO events VALUES (9, 'loud') RETURNING body")
        assert (await session.execute(added)).scalar_one() == "LOUD"


async def test_a_table_cannot_look_empty_in_the_snapshot(
    source: ForeignDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that is truncated or rewritten after the snapshot was taken, and before it is read."""
    async with open_source(Source.parse(source.url), timeout=30) as opened:
        for statement in ("TRUNCATE letters", "ALTER TABLE users ALTER name TYPE varchar(9) USING name || ''"):
            with pytest.raises(asyncpg.LockNotAvailableError):
                await source.execute(f"SET lock_timeout = '100ms'; {statement}")
        assert await opened.connection.fetchval("SELECT count(*) FROM public.letters") == 4
    async with source.postgres.connect(source.name) as connection, connection.transaction():
        await connection.execute("LOCK TABLE letters")
        monkeypatch.setattr(snapshots, "LOCK_WAIT", "200ms")
        with pytest.raises(AdoptionError, match="was locked for more than 200ms"):
            async with open_source(Source.parse(source.url), timeout=30):
                pass


async def test_rows_that_refer_to_nobody_are_said(fleet: Fleet, source: ForeignDatabase) -> None:
    report = await fleet.tenancy.adoption.rows.check("acme", source.url, where=ACME)
    assert report.problems == ()
    assert "2 rows of public.letters refer to no row, and belong to nobody" in report.notes
    nobody = await fleet.tenancy.adoption.rows.check("acme", source.url, where="org_id = 99")
    assert any("no row of the source belongs to this customer" in note for note in nobody.notes)


INSENSITIVE = """
CREATE FUNCTION public.ci_cmp(text, text) RETURNS int LANGUAGE sql IMMUTABLE STRICT
    AS 'SELECT bttextcmp(lower($1), lower($2))';
CREATE FUNCTION public.ci_eq(text, text) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT lower($1) = lower($2)';
CREATE FUNCTION public.ci_lt(text, text) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT lower($1) < lower($2)';
CREATE OPERATOR public.=== (LEFTARG = text, RIGHTARG = text, FUNCTION = public.ci_eq);
CREATE OPERATOR public.<<< (LEFTARG = text, RIGHTARG = text, FUNCTION = public.ci_lt);
CREATE OPERATOR CLASS public.ci_ops FOR TYPE text USING btree AS
    OPERATOR 1 public.<<<, OPERATOR 3 public.===, FUNCTION 1 public.ci_cmp(text, text);
ALTER TABLE users ADD login text;
UPDATE users SET login = name;
CREATE UNIQUE INDEX ON users (login public.ci_ops);
CREATE TABLE badges (id bigint PRIMARY KEY, login text CONSTRAINT badges_login REFERENCES users (login));
INSERT INTO badges VALUES (1, 'ALICE'), (2, 'Bob');
"""


TEMPORAL = """
CREATE TABLE rooms ({org}name int4range NOT NULL, valid daterange NOT NULL, PRIMARY KEY (name, valid WITHOUT OVERLAPS));
CREATE TABLE bookings (id bigint PRIMARY KEY, name int4range, valid daterange,
    CONSTRAINT bookings_room FOREIGN KEY (name, PERIOD valid) REFERENCES rooms (name, PERIOD valid));
CREATE TABLE hints (id bigint PRIMARY KEY, letter_id bigint
    CONSTRAINT hints_letter REFERENCES letters (id) NOT ENFORCED);
"""


async def test_keys_of_periods_are_followed_and_keys_that_are_not_enforced_stay_so(
    fleet: Fleet, project: Project, source: ForeignDatabase
) -> None:
    if int(source.postgres.version.split(".")[0]) < 18:
        return  # which does not have them
    project.add("0002", f"op.execute('''\n{TEMPORAL.format(org='')}\n''')", down="0001")
    await source.execute(
        TEMPORAL.format(org="org_id bigint NOT NULL, ")
        + """
        INSERT INTO rooms VALUES (1, '[1,2)', '[2026-01-01,2026-02-01)'), (1, '[1,2)', '[2026-02-01,2026-03-01)'),
            (2, '[2,3)', '[2026-01-01,2026-02-01)');
        INSERT INTO bookings VALUES (1, '[1,2)', '[2026-01-15,2026-02-15)'), (2, '[2,3)', '[2026-01-02,2026-01-03)');
        INSERT INTO hints VALUES (1, 1), (2, 2);
        """
    )
    report = await fleet.tenancy.adoption.rows.adopt("acme", source.url, where=ACME)
    assert report.tenant is not None
    assert await fleet.fetch("acme", "SELECT id FROM bookings") == [(1,)]
    assert await fleet.fetch("acme", "SELECT id FROM hints") == [(1,)]
    enforced = "SELECT conenforced FROM pg_constraint WHERE conname = 'hints_letter'"
    assert await fleet.fetch("acme", enforced) == [(False,)]


async def test_a_row_is_reached_as_its_foreign_key_compares(
    fleet: Fleet, project: Project, source: ForeignDatabase
) -> None:
    """Not as ``=`` does: the equality of citext, for example, is in the schema of its extension."""
    async with source.postgres.connect(source.name) as connection:
        await connection.execute(INSENSITIVE)
        await connection.execute(f'GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{source.name}"')
    text = "op.execute('ALTER TABLE users ADD login text; CREATE TABLE badges (id bigint PRIMARY KEY, login text)')"
    project.add("0002", text, down="0001")
    await fleet.tenancy.adoption.rows.adopt("acme", source.url, where=ACME)
    assert await fleet.fetch("acme", "SELECT id, login FROM badges") == [(1, "ALICE")]
