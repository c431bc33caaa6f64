"""Temporary logins: prolonged while they are used, ended for good when they are, and watched like the tenant's role."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from tenancy_orm.context import bind
from tenancy_orm.control.names import is_installations
from tenancy_orm.errors import ConfigurationError, CrossTenantError
from tests.support.postgres import ENDED
from tests.support.provisioning import Workshop, placement
from tests.support.waiting import until


async def test_a_login_lasts_as_long_as_its_use_and_not_longer(workshop: Workshop) -> None:
    """Its expiry is moved on; that does not bring back one that was ended."""
    tenant = await workshop.create("acme")
    logins = workshop.provisioner.logins
    async with workshop.admin() as admin, logins.open(tenant, seconds=1) as login:

        async def has_passed() -> bool:
            return bool(await admin.fetchval("SELECT clock_timestamp() > $1", login.expires_at))

        async def state() -> Any:
            query = "SELECT rolcanlogin, rolvaliduntil > $2 FROM pg_roles WHERE rolname = $1"
            return tuple(await admin.fetchrow(query, login.role, login.expires_at))

        await until(has_passed)
        await (await asyncpg.connect(login.url)).close()
        assert await state() == (True, True)
        await workshop.set_login(tenant, False)
        ended = await state()
        assert ended == (False, False)
        await workshop.set_login(tenant, True)
        # two more turns of the task that prolongs
        moment = await admin.fetchval("SELECT clock_timestamp() + interval '1 s'")
        await until(lambda: admin.fetchval("SELECT clock_timestamp() > $1", moment))
        assert await state() == ended
        with pytest.raises(asyncpg.PostgresError):
            await asyncpg.connect(login.url)
    # one that is prolonged no more, since its process has died
    dead = await logins.issue(tenant, seconds=1)
    connection: Any = await asyncpg.connect(dead.url)
    async with workshop.admin() as admin:
        await until(lambda: admin.fetchval("SELECT clock_timestamp() > $1", dead.expires_at))
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(dead.url)
    # what is connected stays so until housekeeping comes
    assert await connection.fetchval("SELECT 1") == 1
    assert (await workshop.provisioner.reconcile(thorough=False)).orphans == (dead.role,)
    with pytest.raises(ENDED):
        await connection.fetch("SELECT 1")


async def test_its_sessions_are_bounded_like_the_tenants(workshop: Workshop) -> None:
    """The watchdog ends them, and blames the tenant; they do not keep administration waiting."""
    tenant, other = await workshop.create("acme"), await workshop.create("globex")
    assert tenant.placement is not None
    watching = workshop.provisioner_of(watchdog={"max_idle_transaction_seconds": 0.01})
    async with workshop.provisioner.logins.open(tenant) as login:
        assert workshop.names.role_of(login.role) == placement(tenant).role
        assert workshop.names.parse(login.role) is None
        assert is_installations(login.role)
        connection: Any = await asyncpg.connect(login.url)
        await connection.execute("BEGIN; SELECT 1")

        async def ended() -> bool:
            report = await watching.end_excessive_sessions()
            assert report.errors == ()
            return [one.tenant_id for one in report.ended] == [tenant.id]

        await until(ended)
        blocking: Any = await asyncpg.connect(login.url)
        # the rows of its own role, which a purge changes
        await blocking.execute("BEGIN; LOCK TABLE notes IN ACCESS SHARE MODE")
        with bind(other), pytest.raises(CrossTenantError):
            await workshop.provisioner.logins.issue(tenant)
        with bind(other), pytest.raises(CrossTenantError):
            await workshop.provisioner.logins.drop(tenant, login.role)
        with pytest.raises(ConfigurationError):
            await workshop.provisioner.logins.drop(other, login.role)
        await workshop.set_login(tenant, False)
    assert not [name for name in await workshop.present() if name.startswith(f"{tenant.placement.role}_")]
