"""The way back of a move: it loses nothing and repeats nothing, and where there is none, the move says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import OperationError, OperationStateError, ServerUnavailableError
from tenancy_orm.moves import streams
from tenancy_orm.moves.room import check_room
from tenancy_orm.moves.steps import Move
from tenancy_orm.moves.streams import Stream
from tenancy_orm.moves.way_back import UNWANTED
from tenancy_orm.tenant import Tenant
from tests.support.moving import Pair, moving_config, pair_of_servers, rows
from tests.support.waiting import until

pytestmark = pytest.mark.new_installation

COMMITS = 300


async def make_tables(plane: Tenancy, pair: Pair, tenant: Tenant, statements: str) -> None:
    """Make tables as a migration does."""
    owner = plane.internals.provisioner.names.owner
    pair.rows(tenant, f'SET ROLE "{owner}"; {statements}; SELECT 1')
    await plane.internals.provisioner.reconcile()


async def let_go(plane: Tenancy) -> None:
    """Have every claim run out, as that of a killed process does."""
    async with plane.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.operations SET claimed_until = now() WHERE claim IS NOT NULL"))


@pytest.mark.parametrize("disabled", [False, True])
async def test_an_interrupted_move_has_its_former_database_follow_from_where_it_was(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    """A subscription that is made again begins where the slot is, which has not received yet what was applied."""
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    former = acme.placement.database
    key = "(id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY)"
    await make_tables(
        plane, pair, acme, f"CREATE TABLE burst (n int); CREATE TABLE first {key}; CREATE TABLE last {key}"
    )
    first, last = (psycopg.connect(pair.one.url(former)) for _ in range(2))

    async def write(move: Move) -> None:
        first.execute("LOCK TABLE first IN SHARE MODE")
        last.execute("LOCK TABLE last IN SHARE MODE")
        with psycopg.connect(pair.two.url(move.record.new.database), autocommit=True) as writer:
            writer.execute("SET synchronous_commit = off")
            # each its own transaction, between two that the former database cannot apply as long as it is locked
            writer.execute(
                "DO $$ BEGIN INSERT INTO first DEFAULT VALUES; COMMIT; "
                f"FOR i IN 1..{COMMITS} LOOP INSERT INTO burst VALUES (i); COMMIT; END LOOP; "
                "INSERT INTO last DEFAULT VALUES; END $$"
            )
            writer.execute("SET synchronous_commit = on; SELECT pg_logical_emit_message(true, 'all of it', '')")
            end = rows(pair.two, "postgres", "SELECT pg_current_wal_lsn()::text")[0][0]
        # it is all sent, so that nothing is confirmed before it is all applied
        await until(
            lambda: pair.two.query("SELECT sent_lsn >= %s::pg_lsn FROM pg_stat_replication", (end,)), seconds=60.0
        )
        first.rollback()
        await until(lambda: rows(pair.one, former, "SELECT count(*) FROM burst") == [(COMMITS,)], seconds=60.0)
        reached = pair.one.query("SELECT remote_lsn::text FROM pg_replication_origin_status WHERE remote_lsn <> '0/0'")
        behind = "SELECT confirmed_flush_lsn < %s::pg_lsn FROM pg_replication_slots"
        assert pair.two.query(behind, (reached,)), "the attack: the slot is where it was"
        raise ConnectionResetError("the connection was lost")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Move, "_refresh_views", write)
            with pytest.raises(OperationError, match="failed at step 'switched'"):
                await plane.moves.move("acme", to="two")
        (move,) = await plane.moves.list("acme")
        if disabled:
            name = f"{plane.internals.provisioner.names.stream_stem}{move.id}r"
            rows(pair.one, former, f"ALTER SUBSCRIPTION {name} DISABLE")
            pair.one.query("SELECT pg_terminate_backend(pid) FROM pg_stat_subscription")
            await until(lambda: pair.one.query("SELECT count(pid) FROM pg_stat_subscription") == 0, seconds=60.0)
        await let_go(plane)
        tidied = await plane.moves.tidy()
        assert (tidied.resumed, tidied.errors) == ((move.id,), ())
    finally:
        first.close()
        last.close()
    (move,) = await plane.moves.list("acme")
    assert (move.state, move.detail["reverse"]) == ("waiting", "following")
    await plane.moves.rollback("acme")
    found = "SELECT count(*), count(DISTINCT n), (SELECT count(*) FROM last) FROM burst"
    assert pair.rows(acme, found) == [(COMMITS, COMMITS, 1)]


async def test_a_slot_that_a_crash_has_put_back_repeats_nothing_that_came_from_the_former_database(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot's position is on disk from the next checkpoint on; a crash before that undoes ``skip``."""
    acme = (await plane.tenants.create("acme")).tenant
    await make_tables(plane, pair, acme, "CREATE TABLE burst (n int)")
    original = Stream.create_slot

    async def create(stream: Stream, *, timeout: float) -> None:
        await original(stream, timeout=timeout)
        pair.rows(acme, "INSERT INTO burst SELECT generate_series(1, 10)")

    async def undone(*_: object) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(Stream, "create_slot", create)
    monkeypatch.setattr(Stream, "skip", undone)
    await plane.moves.move("acme", to="two")
    moved = await plane.tenants.get("acme")
    pair.rows(moved, "INSERT INTO burst VALUES (11)")
    await plane.moves.rollback("acme")
    assert pair.rows(acme, "SELECT count(*), count(DISTINCT n) FROM burst") == [(11, 11)]


@pytest.fixture
def narrow() -> Iterator[Pair]:
    """Two servers with one worker of logical replication each."""
    with pair_of_servers(settings={"max_logical_replication_workers": "1"}) as running:
        yield running


async def test_a_former_server_without_a_worker_left_is_named_and_keeps_no_slot(
    narrow: Pair, control_url: str, name_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription without a worker follows nothing, while its slot keeps the log of the new server."""
    monkeypatch.setattr(streams, "ATTACH_SECONDS", 1.0)
    slots = "SELECT count(*) FROM pg_replication_slots"
    tenancy = Tenancy(moving_config(narrow, control_url, name_prefix))
    await tenancy.open(initialise=True)
    try:
        for slug in ("acme", "globex", "hooli"):
            await tenancy.tenants.create(slug)
        await tenancy.servers.drain("one")
        with pytest.raises(OperationError, match=r"'one' has workers for 1 more .*, and 3 moves .*--no-way-back"):
            await tenancy.moves.move_all("one", to="two")
        assert await tenancy.moves.list() == ()
        (first,) = (await tenancy.moves.apply(await tenancy.moves.plan(limit=1))).outcomes
        assert first.reverse == "following"
        with pytest.raises(OperationError, match=r"for 0 more .*, and 1 moves .*, confirm moves, or"):
            await tenancy.moves.apply(await tenancy.moves.plan(limit=1))
        # one at a time, it is told; and the record says it
        told: list[str] = []
        second = await tenancy.moves.move("globex" if first.slug == "acme" else "acme", to="two", progress=told.append)
        assert told[0].startswith("there will be no way back by --rollback: server 'one' has no worker left, since")
        assert second.detail["reverse"].startswith("server 'one' has not read from server 'two' for 1 s; see its log")
        assert narrow.two.query(slots) == 1
        with pytest.raises(OperationStateError, match=r"does not follow \(server 'one' has not read"):
            await tenancy.moves.rollback(second.slug)
        (third,) = (await tenancy.moves.move_all("one", to="two", way_back=False)).outcomes
        assert (third.error, third.reverse) == (None, UNWANTED)
        assert narrow.two.query(slots) == 1
        with pytest.raises(
            OperationStateError, match=r"'one' is in drain, .* only after: tenancy servers activate one"
        ):
            await tenancy.moves.rollback(first.slug)
        await tenancy.servers.activate("one")
        assert (await tenancy.moves.rollback(first.slug)).state == "undone"
    finally:
        await tenancy.close()


async def test_a_server_that_does_not_answer_keeps_no_tenant_of_another_from_moving(plane: Tenancy, pair: Pair) -> None:
    """What its own moves need is not known before they fail."""

    async def connect(server: str) -> Any:
        if server == "two":
            raise ServerUnavailableError(server=server)
        return await plane.internals.provisioner.connect_admin(server)

    await check_room(connect, [("two", "one")] * 4)
    with pytest.raises(OperationError, match="'one' has workers for 4 more"):
        await check_room(connect, [("one", "two")] * 5)


async def test_a_truncation_that_the_former_database_cannot_repeat_ends_the_way_back(
    plane: Tenancy, pair: Pair, moving: TenancyConfig
) -> None:
    """An unlogged table is not replicated, so its reference stays; the slot would keep the log of the new server."""
    acme = (await plane.tenants.create("acme")).tenant
    statements = "CREATE TABLE customers (id int PRIMARY KEY); CREATE UNLOGGED TABLE carts (c int REFERENCES customers)"
    await make_tables(plane, pair, acme, statements)
    pair.rows(acme, "INSERT INTO customers VALUES (1); INSERT INTO carts VALUES (1)")
    told: list[str] = []
    pair.one.query("ALTER SYSTEM SET wal_retrieve_retry_interval = '100ms'")
    pair.one.query("SELECT pg_reload_conf()")
    try:
        move = await plane.moves.move("acme", to="two", progress=told.append)
        assert any(
            "refer to public.customers, so a TRUNCATE of these ends the move, or its way back" in t for t in told
        )
        moved = await plane.tenants.get("acme")
        failures = "SELECT apply_error_count FROM pg_stat_subscription_stats"
        assert (await plane.moves.tidy()).given_up == ()
        pair.rows(moved, "TRUNCATE customers, carts")
        await until(lambda: pair.one.query(failures) >= 1, seconds=60.0)
        # once may be a deadlock: it is noted
        assert (await plane.moves.tidy()).given_up == ()
        (noted,) = await plane.moves.list("acme")
        assert (noted.state, noted.detail["reverse"]) == ("waiting", "following")

        async def given_up() -> bool:
            tidied = await plane.moves.tidy()
            assert tidied.errors == ()
            return tidied.given_up == (move.id,)

        await until(given_up, seconds=60.0)
    finally:
        pair.one.query("ALTER SYSTEM RESET wal_retrieve_retry_interval")
        pair.one.query("SELECT pg_reload_conf()")
    with pytest.raises(OperationStateError, match=r"does not follow \(applying changes failed \d+ times"):
        await plane.moves.rollback("acme")
    assert pair.left(moving.name_prefix) == []
    await plane.moves.confirm("acme")


async def test_a_failure_that_is_mended_leaves_the_way_back(plane: Tenancy, pair: Pair) -> None:
    """The former database has got further since, so housekeeping leaves it alone."""
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    former = acme.placement.database
    await plane.moves.move("acme", to="two")
    moved = await plane.tenants.get("acme")
    pair.one.query("ALTER SYSTEM SET wal_retrieve_retry_interval = '100ms'")
    pair.one.query("SELECT pg_reload_conf()")
    try:
        rows(pair.one, former, "INSERT INTO notes (id, body) VALUES (1, 'in the way')")
        pair.rows(moved, "INSERT INTO notes (id, body) VALUES (1, 'replicated')")
        failures = "SELECT apply_error_count FROM pg_stat_subscription_stats"
        await until(lambda: pair.one.query(failures) >= 1, seconds=60.0)
        assert (await plane.moves.tidy()).given_up == ()
        rows(pair.one, former, "DELETE FROM notes")
        await until(lambda: rows(pair.one, former, "SELECT body FROM notes") == [("replicated",)], seconds=60.0)
        assert (await plane.moves.tidy()).given_up == ()
    finally:
        pair.one.query("ALTER SYSTEM RESET wal_retrieve_retry_interval")
        pair.one.query("SELECT pg_reload_conf()")
    await plane.moves.rollback("acme")
    assert pair.rows(acme, "SELECT body FROM notes") == [("replicated",)]
