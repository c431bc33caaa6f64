"""Odd but valid tables: replicated as they are, or refused by name before anything is changed."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import OperationError
from tenancy_orm.operations import Switch
from tenancy_orm.operations.switch import Paused
from tenancy_orm.tenant import Tenant
from tests.support.moving import Pair

pytestmark = pytest.mark.new_installation


def in_database(pair: Pair, tenant: Tenant, statements: str, *, role: str | None = None) -> Any:
    """Run statements in the tenant's database, as the superuser or as a role; the first row of the last one."""
    assert tenant.placement is not None
    server = pair.on(tenant.placement.server)
    with psycopg.connect(server.url(tenant.placement.database), autocommit=True) as connection:
        if role is not None:
            connection.execute(f'SET ROLE "{role}"'.encode())
        cursor = connection.execute(statements.encode())
        return cursor.fetchone() if cursor.description else None


def replicating(monkeypatch: pytest.MonkeyPatch, pair: Pair, tenant: Tenant, statements: str, role: str) -> None:
    """Run statements while the tenant's tables are published, before the pause closes its database."""
    original = Switch._close

    async def close(switch: Switch, paused: Paused, *arguments: object) -> None:
        in_database(pair, tenant, statements, role=role)
        await original(switch, paused, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Switch, "_close", close)


async def test_tables_with_a_key_that_identifies_no_rows_are_changed_during_a_move(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deferrable primary key, and a replica identity by an index that is gone: PostgreSQL would refuse to change."""
    acme = (await plane.tenants.create("acme")).tenant
    owner = plane.internals.provisioner.names.owner
    made = """
        CREATE TABLE ranks (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, what text);
        CREATE TABLE gone (id int NOT NULL, what text);
        CREATE UNIQUE INDEX gone_id ON gone (id);
        ALTER TABLE gone REPLICA IDENTITY USING INDEX gone_id;
        DROP INDEX gone_id;
        INSERT INTO ranks VALUES (1, 'a'), (2, 'b');
        INSERT INTO gone VALUES (1, 'a'), (2, 'b');
    """
    in_database(pair, acme, made, role=owner)
    changes = "UPDATE ranks SET id = 3 - id; UPDATE gone SET what = what || id; DELETE FROM gone WHERE id = 1"
    replicating(monkeypatch, pair, acme, changes, owner)
    await plane.moves.move("acme", to="two")
    moved = await plane.tenants.get("acme")
    found = "SELECT string_agg(what, '' ORDER BY id), (SELECT string_agg(what, '') FROM gone) FROM ranks"
    assert in_database(pair, moved, found) == ("ba", "b2")
    identities = (
        "SELECT string_agg(relreplident::text, '' ORDER BY relname) FROM pg_class WHERE relname = ANY ('{ranks,gone}')"
    )
    await plane.moves.confirm("acme")
    assert in_database(pair, moved, identities) == ("nd",)


REFUSED = {
    "always": (
        """
        CREATE TABLE log (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), what text);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO public.log (what) VALUES (NEW.body); RETURN NEW; END';
        CREATE TRIGGER noted AFTER INSERT ON notes FOR EACH ROW EXECUTE FUNCTION note();
        ALTER TABLE notes ENABLE ALWAYS TRIGGER noted;
        """,
        r"tables public\.notes have triggers that are enabled ALWAYS",
    ),
    "generated": (
        "CREATE TABLE lines (n int, twice int GENERATED ALWAYS AS (n * 2) STORED)",
        r"tables public\.lines have no primary key, and generated columns",
    ),
    "generated key": (
        "CREATE TABLE lines (n int, twice int GENERATED ALWAYS AS (n * 2) STORED PRIMARY KEY)",
        r"tables public\.lines have a generated column in the primary key",
    ),
    "arrays": (
        """
        CREATE DOMAIN papers AS json[];
        CREATE TYPE folder AS (name text, content papers);
        CREATE TABLE lines (n int, folder folder);
        """,
        r"tables public\.lines have no primary key, and columns of types that cannot be compared",
    ),
    "full": (
        "CREATE TABLE lines (n int, at point); ALTER TABLE lines REPLICA IDENTITY FULL",
        r"tables public\.lines have no primary key, and columns of types that cannot be compared",
    ),
    "circle": (
        """
        CREATE UNLOGGED TABLE lines (n int PRIMARY KEY, other int);
        CREATE UNLOGGED TABLE pages (n int PRIMARY KEY, line int REFERENCES lines);
        ALTER TABLE lines ADD FOREIGN KEY (other) REFERENCES pages;
        """,
        r"unlogged tables public\.lines, public\.pages refer to each other in a circle",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_replicated_is_refused_before_anything_is_made(
    plane: Tenancy, moving: TenancyConfig, pair: Pair, name: str
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    statements, error = REFUSED[name]
    in_database(pair, acme, statements, role=plane.internals.provisioner.names.owner)
    with pytest.raises(OperationError, match=error):
        await plane.moves.move("acme", to="two")
    assert [one.step for one in await plane.moves.list("acme")] == ["begun"]
    assert pair.left(moving.name_prefix) == []
    # a dump carries it
    await plane.moves.move("acme", to="two", offline=True)
    await plane.moves.confirm("acme")


async def test_types_that_can_be_compared_need_no_key(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    owner = plane.internals.provisioner.names.owner
    made = """
        CREATE TYPE mood AS ENUM ('sad', 'glad');
        CREATE DOMAIN code AS varchar(10) CHECK (value <> '');
        CREATE TYPE pair AS (a code, b mood[]);
        CREATE TABLE wide (n numeric, c code, m mood, ms mood[], p pair, r int4range, mr tstzmultirange, net cidr,
            ip inet, j jsonb, u uuid, bits varbit, money money, t tsvector, b bytea, i interval, ch "char", bp char(3),
            mac macaddr, lsn pg_lsn, cls regclass, vec int2vector, nm name, d date[]);
        INSERT INTO wide (n, c, m, ms, p, r, j)
            VALUES (1.50, 'x', 'sad', '{sad,glad}', ROW('y', '{glad}'), '[1,5)', '{}');
    """
    in_database(pair, acme, made, role=owner)
    replicating(monkeypatch, pair, acme, "UPDATE wide SET m = 'glad', n = n + 1", owner)
    await plane.moves.move("acme", to="two")
    assert in_database(pair, await plane.tenants.get("acme"), "SELECT n::text, m::text FROM wide") == ("2.50", "glad")


async def test_unlogged_tables_come_without_their_triggers_and_in_the_order_of_their_keys(
    plane: Tenancy, pair: Pair
) -> None:
    """A trigger that writes to another table has done so already, and the types' numbers differ on the other server."""
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    owner = plane.internals.provisioner.names.owner
    made = """
        CREATE TYPE mood AS ENUM ('sad', 'glad');
        CREATE TABLE log (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);
        CREATE UNLOGGED TABLE a_child (id int PRIMARY KEY, moods mood[], at timestamptz, cost money);
        CREATE UNLOGGED TABLE z_parent (id int PRIMARY KEY, self int REFERENCES z_parent);
        ALTER TABLE a_child ADD COLUMN parent int REFERENCES z_parent;
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO public.log (what) VALUES (TG_OP || NEW.id); NEW.id := NEW.id + 10; RETURN NEW; END';
        CREATE TRIGGER noted BEFORE INSERT ON a_child FOR EACH ROW EXECUTE FUNCTION note();
        CREATE TRIGGER always BEFORE INSERT ON a_child FOR EACH ROW EXECUTE FUNCTION note();
        ALTER TABLE a_child ENABLE ALWAYS TRIGGER always;
        CREATE TRIGGER never BEFORE INSERT ON a_child FOR EACH ROW EXECUTE FUNCTION note();
        ALTER TABLE a_child DISABLE TRIGGER never;
        INSERT INTO z_parent VALUES (2, 1), (1, NULL);
        INSERT INTO a_child VALUES (1, '{sad,glad}', '2026-02-03 04:05+06', 1234.5, 2);
    """
    in_database(pair, acme, made, role=owner)
    for server, style in ((pair.one, "SQL, DMY"), (pair.two, "Postgres, MDY")):
        server.query(f"ALTER SYSTEM SET DateStyle = '{style}'")
        server.query("SELECT pg_reload_conf()")
    facts = """
        SELECT (SELECT count(*) FROM log), (SELECT array_agg(id ORDER BY id) FROM z_parent), id, moods::text,
               extract(epoch FROM at)::bigint, cost::numeric, parent,
               (SELECT string_agg(tgenabled::text, '' ORDER BY tgname) FROM pg_trigger
                 WHERE tgrelid = 'a_child'::regclass AND NOT tgisinternal) FROM a_child
    """
    before = in_database(pair, acme, facts)
    try:
        await plane.moves.move("acme", to="two")
        assert in_database(pair, await plane.tenants.get("acme"), facts) == before
        await plane.moves.rollback("acme")
        assert in_database(pair, acme, facts) == before
    finally:
        for server in (pair.one, pair.two):
            server.query("ALTER SYSTEM RESET DateStyle")
            server.query("SELECT pg_reload_conf()")


async def test_readers_of_a_materialized_view_with_a_unique_index_are_not_kept_waiting(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is filled again once the tenant is served in its new database."""
    acme = (await plane.tenants.create("acme")).tenant
    owner = plane.internals.provisioner.names.owner
    made = """
        CREATE MATERIALIZED VIEW totals AS SELECT body, count(*) AS n FROM notes GROUP BY body;
        CREATE UNIQUE INDEX totals_body ON totals (body);
    """
    in_database(pair, acme, made, role=owner)
    changes = "INSERT INTO notes (body) VALUES ('x'); REFRESH MATERIALIZED VIEW totals"
    replicating(monkeypatch, pair, acme, changes, owner)
    original = Switch.close_kept
    readers: list[psycopg.Connection[Any]] = []

    async def close_kept(switch: Switch, *arguments: Any, **options: Any) -> None:
        place = (await plane.tenants.get("acme")).placement
        assert place is not None
        readers.append(psycopg.connect(pair.two.url(place.database)))
        readers[0].execute("SELECT count(*) FROM totals")
        await original(switch, *arguments, **options)

    monkeypatch.setattr(Switch, "close_kept", close_kept)
    try:
        async with asyncio.timeout(90):
            await plane.moves.move("acme", to="two")
    finally:
        for reader in readers:
            reader.close()
    assert in_database(pair, await plane.tenants.get("acme"), "SELECT body, n FROM totals") == ("x", 1)
