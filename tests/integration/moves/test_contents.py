"""What a database may have, and what is refused: moved between two real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import OperationConflictError, OperationError, OperationStateError, PlacementError
from tenancy_orm.registry.databases import TenantDatabase
from tenancy_orm.tenant import Status, Tenant
from tests.support.moving import Pair, moving_config

pytestmark = pytest.mark.new_installation

CONTENTS = """
CREATE SCHEMA extra;
CREATE TABLE extra.log (at timestamptz DEFAULT now(), what text);
CREATE TABLE counters (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int, twice int GENERATED ALWAYS AS (n * 2) STORED
);
CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY, what text);
CREATE TABLE parts (id int, day date, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM ('2026-01-01') TO ('2026-07-01');
CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM ('2026-07-01') TO ('2027-01-01');
CREATE MATERIALIZED VIEW totals AS SELECT count(*) AS n FROM counters;
CREATE SEQUENCE loose START 100 INCREMENT 7;
CREATE TABLE "Odd ""name"" x" ("a b" int PRIMARY KEY, body json);
INSERT INTO counters (n) SELECT generate_series(1, 50);
INSERT INTO scratch VALUES (1, 'first');
INSERT INTO parts VALUES (1, '2026-02-02'), (2, '2026-08-02');
INSERT INTO "Odd ""name"" x" VALUES (1, '{"a": 1}');
INSERT INTO extra.log (what) SELECT 'x' FROM generate_series(1, 20);
SELECT nextval('loose'), nextval('loose');
REFRESH MATERIALIZED VIEW totals;
"""
FACTS = """
SELECT (SELECT sum(twice) FROM counters), (SELECT what FROM scratch), (SELECT count(*) FROM parts_2),
       (SELECT n FROM totals), (SELECT last_value FROM loose), (SELECT count(*) FROM extra.log),
       (SELECT body::text FROM "Odd ""name"" x"),
       (SELECT convert_from(lo_get(oid), 'utf8') FROM pg_largeobject_metadata),
       (SELECT string_agg(relreplident::text, '' ORDER BY relname) FROM pg_class WHERE relname IN ('log', 'counters')),
       (SELECT relpersistence::text FROM pg_class WHERE relname = 'scratch')
"""


def in_database(pair: Pair, tenant: Tenant, statements: str, *, role: str | None = None) -> Any:
    """Run statements in the tenant's database, as the superuser or as a role; the first row of the last one."""
    assert tenant.placement is not None
    server = pair.on(tenant.placement.server)
    with psycopg.connect(server.url(tenant.placement.database), autocommit=True) as connection:
        if role is not None:
            connection.execute(f'SET ROLE "{role}"'.encode())
        cursor = connection.execute(statements.encode())
        return cursor.fetchone() if cursor.description else None


@asynccontextmanager
async def opened(config: TenancyConfig) -> AsyncIterator[Tenancy]:
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    try:
        yield tenancy
    finally:
        await tenancy.close()


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
async def test_everything_that_a_database_has_is_moved(
    plane: Tenancy, moving: TenancyConfig, pair: Pair, offline: bool
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    owner = plane.internals.provisioner.names.owner
    in_database(pair, acme, CONTENTS, role=owner)
    in_database(pair, acme, "SELECT lo_from_bytea(4711, 'large')", role=acme.placement.role)
    before = in_database(pair, acme, FACTS)
    operation = await plane.moves.move("acme", to="two", offline=offline)
    moved = await plane.tenants.get("acme")
    assert (moved.status, moved.paused, moved.schema_revision) == (Status.ACTIVE, False, acme.schema_revision)
    assert in_database(pair, moved, FACTS) == (*before[:8], "df" if not offline else before[8], before[9])
    # the tenant's own large object is its own there as well, and the rights are those of the source
    async with plane.session("acme") as session:
        assert await session.scalar(text("SELECT convert_from(lo_get(4711), 'utf8')")) == "large"
        await session.execute(text("INSERT INTO notes (body) VALUES ('written there')"))
        await session.commit()
    assert await plane.internals.provisioner.reconcile(check=True) is not None
    assert (operation.detail["large_objects"], operation.detail["unlogged_tables"]) == (1, 1)
    if offline:
        assert "by a dump" in operation.detail["reverse"]
        with pytest.raises(OperationStateError, match="cannot be rolled back, since its former database does not"):
            await plane.moves.rollback("acme")
    else:
        deletions = "DELETE FROM extra.log WHERE ctid IN (SELECT ctid FROM extra.log LIMIT 5)"
        in_database(pair, moved, deletions, role=owner)
        in_database(pair, moved, "UPDATE scratch SET what = 'second'", role=owner)
        with pytest.raises(OperationConflictError, match="a move of tenant 'acme', is waiting"):
            await plane.moves.move("acme", to="one")
        # within its own transaction, nothing else is refused: the way back brings all of it
        await plane.moves.rollback("acme")
        back = await plane.tenants.get("acme")
        facts = in_database(pair, back, FACTS)
        assert (facts[1], facts[5], facts[8]) == ("second", 15, "dd")
        assert in_database(pair, back, "SELECT count(*) FROM notes") == (1,)
        await plane.moves.move("acme", to="two")
    confirmed = await plane.moves.confirm("acme")
    assert confirmed.state == "done"
    final = await plane.tenants.get("acme")
    assert final.placement is not None
    assert in_database(pair, final, FACTS)[8] == before[8]
    assert pair.left(moving.name_prefix) == []
    assert pair.databases(moving.name_prefix) == [f"two:{final.placement.database}"]
    with pytest.raises(OperationStateError, match="no move that could be"):
        await plane.moves.confirm("acme")


async def test_what_cannot_be_moved_is_refused_by_name_and_nothing_is_left(
    plane: Tenancy, moving: TenancyConfig, pair: Pair
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    owner = plane.internals.provisioner.names.owner

    async def refused(what: str, **options: Any) -> None:
        with pytest.raises(OperationError, match=what):
            await plane.moves.move("acme", to="two", **options)

    in_database(pair, acme, "CREATE TABLE loose (a json)", role=owner)
    await refused(r"tables public\.loose have no primary key, and columns of types that cannot be compared")
    in_database(pair, acme, "DROP TABLE loose; GRANT CREATE ON SCHEMA public TO PUBLIC", role=owner)
    in_database(pair, acme, "CREATE FUNCTION own() RETURNS int LANGUAGE sql AS 'SELECT 1'", role=acme.placement.role)
    await refused(r"its role owns function public\.own\(\)")
    in_database(pair, acme, "DROP FUNCTION own(); REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    in_database(pair, acme, "SELECT pg_create_logical_replication_slot('theirs', 'pgoutput')")
    await refused("its database is replicated by the slots theirs")
    in_database(pair, acme, "SELECT pg_drop_replication_slot('theirs')")
    big = "CREATE UNLOGGED TABLE big AS SELECT repeat('x', 100) FROM generate_series(1, 20000)"
    in_database(pair, acme, big, role=owner)
    small = moving.move.model_copy(update={"pause_bytes": 100_000})
    async with opened(moving.replace(move=small)) as bounded:
        with pytest.raises(OperationError, match=r"would be copied within the pause; raise move\.pause_bytes"):
            await bounded.moves.move("acme", to="two")
    with pytest.raises(PlacementError, match="is on server 'one' already"):
        await plane.moves.move("acme", to="one")
    await plane.servers.drain("two")
    with pytest.raises(PlacementError, match="two accepts no new tenants: it is in drain"):
        await plane.moves.move("acme", to="two")
    await plane.servers.activate("two")
    listed = await plane.moves.list("acme")
    assert {one.state for one in listed} == {"failed"}
    assert pair.left(moving.name_prefix) == []
    assert pair.databases(moving.name_prefix) == [f"one:{acme.placement.database}"]
    assert await plane.internals.registry.databases_of(acme.id) == ()
    async with plane.session("acme") as session:
        assert await session.scalar(text("SELECT count(*) FROM big")) == 20_000


async def test_a_region_holds_and_a_server_without_logical_replication_needs_offline(
    pair: Pair, control_url: str, name_prefix: str
) -> None:
    async with opened(moving_config(pair, control_url, name_prefix)) as tenancy:
        await tenancy.servers.update("one", region="eu")
        await tenancy.tenants.create("acme", region="eu")
        with pytest.raises(PlacementError, match="two is in no region, and the tenant belongs to region eu"):
            await tenancy.moves.move("acme", to="two")
        # the database's own trigger, if the placement was not asked
        acme = await tenancy.tenants.get("acme")
        assert acme.placement is not None
        await tenancy.internals.registry.record_database(
            TenantDatabase(server="two", name="x", tenant_id=acme.id, role=acme.placement.role, state="making")
        )
        with pytest.raises(PlacementError, match="is in another region than the tenant's"):
            await tenancy.internals.registry.switch_database(
                acme, replace(acme.placement, server="two", database="x"), action="x", revision=None, kept_until=None
            )
