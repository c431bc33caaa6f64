"""A tenant's role has the configured settings, and none that it has given itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from tenancy_orm.audit.log import AuditLog
from tenancy_orm.errors import ConfigurationError, ProvisioningError
from tenancy_orm.postgres import connections, locks
from tenancy_orm.provisioning import ReconcileReport
from tenancy_orm.provisioning.creation.pipeline import tenant_key
from tenancy_orm.provisioning.rights import role_settings
from tenancy_orm.provisioning.server_objects import roles
from tenancy_orm.rotation import SecretManager
from tenancy_orm.secrets.sealed import SealedPasswords
from tenancy_orm.tenant import Status, Tenant
from tests.support.postgres import ENDED, Postgres
from tests.support.provisioning import (
    Workshop,
    Workshops,
    mended,
    open_workshops,
    placement,
    plain_workshop,
    superuser_workshop,
)
from tests.support.waiting import HANGS

NOTHING = ReconcileReport()

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workshops(versioned: Postgres) -> AsyncIterator[Workshops]:
    """The workshops of that server."""
    async with open_workshops(versioned, registry=True) as opened:
        yield opened


@pytest_asyncio.fixture(params=["superuser", "plain"], loop_scope="module")
async def workshop(request: pytest.FixtureRequest, workshops: Workshops) -> AsyncIterator[Workshop]:
    """A provisioner with either kind of administrator, on every version."""
    async with workshops.workshop(request.param) as opened:
        yield opened


async def settings_of(workshop: Workshop, tenant: Tenant) -> dict[str, str]:
    """What the catalogue has for the tenant's role."""
    async with workshop.admin() as connection:
        found = await role_settings.read(connection, placement(tenant).role)
    assert found[placement(tenant).role].databases == []
    return found[placement(tenant).role].settings


async def shown(workshop: Workshop, tenant: Tenant, name: str) -> str:
    """What a new session of the tenant's role has."""
    async with workshop.connect(tenant) as connection:
        return str(await connection.fetchval(f"SHOW {name}"))


# --- what a role is given -------------------------------------------------------------------------------------------


async def test_every_session_of_a_new_role_is_bounded(workshop: Workshop, versioned: Postgres) -> None:
    """The bounds apply to every program that logs in; ``transaction_timeout`` if the server knows it."""
    tenant = await workshop.create("acme")
    assert await shown(workshop, tenant, "idle_in_transaction_session_timeout") == "5min"
    async with workshop.admin() as connection:
        version = connections.version(connection)
        superuser = await roles.is_superuser(connection)
    if version >= 17:
        assert await shown(workshop, tenant, "transaction_timeout") == "1h"
    assert await shown(workshop, tenant, "temp_file_limit") == ("10GB" if superuser else "-1")
    assert (await settings_of(workshop, tenant))["work_mem"] == "4096kB"
    assert await workshop.provisioner.reconcile() == NOTHING


async def test_a_limit_on_temporary_files_needs_a_right_that_is_named_once(
    versioned: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """An administrator without the right sets the other settings; after the GRANT, reconcile sets this one."""
    async with plain_workshop(versioned) as workshop:
        with caplog.at_level(logging.WARNING):
            first = await workshop.create("acme")
            await workshop.create("globex")
        async with workshop.admin() as connection:
            administrator = await connection.fetchval("SELECT current_user::text")
        statement = f'GRANT SET ON PARAMETER "temp_file_limit" TO "{administrator}"'
        assert caplog.text.count(statement) == 1
        assert await workshop.provisioner.reconcile() == NOTHING
        async with versioned.connect() as superuser:
            await superuser.execute(statement)
        report = await workshop.provisioner.reconcile()
        assert mended(report) == {"acme": {"role.settings"}, "globex": {"role.settings"}}
        assert await shown(workshop, first, "temp_file_limit") == "10GB"
        async with workshop.connect(first) as connection:
            for change in ("SET temp_file_limit = -1", "ALTER ROLE CURRENT_USER SET temp_file_limit = -1"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(change)


async def test_the_configuration_wins_over_the_defaults(versioned: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    """A value replaces one, "" removes one, others are added; a name that the server does not know is logged."""
    given = {
        "Work_Mem": "8MB",
        "temp_file_limit": "",
        "search_path": 'public, "odd, schema", "$user"',
        "idle_in_transaction_session_timeout": "1 min",
        "tenancy_test.note": "it's \\ fine",
        "no_such_setting": "1",
    }
    async with superuser_workshop(versioned, provisioning={"role_settings": given}) as workshop:
        with caplog.at_level(logging.WARNING):
            tenant = await workshop.create("acme")
        assert "does not know the setting no_such_setting" in caplog.text
        found = await settings_of(workshop, tenant)
        assert found.keys() - {"transaction_timeout"} == {name.lower() for name in given} - {
            "temp_file_limit",
            "no_such_setting",
        }
        assert (found["work_mem"], found["tenancy_test.note"]) == ("8MB", "it's \\ fine")
        assert await shown(workshop, tenant, "temp_file_limit") == "-1"
        assert await workshop.provisioner.reconcile() == NOTHING


# --- what it has given itself ---------------------------------------------------------------------------------------


def manager(workshop: Workshop) -> SecretManager:
    """What rotates passwords."""
    audit = AuditLog(workshop.control)
    return SecretManager(
        config=workshop.config,
        registry=workshop.registry,
        sealed=SealedPasswords(workshop.control, audit, workshop.keyring),
        servers=workshop.servers,
        keyring=workshop.keyring,
        names=workshop.names,
    )


async def by_reconcile(workshop: Workshop, tenant: Tenant) -> None:
    report = await workshop.provisioner.reconcile()
    assert mended(report) == {tenant.slug: {"role.settings"}}


async def by_align(workshop: Workshop, tenant: Tenant) -> None:
    await workshop.provisioner.align(tenant, timeout=20)


async def by_rotation(workshop: Workshop, tenant: Tenant) -> None:
    secrets = manager(workshop)
    try:
        await secrets.rotate_password(tenant)
    finally:
        await secrets.close()


Mend = Callable[[Workshop, Tenant], Awaitable[None]]
mended_by = pytest.mark.parametrize("mend", [by_reconcile, by_align, by_rotation])


@mended_by
async def test_what_a_role_has_set_for_itself_goes(workshop: Workshop, mend: Mend) -> None:
    """Settings of the role, for any database, are removed; another role keeps its own."""
    tenant, other = await workshop.create("acme"), await workshop.create("globex")
    before, theirs = await settings_of(workshop, tenant), await settings_of(workshop, other)
    async with workshop.connect(tenant) as connection:
        for change in (
            "SET statement_timeout = '1ms'",
            "SET default_transaction_read_only = on",
            "SET search_path = nowhere",
            "SET idle_in_transaction_session_timeout = 0",
            f"IN DATABASE \"{placement(tenant).database}\" SET work_mem = '1GB'",
            f"IN DATABASE \"{placement(other).database}\" SET work_mem = '1GB'",
            "IN DATABASE \"postgres\" SET work_mem = '1GB'",
        ):
            await connection.execute(f"ALTER ROLE CURRENT_USER {change}")
    async with workshop.connect(tenant) as connection:  # the attack outlives the session
        with pytest.raises(asyncpg.PostgresError):
            await connection.execute("SET statement_timeout = 0; INSERT INTO public.notes (body) VALUES ('x')")
    await mend(workshop, tenant)
    tenant = await workshop.registry.get(tenant.id)
    assert await settings_of(workshop, tenant) == before
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('x')")
        assert await connection.fetchval("SHOW work_mem") == "4MB"
    assert await settings_of(workshop, other) == theirs
    assert await workshop.provisioner.reconcile() == NOTHING


async def test_what_a_role_has_reset_comes_back(workshop: Workshop) -> None:
    """A setting that the role has reset is set again."""
    tenant = await workshop.create("acme")
    before = await settings_of(workshop, tenant)
    async with workshop.connect(tenant) as connection:
        await connection.execute("ALTER ROLE CURRENT_USER RESET ALL")
    assert await settings_of(workshop, tenant) != before
    await by_reconcile(workshop, tenant)
    assert await settings_of(workshop, tenant) == before


@mended_by
async def test_a_role_cannot_keep_its_settings_by_holding_their_rows(workshop: Workshop, mend: Mend) -> None:
    """If an open transaction of the role blocks the change, its session is ended."""
    tenant = await workshop.create("acme")
    before = await settings_of(workshop, tenant)
    mine = "ALTER ROLE CURRENT_USER SET work_mem = '1GB'; ALTER ROLE CURRENT_USER IN DATABASE postgres SET jit = off"
    async with workshop.connect(tenant) as connection:
        await connection.execute(mine)
        await connection.execute(f"BEGIN; {mine}")
        async with workshop.admin() as admin:
            for change in ("RESET work_mem", "IN DATABASE postgres RESET ALL"):
                with pytest.raises(asyncpg.LockNotAvailableError):
                    await admin.execute(f'SET lock_timeout = 50; ALTER ROLE "{placement(tenant).role}" {change}')
        await mend(workshop, tenant)
        with pytest.raises(ENDED):
            await connection.execute("COMMIT")
    assert await settings_of(workshop, await workshop.registry.get(tenant.id)) == before


async def test_a_role_cannot_keep_its_password_by_holding_its_row(workshop: Workshop) -> None:
    """The rotation ends the session that blocks it."""
    tenant = await workshop.create("acme")
    async with workshop.connect(tenant) as connection:
        await connection.execute("BEGIN; ALTER ROLE CURRENT_USER PASSWORD 'mine'")
        async with workshop.admin() as admin:
            with pytest.raises(asyncpg.LockNotAvailableError):
                await admin.execute(f"SET lock_timeout = '50ms'; ALTER ROLE \"{placement(tenant).role}\" PASSWORD 'x'")
        async with asyncio.timeout(HANGS):
            await by_rotation(workshop, tenant)
    async with workshop.connect(await workshop.registry.get(tenant.id)) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_open_work_of_others_is_not_ended(workshop: Workshop) -> None:
    """Only sessions that block the change are ended, not the role's others, nor another role's."""
    tenant, other = await workshop.create("acme"), await workshop.create("globex")
    async with (
        workshop.connect(tenant) as resisting,
        workshop.connect(tenant) as own,
        workshop.connect(other) as theirs,
    ):
        await own.execute("BEGIN; INSERT INTO notes (body) VALUES ('kept')")
        await theirs.execute("BEGIN; ALTER ROLE CURRENT_USER SET work_mem = '1GB'")
        await resisting.execute("BEGIN; ALTER ROLE CURRENT_USER SET work_mem = '1GB'")
        await by_align(workshop, tenant)
        await own.execute("COMMIT")
        await theirs.execute("ROLLBACK")
        assert await own.fetchval("SELECT body FROM notes") == "kept"


async def test_what_is_interrupted_goes_on_from_there(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings for many databases are removed in batches, so an interrupted call makes progress."""
    monkeypatch.setattr(role_settings, "_BATCH", 2)
    tenant = await workshop.create("acme")
    role = placement(tenant).role
    async with workshop.admin() as admin:
        names = [row["datname"] for row in await admin.fetch("SELECT datname FROM pg_database")]
        names.sort()
        assert len(names) > 3
        async with workshop.connect(tenant) as connection:
            for name in names:
                await connection.execute(f"ALTER ROLE CURRENT_USER IN DATABASE \"{name}\" SET work_mem = '1GB'")
        await admin.execute(f'BEGIN; ALTER ROLE "{role}" IN DATABASE "{names[-1]}" SET jit = off')
        with pytest.raises(ProvisioningError):
            await workshop.provisioner.align(tenant, timeout=2)
        await admin.execute("ROLLBACK")
        left = (await role_settings.read(admin, role))[role].databases
        assert sorted(left) == names[-(len(names) % 2 or 2) :]
    await by_align(workshop, tenant)
    await settings_of(workshop, tenant)  # which has none for a database


async def test_a_value_that_postgresql_refuses_is_named(workshop: Workshop) -> None:
    """A value that PostgreSQL refuses is an error before a tenant is created."""
    refusing = workshop.provisioner_of(provisioning={"role_settings": {"work_mem": "lots"}})
    with pytest.raises(ConfigurationError, match="'work_mem'"):
        await refusing.create(workshop.draft("acme"), key=None)
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def test_a_value_that_postgresql_refuses_keeps_nobody_from_being_suspended(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    """Suspending and rotating a password succeed; the log has what was not done."""
    tenant = await workshop.create("acme")
    workshop.config = workshop.config.replace(provisioning={"role_settings": {"work_mem": "lots"}})
    await by_rotation(workshop, tenant)
    tenant = await workshop.registry.get(tenant.id)
    async with workshop.connect(tenant) as connection:
        assert await connection.fetchval("SELECT 1") == 1
    assert [record.levelname for record in caplog.records if "settings" in record.message] == ["ERROR"]
    _, suspended = await workshop.registry.transition(tenant.id, Status.SUSPENDED, action="tenant.update")
    refusing = workshop.provisioner_of()
    await refusing.align(suspended)
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        async with workshop.connect(suspended):
            pass
    assert [record.levelname for record in caplog.records if "settings" in record.message] == ["ERROR", "ERROR"]


# --- members --------------------------------------------------------------------------------------------------------


async def members(workshop: Workshop) -> list[Any]:
    """Who is in which of the installation's roles, and vice versa."""
    query = (
        "SELECT a.* FROM pg_auth_members a JOIN pg_roles r ON r.oid IN (a.roleid, a.member) "
        "WHERE starts_with(r.rolname::text, $1) ORDER BY a"
    )
    async with workshop.admin() as connection:
        return list(await connection.fetch(query, workshop.names.tenant_stem))


async def test_a_role_keeps_no_members(workshop: Workshop) -> None:
    """Members of the role are removed, except the administrator; before PostgreSQL 15 a role may add members itself."""
    tenant, other = await workshop.create("acme"), await workshop.create("globex")
    before = await members(workshop)
    statement = f'GRANT "{placement(tenant).role}" TO "{placement(other).role}" WITH ADMIN OPTION'
    async with workshop.connect(tenant) as connection, workshop.connect(other) as neighbour:
        if connections.version(connection) >= 15:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
        async with workshop.admin() as admin:
            await admin.execute(statement)
        await neighbour.execute(f'SET ROLE "{placement(tenant).role}"')
        assert await neighbour.fetchval("SELECT current_user") == placement(tenant).role
    assert mended(await workshop.provisioner.reconcile()) == {"acme": {"role.settings"}}
    assert await members(workshop) == before
    assert await workshop.provisioner.reconcile() == NOTHING


async def test_what_was_granted_by_hand_goes(workshop: Workshop, versioned: Postgres, caplog: Any) -> None:
    """Memberships are revoked; if the administrator may not, a warning has the statement."""
    tenant = await workshop.create("acme")
    before = await members(workshop)
    role, group = placement(tenant).role, versioned.new_name("group")
    async with versioned.connect() as superuser:
        await superuser.execute(f'CREATE ROLE "{group}"; GRANT "{group}" TO "{role}"; GRANT pg_monitor TO "{role}"')
        with caplog.at_level(logging.WARNING):
            report = await workshop.provisioner.reconcile()
        left = {
            row["granted"]
            for row in await superuser.fetch(
                "SELECT roleid::regrole::text AS granted FROM pg_auth_members WHERE member = $1::regrole", f'"{role}"'
            )
        }
        async with workshop.admin() as connection:
            if await roles.is_superuser(connection):
                assert (mended(report), left) == ({"acme": {"role.settings"}}, set())
                assert await members(workshop) == before
            elif connections.version(connection) >= 16:
                (found,) = report.differences
                assert (found.kind, found.dangerous, found.mended, report.complete) == (
                    "role.settings",
                    True,
                    False,
                    False,
                )
                assert left == {group, "pg_monitor"}
                statement = f'REVOKE "{group}" FROM "{role}" GRANTED BY'
                assert statement in caplog.text and statement in found.remedy
                # what the report says, a superuser can run
                await superuser.execute(found.remedy)
                assert await workshop.provisioner.reconcile() == NOTHING
        await superuser.execute(f'DROP ROLE "{group}"; REVOKE pg_monitor FROM "{role}"')


async def test_what_a_superuser_has_set_is_told_and_not_called_corrected(versioned: Postgres) -> None:
    """An administrator who may not remove it leaves it, and the report has what a superuser can run."""
    async with plain_workshop(versioned) as workshop:
        tenant = await workshop.create("acme")
        async with versioned.connect() as superuser:
            await superuser.execute(f"ALTER ROLE \"{placement(tenant).role}\" SET log_statement = 'all'")
            report = await workshop.provisioner.reconcile()
            (found,) = report.differences
            assert (report.corrected, found.kind, found.mended, found.dangerous) == ((), "role.settings", False, False)
            assert (await settings_of(workshop, tenant))["log_statement"] == "all"
            await superuser.execute(found.remedy)
        assert await workshop.provisioner.reconcile() == NOTHING


async def test_a_tenant_that_is_being_created_is_left_alone(workshop: Workshop) -> None:
    """A tenant's role is not changed while its creation holds the lock."""
    tenant = await workshop.create("acme")
    async with workshop.connect(tenant) as connection:
        await connection.execute("ALTER ROLE CURRENT_USER SET work_mem = '1GB'")
    async with workshop.admin() as connection:
        await locks.lock(connection, tenant_key(tenant.id), timeout=5)
        assert await workshop.provisioner.reconcile() == NOTHING
    assert (await settings_of(workshop, tenant))["work_mem"] == "1GB"
