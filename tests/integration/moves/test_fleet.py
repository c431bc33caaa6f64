"""Many moves: a server that is emptied, a plan, and what housekeeping does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import ServerAddresses
from tenancy_orm.config.placement import LeastBytes
from tenancy_orm.errors import OperationError, OperationStateError, TenancyError
from tenancy_orm.moves import MovePlan, upkeep
from tenancy_orm.operations import Switch
from tenancy_orm.provisioning.provisioner import services_of
from tenancy_orm.tenant import Placement
from tests.support.moving import Pair, moving_config, pair_of_servers, rows
from tests.support.replication import standby_of
from tests.support.waiting import until

pytestmark = pytest.mark.new_installation


async def test_a_server_in_drain_is_emptied_and_its_moves_confirmed_when_they_are_due(
    plane: Tenancy, moving: TenancyConfig, pair: Pair
) -> None:
    for slug in ("acme", "globex", "hooli"):
        await plane.tenants.create(slug)
    await plane.tenants.suspend("globex", reason="unpaid")
    await plane.tenants.delete("hooli")
    with pytest.raises(OperationError, match="takes new tenants; first run: tenancy servers drain one"):
        await plane.moves.move_all("one", to="two")
    await plane.servers.drain("one")
    report = await plane.moves.move_all("one", to="two", concurrency=3)
    assert {one.slug: (one.moved_to, one.error) for one in report.outcomes} == {
        "acme": ("two", None),
        "globex": ("two", None),
        "hooli": ("two", None),
    }
    acme, globex = await plane.tenants.get("acme"), await plane.tenants.get("globex")
    assert pair.writable(acme) == ["two"]
    assert pair.writable(globex) == []  # it is suspended there as well
    await plane.tenants.activate("globex")
    async with plane.session("globex") as session:
        assert await session.scalar(text("SELECT count(*) FROM notes")) == 0
    # a deleted tenant's is confirmed at once, since a purge removes what is in use; the others' when they are due
    tidied = await plane.moves.tidy()
    assert (len(tidied.confirmed), tidied.errors) == (1, ())
    await until_following(plane)
    over = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    async with plane.internals.control.transaction() as connection:
        statement = (
            "UPDATE tenancy.operations SET detail = detail || jsonb_build_object('confirm_by', CAST(:by AS text))"
        )
        await connection.execute(text(statement), {"by": over})
    await plane.run_housekeeping()
    assert {one.state for one in await plane.moves.list()} == {"done"}
    assert pair.left(moving.name_prefix) == []
    assert [name for name in pair.databases(moving.name_prefix) if name.startswith("one:")] == []


@asynccontextmanager
async def opened(config: TenancyConfig) -> AsyncIterator[Tenancy]:
    """An open ``Tenancy``."""
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    try:
        yield tenancy
    finally:
        await tenancy.close()


async def until_following(plane: Tenancy) -> None:
    """Wait until every former database has followed."""

    async def follows() -> bool:
        moves = await plane.moves.list()
        return all(one.state == "done" or one.detail.get("reverse") == "following" for one in moves)

    await until(follows, seconds=60.0)


async def test_a_way_back_that_fills_the_disk_is_given_up_and_what_is_left_over_is_removed(
    plane: Tenancy, moving: TenancyConfig, pair: Pair
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    operation = await plane.moves.move("acme", to="two")
    # it does not follow any more, and what is written is kept for it
    name = f"{plane.internals.provisioner.names.stream_stem}{operation.id}r"
    rows(pair.one, acme.placement.database, f"ALTER SUBSCRIPTION {name} DISABLE")
    await until(
        lambda: rows(pair.two, "postgres", "SELECT active FROM pg_replication_slots") == [(False,)], seconds=60.0
    )
    rows(pair.two, "postgres", "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))")
    assert (await plane.moves.tidy()).given_up == ()
    small = moving.move.model_copy(update={"max_slot_bytes": 100_000})
    async with Tenancy(moving.replace(move=small)) as strict:
        assert (await strict.moves.tidy()).given_up == (operation.id,)
        with pytest.raises(OperationStateError, match=r"does not follow \(it kept .* bytes of the log"):
            await strict.moves.rollback("acme")
    await plane.moves.confirm("acme")
    # of a move that nobody knows any more: a control database that was restored from a backup, for example
    stem = plane.internals.provisioner.names.stream_stem
    moved = await plane.tenants.get("acme")
    assert moved.placement is not None
    rows(pair.two, moved.placement.database, f"SELECT pg_create_logical_replication_slot('{stem}999f', 'pgoutput')")
    login = plane.internals.provisioner.names.replicator(999, "f")
    rows(pair.two, "postgres", f'CREATE ROLE "{login}" LOGIN REPLICATION')
    assert (await plane.moves.tidy()).removed == (f"login {login} on two", f"slot {stem}999f on two")
    assert pair.left(moving.name_prefix) == []


async def let_go(tenancy: Tenancy) -> None:
    """Have every claim run out, as that of a killed process does."""
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.operations SET claimed_until = now() WHERE claim IS NOT NULL"))


async def test_a_former_server_that_is_lost_fills_no_disk_and_blocks_nothing_once_it_is_removed(
    control_url: str, name_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Switch.close_kept
    with pair_of_servers() as pair:
        config = moving_config(pair, control_url, name_prefix)
        async with opened(config) as tenancy:
            await tenancy.tenants.create("acme")

            async def lose(switch: Switch, placement: Placement, *, mark: str | None) -> None:
                monkeypatch.undo()
                await asyncio.to_thread(pair.one.kill)
                await close(switch, placement, mark=mark)

            monkeypatch.setattr(Switch, "close_kept", lose)
            with pytest.raises(TenancyError):
                await tenancy.moves.move("acme", to="two")
            moved = await tenancy.tenants.get("acme")
            assert pair.on("two").query("SELECT count(*) FROM pg_replication_slots") == 1
            pair.two.query("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))")
            (move,) = await tenancy.moves.list("acme")
        small = config.move.model_copy(update={"max_slot_bytes": 100_000})
        async with opened(config.replace(move=small)) as tenancy:
            await let_go(tenancy)
            tidied = await tenancy.moves.tidy()
            assert (tidied.given_up, tidied.resumed) == ((move.id,), ())
            assert any("server one" in one or "server 'one'" in one for one in tidied.errors)
            assert pair.on("two").query("SELECT count(*) FROM pg_replication_slots") == 0
            await let_go(tenancy)
        # it does not exist any more
        servers = {"two": pair.two.url("postgres")}
        async with opened(
            moving_config(
                pair,
                control_url,
                name_prefix,
                servers=servers,
                default_server="two",
                encryption_keys=config.encryption_keys,
            )
        ) as tenancy:
            await tenancy.servers.remove("one", templates="forget")
            assert (await tenancy.moves.tidy()).resumed == (move.id,)
            assert (await tenancy.moves.confirm("acme")).state == "done"
            async with tenancy.session("acme") as session:
                assert await session.scalar(text("SELECT count(*) FROM notes")) == 0
        assert moved.placement is not None
        assert moved.placement.server == "two"


async def test_sessions_on_a_replica_of_the_former_server_are_ended(control_url: str, name_prefix: str) -> None:
    """Who was not told of the move would go on reading what does not change any more."""
    # at least what the primary has
    settings = {"max_prepared_transactions": "5", "max_wal_senders": "20"}
    with pair_of_servers() as pair, standby_of(pair.one, settings=settings) as standby:
        one = ServerAddresses(admin=pair.one.url("postgres"), replicas=(f"postgresql://127.0.0.1:{standby.port}",))
        servers = {"one": one, "two": pair.two.url("postgres")}
        async with opened(moving_config(pair, control_url, name_prefix, servers=servers)) as tenancy:
            acme = (await tenancy.tenants.create("acme")).tenant
            assert acme.placement is not None
            place = acme.placement
            keyring = services_of(tenancy.internals.provisioner).keyring
            password = keyring.open_password(acme.id, place.sealed_password)
            deaf: list[psycopg.Connection[Any]] = []

            def log_in() -> bool:
                with suppress(psycopg.OperationalError):  # until it has replayed the creation
                    url = standby.url(place.database)
                    deaf.append(psycopg.connect(url, user=place.role, password=password, autocommit=True))
                return bool(deaf)

            await until(log_in)
            assert deaf[0].execute("SELECT count(*) FROM notes").fetchone() == (0,)
            await tenancy.moves.move("acme", to="two")
            with pytest.raises(psycopg.OperationalError):
                deaf[0].execute("SELECT count(*) FROM notes")
            deaf[0].close()
            deaf.clear()
            assert not log_in()


async def test_housekeeping_looks_at_every_move_and_at_a_slot_whose_log_is_gone(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_PAGE", 1)
    for slug in ("acme", "globex"):
        await plane.tenants.create(slug)
        await plane.moves.move(slug, to="two")
    lost = await plane.moves.list("acme")
    assert lost[0].state == "waiting"
    name = f"{plane.internals.provisioner.names.stream_stem}{lost[0].id}r"
    former = lost[0].detail["from"]["database"]
    rows(pair.one, former, f"ALTER SUBSCRIPTION {name} DISABLE")
    await until(
        lambda: (
            rows(pair.two, "postgres", f"SELECT active FROM pg_replication_slots WHERE slot_name = '{name}'")
            == [(False,)]
        ),
        seconds=60.0,
    )
    # the server removes what it keeps for the slot
    pair.two.query("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    pair.two.query("SELECT pg_reload_conf()")
    try:

        def is_lost() -> bool:
            pair.two.query("SELECT pg_switch_wal() FROM pg_logical_emit_message(false, 'x', repeat('x', 1000000))")
            pair.two.query("CHECKPOINT")
            query = f"SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{name}'"
            return rows(pair.two, "postgres", query) == [("lost",)]

        await until(is_lost, seconds=60.0)
    finally:
        pair.two.query("ALTER SYSTEM RESET max_slot_wal_keep_size")
        pair.two.query("SELECT pg_reload_conf()")
    assert (await plane.moves.tidy()).given_up == (lost[0].id,)
    with pytest.raises(OperationStateError, match=r"does not follow \(its slot is gone, or"):
        await plane.moves.rollback("acme")
    for slug in ("acme", "globex"):
        await plane.moves.confirm(slug)


async def test_a_plan_empties_servers_in_drain_relieves_full_ones_and_shares_out_the_rest(
    plane: Tenancy, pair: Pair, moving: TenancyConfig
) -> None:
    def told(plan: MovePlan) -> list[tuple[str, str | None]]:
        return [(one.moved_from, one.moved_to) for one in plan.moves]

    for number in range(4):
        await plane.tenants.create(f"tenant-{number}")
    plan = await plane.moves.plan()
    assert told(plan) == [("one", "two"), ("one", "two")]
    assert plan.moves[0].reason == "one holds 100% of the tenants, and its weight is 50%; two holds 0%"
    assert [(one.server, one.tenants, one.tenants_after) for one in plan.servers] == [("one", 4, 2), ("two", 0, 2)]
    assert len((await plane.moves.plan(limit=1)).moves) == 1
    await plane.servers.update("one", weight=3.0)
    assert told(await plane.moves.plan()) == [("one", "two")]
    await plane.servers.update("one", capacity=1)
    full = await plane.moves.plan()
    assert [one.reason for one in full.moves] == ["one holds 4 tenants, and may hold 1"] * 3
    await plane.servers.update("two", capacity=2)
    await plane.servers.drain("one")
    drained = await plane.moves.plan()
    assert [one.reason for one in drained.moves] == ["one is in drain"] * 2
    assert sorted(drained.stuck) == ["tenant-2", "tenant-3"]
    assert drained.stuck["tenant-3"] == "one is in drain; two is full"
    async with Tenancy(moving.replace(placement=LeastBytes(), default_server=None)) as by_size:
        # no sizes are known, so nothing is uneven
        assert len((await by_size.moves.plan()).moves) == 2
    report = await plane.moves.apply(await plane.moves.plan(limit=1))
    assert [one.moved_to for one in report.outcomes] == ["two"]
    await plane.moves.confirm(report.outcomes[0].slug)


async def test_an_administrator_who_is_no_superuser_moves_tenants(
    pair: Pair, control_url: str, name_prefix: str
) -> None:
    """With CREATEDB, CREATEROLE, REPLICATION and pg_create_subscription; without the last, the remedy is named."""
    admin = f"{name_prefix}_admin"
    for server in (pair.one, pair.two):
        rows(server, "postgres", f"CREATE ROLE {admin} LOGIN CREATEDB CREATEROLE REPLICATION PASSWORD 'secret'")
        rows(server, "postgres", f"GRANT CONNECT ON DATABASE postgres TO {admin}")
        rows(server, "postgres", f"GRANT pg_read_all_stats, pg_signal_backend TO {admin}")
    addresses = {
        name: ServerAddresses(admin=f"postgresql://{admin}:secret@127.0.0.1:{pair.on(name).port}/postgres")
        for name in ("one", "two")
    }
    config = moving_config(pair, control_url, name_prefix, servers=addresses)
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    try:
        await tenancy.tenants.create("acme")
        with pytest.raises(OperationError, match="GRANT pg_create_subscription TO"):
            await tenancy.moves.move("acme", to="two")
        for server in (pair.one, pair.two):
            rows(server, "postgres", f"GRANT pg_create_subscription TO {admin}")
        async with tenancy.session("acme") as session:
            await session.execute(text("INSERT INTO notes (body) VALUES ('kept')"))
            await session.commit()
        operation = await tenancy.moves.move("acme", to="two")
        assert operation.detail["reverse"] == "following"
        await tenancy.moves.rollback("acme")
        async with asyncio.timeout(60), tenancy.session("acme") as session:
            assert await session.scalar(text("SELECT body FROM notes")) == "kept"
    finally:
        await tenancy.close()
    assert pair.left(name_prefix) == []
