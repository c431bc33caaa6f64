"""A tenant's database is exchanged while it is written to: sessions wait, and none writes to the wrong one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy
from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import OperationError, TenantPausedError
from tenancy_orm.operations.switch import Paused, Switch
from tenancy_orm.provisioning.provisioner import services_of
from tenancy_orm.provisioning.server_objects import databases
from tenancy_orm.registry.databases import TenantDatabase
from tenancy_orm.routing.marker import marker_text
from tenancy_orm.tenant import Placement, Tenant
from tests.support.waiting import until


async def beside(tenancy: Tenancy, tenant: Tenant) -> Placement:
    """Record a second database of a tenant, which is not made yet."""
    assert tenant.placement is not None
    provisioner = tenancy.internals.provisioner
    placement = replace(tenant.placement, database=provisioner.names.tenant(uuid4()))
    await tenancy.internals.registry.record_database(
        TenantDatabase(
            server=placement.server, name=placement.database, tenant_id=tenant.id, role=placement.role, state="making"
        )
    )
    return placement


async def make(tenancy: Tenancy, tenant: Tenant, placement: Placement, connection: asyncpg.Connection) -> None:
    """Make the second database, as a copy of the one in use; nobody may be connected to that."""
    assert tenant.placement is not None
    provisioner = tenancy.internals.provisioner
    await databases.create(
        connection, placement.database, template=tenant.placement.database, owner=provisioner.names.owner
    )
    marker = marker_text(tenancy.internals.control.installation, tenant.id)
    await connection.execute(f"REVOKE ALL ON DATABASE {placement.database} FROM PUBLIC")
    await connection.execute(f"COMMENT ON DATABASE {placement.database} IS '{marker}'")


class Writer:
    """Writes numbers in transactions, one after the other, in a session of its own that stays open."""

    def __init__(self, tenancy: Tenancy, tenant: Tenant, name: str) -> None:
        self._tenancy, self._tenant, self._name = tenancy, tenant, name
        self.written: list[str] = []
        self.stopped = False

    async def run(self) -> None:
        async with self._tenancy.session(self._tenant.id) as session:
            while not self.stopped:
                body = f"{self._name}-{len(self.written)}"
                await session.execute(text("INSERT INTO notes (body) VALUES (:body)"), {"body": body})
                await session.commit()
                self.written.append(body)


async def test_writers_of_two_processes_go_on_in_the_other_database(
    tenancy: Tenancy, tenancy_config: TenancyConfig
) -> None:
    async with Tenancy(tenancy_config) as other:
        acme = (await tenancy.tenants.create("acme")).tenant
        placement = await beside(tenancy, acme)
        writers = [Writer(one, acme, f"{n}") for n, one in enumerate((tenancy, tenancy, other, other))]
        tasks = [asyncio.create_task(writer.run()) for writer in writers]
        await until(lambda: all(writer.written for writer in writers))
        before: list[int] = []
        async with Switch(services_of(tenancy.internals.provisioner)).pause(acme) as paused:
            before = [len(writer.written) for writer in writers]
            assert paused.ended_sessions == 0
            await make(tenancy, acme, placement, paused.connection)
            assert [len(writer.written) for writer in writers] == before
            await paused.to(placement, action="tenant.switch", revision=acme.schema_revision, kept_until=None)
        await until(lambda: all(len(w.written) > b + 2 for w, b in zip(writers, before, strict=True)))
        for writer in writers:
            writer.stopped = True
        await asyncio.gather(*tasks)
        async with tenancy.session(acme.id) as session:
            found = list(await session.scalars(text("SELECT body FROM notes")))
            assert await session.scalar(text("SELECT current_database()")) == placement.database
        assert sorted(found) == sorted(body for writer in writers for body in writer.written)
        # nobody can log in to the former database
        assert acme.placement is not None
        services = services_of(tenancy.internals.provisioner)
        former = await tenancy.internals.provisioner.connect_admin(acme.placement.server, acme.placement.database)
        try:
            may = "SELECT has_database_privilege($1, current_database(), 'CONNECT')"
            assert not await former.fetchval(may, acme.placement.role)
        finally:
            await former.close()
        assert (await services.registry.get(acme.id)).paused is False


async def test_a_pause_that_is_given_up_leaves_the_tenant_where_it_was(tenancy: Tenancy) -> None:
    acme = (await tenancy.tenants.create("acme")).tenant
    switch = Switch(services_of(tenancy.internals.provisioner))
    writer = Writer(tenancy, acme, "a")
    task = asyncio.create_task(writer.run())
    await until(lambda: writer.written)
    with pytest.raises(ZeroDivisionError):
        async with switch.pause(acme):
            raise ZeroDivisionError
    reached = len(writer.written)
    await until(lambda: len(writer.written) > reached)
    with pytest.raises(OperationError, match="did not end within"):
        async with switch.pause(acme, seconds=1.0):
            await asyncio.Event().wait()
    reached = len(writer.written)
    await until(lambda: len(writer.written) > reached)
    writer.stopped = True
    await task
    stale = replace(acme, placement=replace(acme.placement, database="other"))  # type: ignore[type-var]
    with pytest.raises(OperationError, match="was moved or restored in the meantime"):
        async with switch.pause(stale):
            pass


async def test_sessions_wait_for_a_bounded_time_and_long_transactions_are_ended(
    tenancy: Tenancy, tenancy_config: TenancyConfig
) -> None:
    acme = (await tenancy.tenants.create("acme")).tenant
    pool = tenancy_config.pool.model_copy(update={"checkout_timeout": 0.5})
    async with Tenancy(tenancy_config.replace(pool=pool)) as impatient:
        async with tenancy.session(acme.id) as long:
            await long.execute(text("INSERT INTO notes (body) VALUES ('lost')"))
            async with Switch(services_of(tenancy.internals.provisioner)).pause(acme, drain=0.2) as paused:
                assert paused.ended_sessions == 1
                with pytest.raises(TenantPausedError, match="exchanged for another one"):
                    async with impatient.session(acme.id) as session:
                        await session.execute(text("SELECT 1"))
        async with impatient.session(acme.id) as session:
            assert await session.scalar(text("SELECT count(*) FROM notes")) == 0


@pytest.mark.parametrize("protected", [False, True], ids=["without the barrier", "with the barrier"])
async def test_a_process_that_receives_nothing_cannot_write_to_the_former_database(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    """Without the barrier in PostgreSQL, what it writes after the last row was copied is lost."""
    if not protected:

        async def leave_open(*_: object) -> None:
            pass

        monkeypatch.setattr(Switch, "_close", leave_open)
        monkeypatch.setattr(Paused, "_check_closed", leave_open)
    acme = (await tenancy.tenants.create("acme")).tenant
    assert acme.placement is not None
    placement = await beside(tenancy, acme)
    admin = await tenancy.internals.provisioner.connect_admin(acme.placement.server)

    async def is_unused() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1"
        assert acme.placement is not None
        return bool(await admin.fetchval(query, acme.placement.database) == 0)

    async def write(process: Tenancy) -> None:
        async with process.transaction(acme.id) as session:
            await session.execute(text("INSERT INTO notes (body) VALUES ('late')"))

    try:
        async with Tenancy(tenancy_config) as deaf:
            await deaf.internals.directory.tenant(acme.id)
            await deaf.internals.directory._listener.close()
            tenancy.internals.router.retire(acme.id)
            await until(is_unused)
            async with Switch(services_of(tenancy.internals.provisioner)).pause(acme) as paused:
                await make(tenancy, acme, placement, paused.connection)
                late = asyncio.create_task(write(deaf))
                if protected:
                    await until(lambda: acme.id in deaf.internals.router._detours._changed)
                    assert not late.done()
                else:
                    await late
                await paused.to(placement, action="tenant.switch", revision=acme.schema_revision, kept_until=None)
            await late
    finally:
        await admin.close()
    async with tenancy.session(acme.id) as session:
        assert await session.scalar(text("SELECT count(*) FROM notes WHERE body = 'late'")) == protected
