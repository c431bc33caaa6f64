"""Odd but valid tables: replicated as they are, or refused by name before anything is changed."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import OperationError
from tenancy_orm.moves.survey import survey
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


async def test_the_columns_of_an_unlogged_child_keep_their_values(plane: Tenancy, pair: Pair) -> None:
    """A dump has the columns that a table inherits before its own, and the table itself need not."""
    acme = (await plane.tenants.create("acme")).tenant
    made = """
        CREATE TABLE base (a text);
        CREATE UNLOGGED TABLE child (x text, twice text GENERATED ALWAYS AS (x || x) STORED) INHERITS (base);
        ALTER TABLE base ADD b text;
        INSERT INTO child (a, x, b) VALUES ('A', 'X', 'B');
    """
    in_database(pair, acme, made, role=plane.internals.provisioner.names.owner)
    facts = "SELECT a, b, x, twice FROM child"
    await plane.moves.move("acme", to="two")
    assert in_database(pair, await plane.tenants.get("acme"), facts) == ("A", "B", "X", "XX")
    await plane.moves.rollback("acme")
    assert in_database(pair, acme, facts) == ("A", "B", "X", "XX")


async def test_rows_that_their_owner_may_not_see_are_moved_by_a_dump(plane: Tenancy, pair: Pair) -> None:
    """Replication writes as the owner, so the tables are refused by name, before anything is made."""
    acme = (await plane.tenants.create("acme")).tenant
    made = """
        CREATE TABLE hidden (id int PRIMARY KEY);
        CREATE UNLOGGED TABLE cart (id int REFERENCES hidden);
        INSERT INTO hidden VALUES (1), (2);
        INSERT INTO cart VALUES (1), (2);
        ALTER TABLE hidden ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        ALTER TABLE cart ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        CREATE POLICY first_only ON hidden USING (id = 1);
    """
    in_database(pair, acme, made, role=plane.internals.provisioner.names.owner)
    with pytest.raises(OperationError, match=r"tables public\.cart, public\.hidden have FORCE ROW LEVEL SECURITY"):
        await plane.moves.move("acme", to="two")
    assert [one.step for one in await plane.moves.list("acme")] == ["begun"]
    await plane.moves.move("acme", to="two", offline=True)
    facts = """
        SELECT (SELECT count(*) FROM hidden), (SELECT count(*) FROM cart),
               (SELECT bool_and(relforcerowsecurity) FROM pg_class WHERE relname IN ('hidden', 'cart'))
    """
    assert in_database(pair, await plane.tenants.get("acme"), facts) == (2, 2, True)


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
async def test_temporary_tables_of_open_sessions_hinder_no_move(plane: Tenancy, pair: Pair, offline: bool) -> None:
    """Their sequences can be read by nobody else, and what the tenant's role owns of them ends with its session."""
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    database, role = acme.placement.database, acme.placement.role
    with psycopg.connect(pair.one.url(database), autocommit=True) as session:
        session.execute(f'GRANT TEMPORARY ON DATABASE "{database}" TO "{role}"'.encode())
        for name, user in (("owners", plane.internals.provisioner.names.owner), ("tenants", role)):
            session.execute(f'SET ROLE "{user}"; CREATE TEMPORARY TABLE {name} (id serial); RESET ROLE'.encode())
        await plane.moves.move("acme", to="two", offline=offline)


EXACT = {
    "plain": "n int, t text, c varchar, b bytea, u uuid, r int4range, at timestamptz, mood text[], bits varbit",
    "unique": "n numeric NOT NULL, UNIQUE (n) DEFERRABLE",
    "keyed": "n numeric, id int PRIMARY KEY",
    "labels": "t text COLLATE caseless NOT NULL UNIQUE",
}
INEXACT = {
    "amounts": "n numeric",
    "domains": "n amount",
    "lists": "n interval[]",
    "parts": "p part",
    "ranges": "r nummultirange",
    "documents": "j jsonb",
    "names": "t text COLLATE caseless",
    "indexed": "t text COLLATE caseless NOT NULL",
    "twice": "n numeric, UNIQUE (n)",
}


async def test_tables_in_which_rows_are_found_by_equal_values_are_named(plane: Tenancy, pair: Pair) -> None:
    """With a NULL, or by another collation, rows can be equal in spite of a unique index."""
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    made = """
        CREATE DOMAIN amount AS numeric;
        CREATE TYPE part AS (f float8);
        CREATE COLLATION caseless (provider = libc, locale = 'C');
    """
    tables = "".join(f'CREATE TABLE "{name}" ({columns});' for name, columns in {**EXACT, **INEXACT}.items())
    tables += 'CREATE UNIQUE INDEX ON indexed (t COLLATE "C");'
    names = plane.internals.provisioner.names
    in_database(pair, acme, made + tables, role=names.owner)
    # a server that was built without ICU makes none
    in_database(pair, acme, "UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'caseless'")
    connection = await plane.internals.provisioner.connect_admin("one", acme.placement.database)
    try:
        found = await survey(
            connection, tenant="acme", owner=names.owner, stem=names.stream_stem, online=True, most=0, version=18
        )
    finally:
        await connection.close()
    assert sorted(found.inexact) == sorted(f"public.{name}" for name in INEXACT)


@pytest.fixture
def extension(pair: Pair) -> Iterator[str]:
    """An extension with a table and a sequence that users write to, on both servers."""
    script = """
        CREATE TABLE kept (name text PRIMARY KEY, own boolean NOT NULL DEFAULT true);
        INSERT INTO kept VALUES ('of the extension', false);
        CREATE SEQUENCE numbers;
        SELECT pg_extension_config_dump('kept', 'WHERE own');
        SELECT pg_extension_config_dump('numbers', '');
        GRANT SELECT ON kept, numbers TO PUBLIC;
    """
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        (files := Path(directory, "extension")).mkdir()
        (files / "keeping.control").write_text("default_version = '1.0'\n")
        (files / "keeping--1.0.sql").write_text(script)
        for server in (pair.one, pair.two):
            server.query(f"ALTER SYSTEM SET extension_control_path = '$system:{directory}'")
            server.query("SELECT pg_reload_conf()")
        yield "keeping"
        for server in (pair.one, pair.two):
            server.query("ALTER SYSTEM RESET extension_control_path")
            server.query("SELECT pg_reload_conf()")


async def test_rows_of_users_in_tables_of_an_extension_are_refused_whenever_they_are_written(
    plane: Tenancy, pair: Pair, extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever restores may not write them, and they are not replicated; without such rows it is moved."""
    acme = (await plane.tenants.create("acme")).tenant
    in_database(pair, acme, f"CREATE EXTENSION {extension}")
    with monkeypatch.context() as patched:
        replicating(patched, pair, acme, "INSERT INTO kept VALUES ('mine')", "postgres")
        with pytest.raises(OperationError, match=r": public\.kept of extensions have rows of your own"):
            await plane.moves.move("acme", to="two")
    in_database(pair, acme, "SELECT nextval('numbers')")
    for offline in (False, True):
        with pytest.raises(OperationError, match=r": public\.kept, public\.numbers of extensions have rows of your"):
            await plane.moves.move("acme", to="two", offline=offline)
    assert [one.step for one in await plane.moves.list("acme")] == ["begun", "begun", "switching"]
    in_database(pair, acme, "DELETE FROM kept WHERE own; ALTER SEQUENCE numbers RESTART")
    await plane.moves.move("acme", to="two", offline=True)
    assert in_database(pair, await plane.tenants.get("acme"), "SELECT name FROM kept") == ("of the extension",)


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
