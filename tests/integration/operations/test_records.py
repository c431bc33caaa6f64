"""Records of operations, and the switch between a tenant's databases, on a real control database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy
from tenancy_orm.errors import (
    JobLostError,
    OperationConflictError,
    OperationNotFoundError,
    OperationStateError,
    PlacementError,
)
from tenancy_orm.jobs.claims import Claimant
from tenancy_orm.operations import Operations
from tenancy_orm.registry.databases import TenantDatabase
from tenancy_orm.tenant import Placement
from tests.support.waiting import until


async def test_an_operation_is_claimed_taken_over_and_ended(tenancy: Tenancy) -> None:
    acme = (await tenancy.tenants.create("acme")).tenant
    control = tenancy.internals.control
    operations, first, second = Operations(control), Claimant(), Claimant()
    begun = await operations.begin("move", acme.id, step="begun", claimant=first, detail={"to": "eu"})
    assert (begun.slug, begun.state, begun.step, begun.is_claimed) == ("acme", "running", "begun", True)
    with pytest.raises(OperationConflictError, match=f"operation {begun.id}, a move of tenant 'acme', is running"):
        await operations.begin("restore", acme.id, step="begun", claimant=second)
    with pytest.raises(OperationStateError, match="does it now"):
        await operations.claim(begun.id, second)
    advanced = await operations.advance(begun, first, "copying", detail={"rows": 3})
    assert (advanced.step, advanced.detail) == ("copying", {"to": "eu", "rows": 3})
    async with control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.operations SET claimed_until = now()"))
    assert (await operations.get(begun.id)).is_abandoned
    assert (await operations.claim(begun.id, second)).detail == advanced.detail
    for late in (operations.advance(begun, first, "switched"), operations.finish(begun, first, "done")):
        with pytest.raises(JobLostError):
            await late
    await operations.finish(begun, second, "failed", error="x\x00y")
    assert [(x.state, x.error) for x in await operations.list(tenant_id=acme.id)] == [("failed", "xy")]
    with pytest.raises(OperationStateError, match="it is failed"):
        await operations.claim(begun.id, first)
    with pytest.raises(OperationNotFoundError):
        await operations.get(begun.id + 1)
    assert (await operations.begin("restore", acme.id, step="begun", claimant=first)).kind == "restore"


async def test_of_two_that_begin_at_once_the_later_one_sees_the_first(tenancy: Tenancy) -> None:
    """Numbers are given before the commit: else each of two exports could find itself alone."""
    acme = (await tenancy.tenants.create("acme")).tenant
    control = tenancy.internals.control
    written, go_on = asyncio.Event(), asyncio.Event()

    class Slow:
        connect = control.connect

        @asynccontextmanager
        async def transaction(self) -> AsyncIterator[Any]:
            async with control.transaction() as connection:
                yield connection
                written.set()
                await go_on.wait()

    async def begin(operations: Operations) -> tuple[int, set[int]]:
        begun = await operations.begin("export", acme.id, step="read", claimant=Claimant())
        return begun.id, {one.id for one in await Operations(control).list(tenant_id=acme.id)}

    slow: Any = Slow()
    first = asyncio.create_task(begin(Operations(slow)))
    await written.wait()
    second = asyncio.create_task(begin(Operations(control)))

    async def waits() -> bool:
        found = await control.fetch("SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        return second.done() or bool(found)

    await until(waits)
    go_on.set()
    lower, _ = await first
    higher, seen = await second
    assert lower < higher and lower in seen


async def test_a_switch_exchanges_the_database_in_use_for_a_recorded_one(tenancy: Tenancy) -> None:
    acme = (await tenancy.tenants.create("acme")).tenant
    registry, old = tenancy.internals.registry, acme.placement
    assert old is not None
    new = Placement(old.server, "new_database", old.role, old.sealed_password)
    with pytest.raises(PlacementError, match="is not one that tenant 'acme' can use"):
        await registry.switch_database(acme, new, action="x.y", revision="0002", kept_until=None)
    row = TenantDatabase(server=new.server, name=new.database, tenant_id=acme.id, role=new.role, state="making")
    await registry.record_database(row)
    await registry.record_database(row)
    assert new.database in await registry.database_names(new.server)
    after = await registry.switch_database(acme, new, action="x.y", revision="0002", kept_until=None)
    assert (after.placement, after.schema_revision) == (new, "0002")
    (kept,) = await registry.databases_of(acme.id)
    assert (kept.name, kept.state, kept.revision) == (old.database, "kept", acme.schema_revision)
    assert {new.database, old.database} <= await registry.database_names(new.server)
    with pytest.raises(PlacementError, match="was moved or restored in the meantime"):
        await registry.switch_database(acme, old, action="x.y", revision=None, kept_until=None)
    back = await registry.switch_database(after, old, action="x.y", revision=kept.revision, kept_until=None)
    assert back.placement == old
    (left,) = await registry.databases_of(acme.id)
    assert await registry.begin_dropping_database(left)
    assert [one.name for one in await registry.databases_to_drop()] == [new.database]
    with pytest.raises(PlacementError):
        await registry.switch_database(back, new, action="x.y", revision=None, kept_until=None)
    await registry.forget_database(left)
    assert await registry.databases_of(acme.id) == ()
