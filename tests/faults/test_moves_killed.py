"""SIGKILL at every step of a move, under writes: one writable copy is left, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.provisioning import ReconcileReport
from tests.support.killed import run_killed
from tests.support.move_process import POINTS
from tests.support.moving import Pair, moving_config, pair_of_servers, writing
from tests.support.waiting import until

pytestmark = pytest.mark.new_installation

SECONDS = 120.0
KEYS = {"1": "a2V5" * 10 + "a2U="}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two servers with wal_level = logical."""
    with pair_of_servers() as running:
        yield running


@pytest.fixture
def moving(pair: Pair, control_url: str, name_prefix: str) -> TenancyConfig:
    """A configuration with both servers."""
    return moving_config(pair, control_url, name_prefix, encryption_keys=KEYS)


@pytest.fixture
async def plane(moving: TenancyConfig) -> AsyncIterator[Tenancy]:
    """An open ``Tenancy``; tenants are made on server ``one``."""
    opened = Tenancy(moving)
    await opened.open(initialise=True)
    try:
        yield opened
    finally:
        await opened.close()


async def killed(moving: TenancyConfig, point: str, **task: Any) -> None:
    """Have another process move the tenant, or go back, until it kills itself."""
    names = ("control_url", "default_server", "name_prefix")
    config: dict[str, Any] = {name: getattr(moving, name) for name in names}
    config |= {"servers": dict(moving.servers or {}), "encryption_keys": KEYS}
    await run_killed("move_process", {"at": point, "config": config, **task})


async def take_over(plane: Tenancy) -> None:
    """Have housekeeping take over what the killed process has left, as if its claim had run out."""
    async with plane.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.operations SET claimed_until = now() WHERE claim IS NOT NULL"))

    async def done() -> bool:
        # PostgreSQL lets the dead process's connections go once their statements have ended
        report = await plane.moves.tidy()
        reconciled = await plane.internals.provisioner.reconcile(thorough=False)
        return not (report.errors or reconciled.errors or report.resumed) and reconciled == ReconcileReport()

    await until(done, seconds=SECONDS)


BURST = 3_000


async def test_a_move_that_is_killed_while_its_former_database_follows_repeats_nothing(
    plane: Tenancy, moving: TenancyConfig, pair: Pair
) -> None:
    """Under a burst of writes; in a table without a key, what is applied twice is there twice."""
    acme = (await plane.tenants.create("acme")).tenant
    owner = plane.internals.provisioner.names.owner
    pair.rows(acme, f'SET ROLE "{owner}"; CREATE TABLE burst (n int)')
    await killed(moving, "followed")
    moved = await plane.tenants.get("acme")
    write = f"DO $$ BEGIN FOR i IN 1..{BURST} LOOP INSERT INTO burst VALUES (i); COMMIT; END LOOP; END $$"
    burst = asyncio.create_task(asyncio.to_thread(pair.rows, moved, write))
    await until(lambda: pair.rows(acme, "SELECT count(*) > 0 FROM burst") == [(True,)], seconds=SECONDS)
    await take_over(plane)
    await burst
    (operation,) = await plane.moves.list("acme")
    assert (operation.state, operation.detail["reverse"]) == ("waiting", "following")
    assert (await plane.moves.rollback("acme")).state == "undone"
    assert pair.rows(acme, "SELECT count(*), count(DISTINCT n) FROM burst") == [(BURST, BURST)]
    assert pair.left(moving.name_prefix) == []


FORWARD = [point for point in POINTS if ":" not in point]
BACK = [point for point in POINTS if ":" in point]


@pytest.mark.parametrize("point", [*FORWARD, *BACK])
async def test_one_writable_copy_is_left_wherever_a_move_is_killed(
    plane: Tenancy, moving: TenancyConfig, pair: Pair, point: str
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    async with writing(acme, plane, each=2) as writers:
        await until(lambda: all(writer.written for writer in writers), seconds=SECONDS)
        if point in BACK:
            await plane.moves.move("acme", to="two")
        await killed(moving, point)
        # before anybody has mended anything
        assert len(pair.writable(await plane.tenants.get("acme"))) <= 1
        await take_over(plane)
        reached = [len(writer.written) for writer in writers]
        await until(lambda: all(len(w.written) > r for w, r in zip(writers, reached, strict=True)), seconds=SECONDS)
    now = await plane.tenants.get("acme")
    assert now.placement is not None
    assert pair.writable(now) == [now.placement.server]
    found = [row[0] for row in pair.rows(now, "SELECT body FROM notes")]
    assert len(found) == len(set(found))
    assert {body for writer in writers for body in writer.written} <= set(found)
    assert pair.rows(now, "SELECT last_value >= (SELECT max(id) FROM notes) FROM notes_id_seq") == [(True,)]
    (operation, *_) = await plane.moves.list("acme")
    if operation.state == "waiting":
        await plane.moves.confirm("acme")
    assert (await plane.moves.list("acme"))[0].state in ("done", "failed", "undone")
    assert await plane.moves.tidy() is not None
    assert pair.left(moving.name_prefix) == []
    assert pair.databases(moving.name_prefix) == [f"{now.placement.server}:{now.placement.database}"]
