"""The watchdog through the public surface: housekeeping, and the command for a service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import asyncpg
import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import ControlUnavailableError
from tenancy_orm.events import SessionTerminated
from tests.acceptance.test_docs import settings
from tests.support.postgres import ENDED
from tests.support.processes import opened
from tests.support.proxy import proxied
from tests.support.shell import ROOT, environment, python_path
from tests.support.waiting import until


@pytest.fixture
def tenancy_config(tenancy_config: TenancyConfig) -> TenancyConfig:
    """A transaction may be idle for a moment."""
    return tenancy_config.replace(watchdog={"max_idle_transaction_seconds": 0.2})


@asynccontextmanager
async def idle(tenancy: Tenancy, slug: str) -> AsyncIterator[Any]:
    """A session of the tenant's own that stays idle in a transaction for longer than it may."""
    tenant = await tenancy.tenants.get(slug)
    assert tenant.placement is not None
    server = tenancy.internals.servers["default"]
    connection = await asyncpg.connect(
        host=server.host,
        port=server.port,
        user=tenant.placement.role,
        password=tenancy.internals.provisioner.password(tenant),
        database=tenant.placement.database,
    )
    try:
        await connection.execute("SET idle_in_transaction_session_timeout = 0; BEGIN; SELECT 1")
        query = "SELECT clock_timestamp() - state_change > '0.2 s' FROM pg_stat_activity WHERE pid = $1"
        admin = await server.connect_admin()
        await until(lambda: admin.fetchval(query, connection.get_server_pid()))
        await admin.close()
        yield connection
    finally:
        await connection.close()


async def test_housekeeping_looks_first(tenancy: Tenancy) -> None:
    """Housekeeping runs the watchdog first; the ended sessions are in its report."""
    acme = await tenancy.tenants.create("acme")
    async with idle(tenancy, "acme"):
        report = await tenancy.run_housekeeping()
    assert report.errors == ()
    assert next(iter(report.chores)) == "end_excessive_sessions"
    assert [one.tenant_id for one in report.chores["end_excessive_sessions"].ended] == [acme.id]


async def test_housekeeping_looks_although_the_control_database_is_away(
    tenancy: Tenancy, tenancy_config: TenancyConfig
) -> None:
    """The watchdog runs even if the control database does not answer: a tenant may be the cause."""
    await tenancy.tenants.create("acme")
    async with proxied(tenancy_config.control_url) as proxy:
        away = tenancy_config.replace(control_url=proxy.url(tenancy_config.control_url), pool={"connect_timeout": 1.0})
        async with opened(away) as other, idle(tenancy, "acme") as connection:
            told: list[SessionTerminated] = []
            other.events.subscribe(SessionTerminated, told.append)
            proxy.refuse()
            proxy.cut()
            with pytest.raises(ControlUnavailableError):
                await other.run_housekeeping()
            assert [event.reason for event in told] == ["idle_in_transaction"]
            with pytest.raises(ENDED):
                await connection.execute("COMMIT")


async def test_the_command_watches_until_it_is_stopped(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """``tenancy watch`` runs until it is stopped, ``--once`` runs once; both write to the audit log."""
    await tenancy.tenants.create("acme")
    variables = settings(tenancy_config, "tests.support.models:Base.metadata")
    variables |= {"TENANCY_WATCHDOG_MAX_IDLE_TRANSACTION_SECONDS": "0.2", "PYTHONPATH": python_path(ROOT)}
    command = (sys.executable, "-m", "tenancy_orm.cli", "watch")
    start = partial(
        asyncio.create_subprocess_exec,
        cwd=ROOT,
        env=environment(**variables),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )

    async def actors() -> list[str]:
        return [event.actor.kind for event in await tenancy.audit.events() if event.action == "session.terminate"]

    async with idle(tenancy, "acme") as connection:
        process = await start(*command, "--every", "0.1")
        try:
            await until(connection.is_closed)
            await until(actors)
            assert process.returncode is None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.communicate()
    async with idle(tenancy, "acme"):
        once = await start(*command, "--once", "--json")
        out, err = await once.communicate()
        assert once.returncode == 0, err.decode()
        assert [one["reason"] for one in json.loads(out)["ended"]] == ["idle_in_transaction"]
    assert await actors() == ["operator", "operator"]
