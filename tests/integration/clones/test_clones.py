"""Clones: copies of tenants that are other tenants for a time, with values that rules replace on the way."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa

from tenancy_orm.clones import AnonymisationRules, manager
from tenancy_orm.clones.plan import read_names
from tenancy_orm.clones.transfer import CloneTransfer
from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import (
    AnonymisationError,
    ConfigurationError,
    OperationError,
    ProvisioningError,
    TenantExistsError,
    TenantNotFoundError,
)
from tenancy_orm.events import TenantCloned
from tenancy_orm.postgres import snapshots
from tenancy_orm.provisioning.logins.readers import Reader
from tenancy_orm.tenant import Status
from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.own_objects import MAKE, NAMES, OWNERS, watched_sandbox
from tests.support.postgres import Postgres
from tests.support.projects import Project

SCHEMA = '''op.execute("""
CREATE TYPE mood AS ENUM ('good', 'bad');
CREATE TABLE users (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, email text NOT NULL UNIQUE, name varchar(12), phone text,
    born date, mood mood NOT NULL DEFAULT 'good', profile jsonb, token uuid, secret bytea,
    initial text GENERATED ALWAYS AS (left(email, 1)) STORED,
    CONSTRAINT users_phone_check CHECK (phone IS NULL OR phone LIKE '+%')
);
CREATE TABLE logins (id serial PRIMARY KEY, email text REFERENCES users (email), address inet, note text);
CREATE TABLE history (id serial PRIMARY KEY, was text);
CREATE TABLE visits (day date NOT NULL, place text NOT NULL, who text) PARTITION BY LIST (place);
CREATE TABLE visits_here PARTITION OF visits FOR VALUES IN ('here');
CREATE TABLE "odd""table" ("a ""b" text);
CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO history (was) VALUES (OLD.email); RETURN NEW; END $$;
CREATE TRIGGER keeping AFTER UPDATE ON users FOR EACH ROW EXECUTE FUNCTION keep();
CREATE MATERIALIZED VIEW emails AS SELECT email FROM users;
""")'''
ROWS = """
INSERT INTO users (email, name, phone, born, profile, token, secret)
    SELECT 'Original' || n || '@example.com', 'Original' || n, '+49' || n, '1990-01-01', '{"a": "Original"}',
           gen_random_uuid(), convert_to('Original' || n, 'UTF8') FROM generate_series(1, 50) n;
INSERT INTO users (email, name, phone) VALUES (E'Original\\ttab\\\\back\\nline', NULL, NULL);
INSERT INTO logins (email, address, note) SELECT email, '10.9.8.7', 'Original note ' || email FROM users;
INSERT INTO visits VALUES ('2026-01-01', 'here', 'Original visitor');
INSERT INTO "odd""table" VALUES ('Original');
REFRESH MATERIALIZED VIEW emails;
ANALYZE;
"""
RULES: dict[str, Any] = {
    "tables": {
        "users": {
            "email": "hash",
            "name": {"faker": "name", "seed": 7},
            "phone": {"constant": "+0"},
            "profile": "hash",
            "token": "hash",
            "secret": "hash",
        },
        "public.log*": {"email": "hash", "address": "null", "note": {"faker": "sentence"}},
        "visits": {"who": {"constant": "some\tbody\\N"}, "place": "keep"},
        'odd"table': {'a "b': "null"},
        "history": {"was": "keep"},
    }
}


@pytest.fixture
def config(postgres: Postgres, name_prefix: str, control_url: str, tmp_path: Path) -> TenancyConfig:
    project = Project.create(tmp_path / "app")
    project.add("0001", SCHEMA, "pass")
    return fleet_config(postgres, control_url, name_prefix, project)


@pytest.fixture
async def fleet(config: TenancyConfig) -> AsyncIterator[Fleet]:
    async with open_fleet(config, initialise=True) as opened:
        await opened.create("acme")
        await opened.execute("acme", ROWS)
        async with opened.tenancy.session("acme") as session:
            await session.execute(sa.text("SELECT lo_from_bytea(4711, 'Original object')"))
            await session.commit()
        yield opened


async def ask(fleet: Fleet, slug: str, query: str) -> list[tuple[Any, ...]]:
    """Ask as the tenant itself."""
    async with fleet.tenancy.session(slug) as session:
        return [tuple(row) for row in await session.execute(sa.text(query))]


async def as_owner(fleet: Fleet, statements: str) -> None:
    """Change the tenant's schema as its owner."""
    await fleet.execute("acme", f'SET ROLE "{fleet.services.names.owner}"; {statements}')


async def files_of(fleet: Fleet, slug: str) -> bytes:
    """All bytes of a tenant's database on disk."""
    async with fleet.connect(slug) as connection:
        await connection.execute("CHECKPOINT")
        files = await connection.fetch(
            "SELECT pg_read_binary_file(f.path, 0, 8000000, true) FROM (SELECT 'base/' || d.oid || '/' || name AS path "
            "FROM pg_database d, pg_ls_dir('base/' || d.oid) name WHERE datname = current_database()) f"
        )
    return b"".join(row[0] or b"" for row in files)


async def test_a_clone_is_another_tenant_with_everything(fleet: Fleet) -> None:
    """Rows, sequences, views and large objects are there; it has a key of its own, and says whose clone it is."""
    events: list[TenantCloned] = []
    fleet.tenancy.events.subscribe(TenantCloned, events.append)
    report = await fleet.tenancy.clones.create(
        "acme", "acme-debug", ttl=timedelta(days=2), metadata={"why": "a bug"}, accept=False
    )
    for table in ("users", "logins", "visits", "emails"):
        query = f"SELECT md5(string_agg(x::text, '' ORDER BY x::text)) FROM {table} x"
        assert await fleet.fetch("acme-debug", query) == await fleet.fetch("acme", query), table
    assert report.rows == 51 + 51 + 1 + 1 + 1  # with alembic_version
    assert (report.differences, report.left_out, report.clone.columns) == ((), (), ())
    assert await fleet.fetch("acme-debug", "SELECT convert_from(lo_get(4711), 'UTF8')") == [("Original object",)]
    await ask(fleet, "acme-debug", "INSERT INTO users (email) VALUES ('new') RETURNING id")
    acme, clone = await fleet.tenancy.tenants.get("acme"), await fleet.tenancy.tenants.get("acme-debug")
    assert (clone.schema_revision, clone.tier, clone.status) == ("0001", acme.tier, Status.ACTIVE)
    assert clone.metadata["why"] == "a bug" and clone.metadata["clone"]["of"] == str(acme.id)
    assert (await fleet.tenancy.tenants.get_by_api_key(report.api_key)).slug == "acme-debug"
    assert report.api_key not in repr(report)
    found = await fleet.tenancy.clones.get("acme-debug")
    assert found == report.clone and found.of == acme.id
    assert await fleet.tenancy.clones.get("acme") is None
    assert [(one.of, one.anonymised) for one in events] == [(acme.id, False)]
    actions = {one.action for one in await fleet.tenancy.audit.events()}
    assert {"tenant.clone", "tenant.cloned_to"} <= actions
    with pytest.raises(TenantExistsError):
        await fleet.tenancy.clones.create("acme", "acme-debug", ttl=timedelta(days=2))


async def test_what_a_tenant_has_made_itself_is_the_clones_own(config: TenancyConfig) -> None:
    """Its code runs with the rights of the clone's role, and at no moment with those of the owner."""
    provisioning = config.provisioning.model_copy(update={"grants": watched_sandbox})
    async with open_fleet(config.replace(provisioning=provisioning), initialise=True) as fleet:
        await fleet.create("acme")
        async with fleet.tenancy.session("acme") as session:
            for statement in MAKE:
                await session.execute(sa.text(statement))
            await session.commit()
        made = await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(days=1))
        assert made.tenant.placement is not None
        role = made.tenant.placement.role
        assert sorted(await fleet.fetch("clone", OWNERS)) == [(name, role) for name in NAMES]
        assert (await fleet.provisioner.reconcile()).clean


async def test_no_original_value_is_anywhere_in_an_anonymised_clone(fleet: Fleet) -> None:
    """Not in its rows, files, indexes, statistics, views, history or large objects; without rules they are there."""
    await fleet.tenancy.clones.create("acme", "plain", ttl=timedelta(hours=1))
    assert b"Original" in await files_of(fleet, "plain")
    report = await fleet.tenancy.clones.create(
        "acme", "masked", ttl=timedelta(hours=1), rules=RULES, require_rules=True
    )
    content = await files_of(fleet, "masked")
    assert b"Original" not in content and b"10.9.8.7" not in content
    statistics = "SELECT count(*) FROM pg_stats WHERE concat(most_common_vals, histogram_bounds) ~ 'Original'"
    assert await fleet.fetch("plain", statistics) != [(0,)]
    assert await fleet.fetch("masked", statistics) == [(0,)]
    # equal values are equal still, and different ones different
    assert await ask(
        fleet, "masked", "SELECT count(*), count(DISTINCT u.email) FROM users u JOIN logins USING (email)"
    ) == [(51, 51)]
    rows = await ask(fleet, "masked", "SELECT email, name, phone, profile #>> '{}', initial FROM users")
    assert all(re.fullmatch("[0-9a-f]{32}", email) and initial == email[0] for email, _, _, _, initial in rows)
    assert len({profile for *_, profile, _ in rows if profile is not None}) == 1
    assert {phone for _, _, phone, _, _ in rows} == {"+0"} and any(name is None for _, name, _, _, _ in rows)
    assert await ask(fleet, "masked", "SELECT address, who FROM logins, visits LIMIT 1") == [(None, "some\tbody\\N")]
    assert await ask(fleet, "masked", "SELECT count(*) FROM emails JOIN users USING (email)") == [(51,)]
    assert await fleet.fetch("masked", "SELECT count(*) FROM pg_largeobject_metadata") == [(0,)]
    assert "public.users.email" in report.clone.columns and "public.history.was" not in report.clone.columns
    assert report.tenant.metadata["clone"]["anonymised"] is True
    # a key of its own: nobody can tell by the hashes that two clones have the same person
    await fleet.tenancy.clones.create("acme", "other", ttl=timedelta(hours=1), rules=RULES)
    hashes = {email for email, *_ in rows}
    assert hashes.isdisjoint(row[0] for row in await ask(fleet, "other", "SELECT email FROM users"))
    # a seed makes the same names
    names = "SELECT name FROM users ORDER BY id"
    assert await ask(fleet, "masked", names) == await ask(fleet, "other", names)
    assert await ask(fleet, "acme", "SELECT count(*) FROM users WHERE email LIKE 'Original%'") == [(51,)]


@pytest.mark.parametrize(
    ("tables", "columns"),
    [
        ({"users": {"mail": "null"}}, {"public.users.mail"}),
        ({"people": {"email": "null"}}, {"public.people"}),
        ({"users": {"email": "null"}, "logins": {"email": "null"}}, {"public.users.email"}),
        ({"users": {"email": {"constant": "x"}}}, {"public.users.email"}),
        ({"users": {"email": "hash"}}, {"public.logins.email refers to public.users.email"}),
        ({"users": {"initial": "hash"}}, {"public.users.initial"}),
        ({"users": {"born": "hash"}}, {"public.users.born"}),
        ({"visits": {"place": "hash"}}, {"public.visits.place", "public.visits_here.place"}),
        ({"us*": {"name": "null"}, "u*s": {"name": "hash"}}, {"public.users.name"}),
        ({"visits_here": {"who": "keep"}, "visits": {"who": "null"}}, {"public.visits_here.who"}),
        ({"alembic_version": {"version_num": "null"}}, {"public.alembic_version"}),
        ({"users": {"name": {"faker": "no_such"}}}, {"public.users.name"}),
        ({"users": {"name": {"faker": "seed_instance"}}}, {"public.users.name"}),
        ({"users": {"name": {"faker": "name", "locale": "xx_YY"}}}, {"public.users.name"}),
        # by the data alone
        ({"users": {"phone": {"constant": "0"}}}, {"public.users.phone"}),
        ({"users": {"born": {"constant": "yesterday's Original"}}}, {"public.users.born"}),
        ({"users": {"mood": {"faker": "name"}}}, {"public.users.mood"}),
        ({"logins": {"id": {"faker": "pyint"}, "email": "null"}, "users": {"email": "hash"}}, None),
    ],
)
async def test_rules_that_cannot_be_followed_are_refused_by_the_columns_name(
    fleet: Fleet, tables: dict[str, Any], columns: set[str] | None
) -> None:
    """Nothing is left of the clone, and the message quotes no row."""
    if columns is None:
        # Faker differs for a unique column, and what is NULL refers to nothing
        await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(hours=1), rules={"tables": tables})
        return
    with pytest.raises(AnonymisationError) as caught:
        await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(hours=1), rules={"tables": tables})
    assert columns & set(caught.value.columns), caught.value
    assert not re.search("Original", str(caught.value))
    with pytest.raises(TenantNotFoundError):
        await fleet.tenancy.tenants.get("clone")
    assert await fleet.services.control.fetch("SELECT FROM tenancy.operations") == []


async def test_columns_without_a_rule_are_refused_by_name_where_rules_are_required(fleet: Fleet) -> None:
    """Text, JSON, bytes and addresses; not dates, enums and what is computed."""
    rules = AnonymisationRules.parse({"tables": {"users": {"email": "hash"}, "logins": {"email": "hash"}}})
    with pytest.raises(AnonymisationError) as caught:
        await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(hours=1), rules=rules, require_rules=True)
    assert set(caught.value.columns) == {
        *(f"public.users.{name}" for name in ("name", "phone", "profile", "secret")),
        *("public.logins.address", "public.logins.note", "public.history.was"),
        *("public.visits_here.place", "public.visits_here.who", 'public.odd"table.a "b'),
    }


async def test_every_type_that_may_have_text_needs_a_rule(fleet: Fleet) -> None:
    """Ranges and arrays of text, places, and a composite type with the name of a harmless one; not numbers and dates.

    A table without columns is none that a pattern is about, and brackets are a part of a name.
    """
    await as_owner(
        fleet,
        """
        CREATE TYPE texts AS RANGE (subtype = text); CREATE TYPE uuid AS (name text);
        CREATE DOMAIN token AS pg_catalog.uuid; CREATE TABLE empty ();
        CREATE TABLE "odd[1]" (a texts, b texts[], c texts_multirange, d public.uuid, e point, f daterange,
            g token[], h numeric, "i[2]" text, j inet[]);
        """,
    )
    with pytest.raises(AnonymisationError) as caught:
        await fleet.tenancy.clones.create(
            "acme",
            "clone",
            ttl=timedelta(1),
            rules={"tables": {"*": {"i[[]2]": "null"}}},
            accept=True,
        )
    assert "there is no such column" in str(caught.value)
    with pytest.raises(AnonymisationError) as caught:
        await fleet.tenancy.clones.create(
            "acme",
            "clone",
            ttl=timedelta(1),
            rules={"tables": {"odd[1]": {"i[2]": "null"}, "*": {"h": "keep"}}},
            require_rules=True,
            accept=True,
        )
    found = {name.removeprefix("public.odd[1].") for name in caught.value.columns if ".odd[" in name}
    assert found == {"a", "b", "c", "d", "e", "j"}


async def test_equal_values_that_would_get_different_hashes_are_refused_where_one_refers_to_the_other(
    fleet: Fleet,
) -> None:
    """Before anything is made, and by the columns' names."""
    await as_owner(
        fleet,
        "CREATE TABLE plans (code varchar(8) PRIMARY KEY); CREATE TABLE bookings (code text REFERENCES plans);",
    )
    with pytest.raises(AnonymisationError, match=r"bookings.code refers to public.plans.code: hashes of these two"):
        await fleet.tenancy.clones.create(
            "acme",
            "clone",
            ttl=timedelta(1),
            rules={"tables": {"plans": {"code": "hash"}, "bookings": {"code": "hash"}}},
            accept=True,
        )
    assert await fleet.services.control.fetch("SELECT FROM tenancy.tenants WHERE slug = 'clone'") == []


async def test_a_data_migration_that_is_half_done_is_not_anonymised(fleet: Fleet) -> None:
    """Its checkpoint has keys of rows, which no rule replaces; without rules it comes along."""
    await as_owner(
        fleet,
        """
        CREATE SCHEMA tenancy_migration; CREATE TABLE tenancy_migration.data (after text[], until text[]);
        INSERT INTO tenancy_migration.data VALUES ('{Original1@example.com}', NULL);
        """,
    )
    with pytest.raises(AnonymisationError, match="a data migration is half done") as caught:
        await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(1), rules=RULES, accept=True)
    assert "Original" not in str(caught.value)
    await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(1), accept=True)
    assert await fleet.fetch("clone", "SELECT after FROM tenancy_migration.data") == [(["Original1@example.com"],)]


async def test_what_rewrites_a_table_waits_for_the_copy(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is rewritten has no rows for an older snapshot, and the clone would be without them."""
    bring, asked = CloneTransfer._bring_rows, []

    async def rewriting(self: CloneTransfer, dump: Any) -> None:
        async with fleet.connect("acme") as connection:
            await connection.execute("SET lock_timeout = '200ms'")
            for statement in ("ALTER TABLE visits ALTER who TYPE varchar(30)", "TRUNCATE history"):
                with pytest.raises(asyncpg.LockNotAvailableError):
                    await connection.execute(statement)
                asked.append(statement)
        await bring(self, dump)

    monkeypatch.setattr(CloneTransfer, "_bring_rows", rewriting)
    await fleet.execute("acme", "INSERT INTO history (was) VALUES ('kept')")
    await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(1), rules=RULES)
    assert len(asked) == 2
    assert await fleet.fetch("clone", "SELECT who FROM visits") == [("some\tbody\\N",)]
    assert await fleet.fetch("clone", "SELECT was FROM history") == [("kept",)]


async def test_a_table_that_comes_to_be_meanwhile_is_locked_as_well(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot has no table that was not locked before; one that stays locked is named as the cause."""
    read, calls = read_names, 0

    async def changing(connection: Any) -> Any:
        nonlocal calls
        calls += 1
        found = await read(connection)
        if calls == 1:
            await as_owner(fleet, 'CREATE TABLE later (a text); DROP TABLE "odd""table"')
        if calls == 2:
            await as_owner(fleet, "CREATE TABLE latest (a text)")
        return found

    monkeypatch.setattr(manager, "read_names", changing)
    rules = {"tables": {"late*": {"a": "null"}}}
    await as_owner(fleet, "CREATE TABLE late (a text)")
    await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(1), rules=rules, accept=True)
    assert calls > 2
    recorded = await fleet.tenancy.clones.get("clone")
    assert recorded is not None
    assert recorded.columns == ("public.late.a", "public.later.a", "public.latest.a")
    monkeypatch.setattr(snapshots, "LOCK_WAIT", "100ms")
    async with fleet.connect("acme") as connection:
        await connection.execute("BEGIN; LOCK TABLE users")
        with pytest.raises(OperationError, match="a table was locked for more than 100ms"):
            await fleet.tenancy.clones.create("acme", "other", ttl=timedelta(1))


async def test_rows_that_row_security_hides_are_never_left_out_in_silence(fleet: Fleet) -> None:
    """Of a table of somebody else, which the login that reads may not see as a whole."""
    await fleet.execute(
        "acme",
        f"""
        CREATE TABLE foreign_rows (a text); INSERT INTO foreign_rows VALUES ('seen'), ('hidden');
        GRANT SELECT ON foreign_rows TO "{fleet.services.names.owner}";
        ALTER TABLE foreign_rows ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON foreign_rows USING (a = 'seen');
        """,
    )
    with pytest.raises(ProvisioningError, match="row-level security policy"):
        await fleet.tenancy.clones.create(
            "acme", "clone", ttl=timedelta(1), rules={"tables": {"foreign_rows": {"a": "hash"}}}, accept=True
        )


async def test_a_clone_has_the_locale_and_the_settings_of_the_database(fleet: Fleet) -> None:
    await fleet.change_properties("acme")
    await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(1))
    assert await fleet.properties("clone") == await fleet.properties("acme")
    assert (await fleet.properties("clone"))[2] == ["TimeZone=Asia/Kathmandu"]


async def test_unique_indexes_of_some_rows_and_views_of_views_are_made(fleet: Fleet) -> None:
    """Faker makes values that differ; a materialized view is filled after those that it reads."""
    await as_owner(
        fleet,
        """
        CREATE TABLE people (name text, gone boolean); CREATE UNIQUE INDEX ON people (name) WHERE NOT gone;
        INSERT INTO people SELECT 'Original' || n, false FROM generate_series(1, 300) n;
        CREATE VIEW through AS SELECT 1::bigint AS n; CREATE MATERIALIZED VIEW first AS SELECT n FROM through;
        CREATE MATERIALIZED VIEW second AS SELECT count(*) AS n FROM people;
        CREATE OR REPLACE VIEW through AS SELECT n FROM second; REFRESH MATERIALIZED VIEW first;
        """,
    )
    await fleet.tenancy.clones.create(
        "acme", "clone", ttl=timedelta(1), rules={"tables": {"people": {"name": {"faker": "name"}}}}, accept=True
    )
    assert await fleet.fetch("clone", "SELECT n FROM first") == [(300,)]
    assert await fleet.fetch("clone", "SELECT count(*) FROM people WHERE name ~ 'Original'") == [(0,)]


async def test_a_server_that_fails_is_no_rule_that_cannot_be_followed(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names what has failed, while the tables are looked at and while they are copied."""
    copy = CloneTransfer._copy

    async def ending(self: CloneTransfer, table: Any, replacements: Any, into: Any) -> None:
        await fleet.execute("acme", f"SELECT pg_terminate_backend({self.source.get_server_pid()}, 10000)")
        await copy(self, table, replacements, into)

    monkeypatch.setattr(CloneTransfer, "_copy", ending)
    with pytest.raises(ProvisioningError) as failed:
        await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(1), rules=RULES)
    assert "the rule makes" not in str(failed.value)

    async def refused(*_: Any, **__: Any) -> Any:
        raise ConnectionResetError("gone")

    monkeypatch.setattr(Reader, "connect", refused)
    with pytest.raises(OperationError, match="tenant 'acme' cannot be read"):
        await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(1))


@pytest.mark.parametrize(
    "given",
    [
        {"table": {}},
        {"tables": {"users": {}}},
        {"tables": {"users": {"name": "nul"}}},
        {"tables": {"users": {"name": {"fake": "name"}}}},
        {"tables": {"users": {"name": {"faker": "name", "sed": 1}}}},
        {"tables": {"users": {"name": {"constant": []}}}},
        {"tables": {"users": {"name": {"faker": "name", "seed": "x"}}}},
        {"keep_large_objects": "yes"},
    ],
)
def test_what_is_no_rule_is_refused(given: dict[str, Any]) -> None:
    """A mistake in a file is never taken for no rule."""
    with pytest.raises(AnonymisationError):
        AnonymisationRules.parse(given)


async def test_nobody_connects_before_the_values_are_replaced(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """When rows arrive, the clone's role cannot log in, and its login can do nothing elsewhere; a failure drops all."""
    seen: list[str] = []
    copy = CloneTransfer._copy

    async def looking(self: CloneTransfer, table: Any, replacements: Any, into: Any) -> None:
        await copy(self, table, replacements, into)
        async with fleet.connect("acme") as connection:
            [row] = await connection.fetch(
                "SELECT rolsuper OR rolcreaterole OR rolcreatedb AS mighty, rolname FROM pg_roles WHERE rolname = $1",
                self.into.role,
            )
            assert row["mighty"] is False
            clone = (await fleet.registry.find("clone")).placement
            assert clone is not None
            assert not await connection.fetchval(
                "SELECT has_database_privilege($1, $2, 'CONNECT')", clone.role, clone.database
            )
        with pytest.raises(asyncpg.PostgresError):
            await into.execute(f'SET ROLE "{fleet.services.names.owner}"')
        seen.append(table.name)
        raise ConfigurationError("stopped")

    monkeypatch.setattr(CloneTransfer, "_copy", looking)
    with pytest.raises(ConfigurationError, match="stopped"):
        await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(hours=1), rules=RULES)
    assert len(seen) == 1
    with pytest.raises(TenantNotFoundError):
        await fleet.tenancy.tenants.get("clone")
    report = await fleet.tenancy.internals.provisioner.reconcile(check=True)
    assert (report.unknown, report.removed) == ((), ()), report


async def test_housekeeping_deletes_and_purges_a_clone_when_its_time_is_over(fleet: Fleet) -> None:
    """By what is recorded, which the tenant's metadata does not change; other tenants stay."""
    await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(hours=1))
    past = {"clone": {"of": "x", "expires_at": (datetime.now(UTC) - timedelta(days=1)).isoformat()}}
    await fleet.tenancy.tenants.update("acme", metadata=past)
    await fleet.tenancy.tenants.update("clone", metadata={})
    report = await fleet.tenancy.run_housekeeping()
    assert report.purged == () and report.chores["expire_clones"].expired == ()
    clone = await fleet.tenancy.tenants.get("clone")
    await fleet.services.control.fetch(
        "UPDATE tenancy.operations SET detail = detail || jsonb_build_object('expires_at', clock_timestamp()) "
        "WHERE kind = 'clone' RETURNING id"
    )
    report = await fleet.tenancy.run_housekeeping()
    assert report.chores["expire_clones"].expired == ("clone",) and report.purged == ("clone",), report
    assert (await fleet.tenancy.tenants.get(clone.id)).status is Status.PURGED
    assert (await fleet.tenancy.tenants.get("acme")).status is Status.ACTIVE
    assert (await fleet.tenancy.run_housekeeping()).chores["expire_clones"].expired == ()


async def test_who_may_clone_what(fleet: Fleet) -> None:
    """No deleted one; within its region; and for a bounded time."""
    clones = fleet.tenancy.clones
    for ttl in (timedelta(0), timedelta(days=366)):
        with pytest.raises(ConfigurationError, match="365 days"):
            await clones.create("acme", "x", ttl=ttl)
    with pytest.raises(TenantNotFoundError):
        await clones.create("nobody", "x", ttl=timedelta(1))
    for table, name in (("servers", "name = 'default'"), ("tenants", "slug = 'acme'")):
        await fleet.services.control.fetch(f"UPDATE tenancy.{table} SET region = 'eu' WHERE {name} RETURNING 1")
    clone = await clones.create("acme", "x", ttl=timedelta(1))
    assert clone.tenant.region == "eu"
    await fleet.tenancy.tenants.delete("acme")
    with pytest.raises(Exception, match="deleted"):
        await clones.create("acme", "y", ttl=timedelta(1))
