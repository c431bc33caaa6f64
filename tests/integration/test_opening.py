"""What an opening finds out about the servers, and what is recorded of them."""

from __future__ import annotations

import asyncio
import logging

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import ServerAddresses
from tenancy_orm.errors import ConfigurationError, UnknownServerError
from tenancy_orm.postgres import locks
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.servers.rows import list_servers, set_maintenance_database
from tenancy_orm.servers.server import Server
from tests.support.postgres import Postgres
from tests.support.proxy import proxied
from tests.support.waiting import HANGS


async def test_two_maintenance_databases_are_refused(
    tenancy_config: TenancyConfig, postgres: Postgres, empty_url: str
) -> None:
    """The first is recorded; a process that names another is refused, and an operator can change it. Audited."""
    other = Dsn.parse(empty_url).database or ""
    # why: the same lock in two databases is two locks
    async with postgres.connect() as one, postgres.connect(other) as two:
        assert await locks.try_lock(one, 7) and await locks.try_lock(two, 7)
    async with Tenancy(tenancy_config):
        pass
    elsewhere = tenancy_config.replace(servers={"default": empty_url})
    with pytest.raises(ConfigurationError) as caught:
        await Tenancy(elsewhere).open()
    assert f"names the database {other!r}, and locks on this server are taken in 'postgres'" in str(caught.value)
    assert f"tenancy servers set-maintenance-database default {other}" in str(caught.value)
    async with Tenancy(tenancy_config) as tenancy:
        control = tenancy.internals.control
        [row] = await list_servers(control)
        assert (row.name, row.maintenance_database, row.accepts_tenants, row.tenants) == (
            "default",
            "postgres",
            True,
            0,
        )
        assert await set_maintenance_database(control, tenancy.audit, "default", other) == "postgres"
        [entry] = await tenancy.audit.events(action="server.maintenance_database")
        assert (entry.before, entry.after) == (
            {"maintenance_database": "postgres"},
            {"maintenance_database": other},
        )
        with pytest.raises(UnknownServerError):
            await set_maintenance_database(control, tenancy.audit, "eu", other)
    async with Tenancy(elsewhere):
        pass
    with pytest.raises(ConfigurationError, match="names the database 'postgres'"):
        await Tenancy(tenancy_config).open()


async def test_a_tenant_is_placed_by_a_rule(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """With a second server, ``default_server`` decides; one that accepts no tenants is no default."""
    both = {"default": postgres.admin_url, "eu": postgres.admin_url}
    async with Tenancy(tenancy_config.replace(servers=both)) as tenancy:
        placement = (await tenancy.tenants.create("acme")).tenant.placement
        assert placement is not None and placement.server == "default"
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("UPDATE tenancy.servers SET accepts_tenants = (name <> 'default')"))
        with pytest.raises(ConfigurationError, match=r"server .default. accepts no new tenants.*; set default_server"):
            await tenancy.tenants.create("globex")
    async with Tenancy(tenancy_config.replace(servers=both, default_server="eu")) as tenancy:
        placement = (await tenancy.tenants.create("globex")).tenant.placement
        assert placement is not None and placement.server == "eu"
    three = {"us": postgres.admin_url, "eu": postgres.admin_url}
    async with Tenancy(tenancy_config.replace(servers=three)) as tenancy:
        with pytest.raises(ConfigurationError, match="set default_server"):
            await tenancy.tenants.create("initech")
        assert (await tenancy.tenants.list()).items[-1].slug == "globex"


async def test_another_name_prefix_is_refused(tenancy_config: TenancyConfig) -> None:
    """A tenant would be made for another owner role than the one that migrations of all the others use."""
    tenancy = await Tenancy(tenancy_config).open(initialise=True)
    await tenancy.close()
    other = tenancy_config.replace(name_prefix="other")
    for initialise in (False, True):
        with pytest.raises(ConfigurationError, match=f"set name_prefix .* to '{tenancy_config.name_prefix}'"):
            await Tenancy(other).open(initialise=initialise)
    async with Tenancy(tenancy_config) as tenancy:
        assert (await tenancy.tenants.create("acme")).tenant.slug == "acme"


async def test_a_server_that_is_away_does_not_keep_others_from_opening(
    tenancy_config: TenancyConfig, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; what its URL says is recorded."""
    away = "postgresql://admin:hunter2@127.0.0.1:1/postgres"
    config = tenancy_config.replace(servers={"default": postgres.admin_url, "eu": away})
    async with Tenancy(config) as tenancy:
        await tenancy.tenants.create("acme")
        found = {row.name: row.maintenance_database for row in await list_servers(tenancy.internals.control)}
    assert found == {"default": "postgres", "eu": "postgres"}
    assert "server eu could not be checked" in caplog.text and "hunter2" not in caplog.text


async def test_a_cap_above_what_the_server_accepts_is_a_warning(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """It names both numbers; what the server accepts is without what it reserves."""
    async with postgres.connect() as connection:
        accepted = int(await connection.fetchval("SHOW max_connections"))
        for name in ("superuser_reserved_connections", "reserved_connections"):
            accepted -= int(await connection.fetchval("SELECT coalesce(current_setting($1, true), '0')", name))
    for cap, warned in ((accepted, False), (accepted + 1, True)):
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("UPDATE tenancy.servers SET max_connections = :cap"), {"cap": cap})
        with caplog.at_level(logging.WARNING, "tenancy_orm"):
            async with Tenancy(tenancy_config):
                pass
        expected = f"the cap of server default is {cap} connections, and the server accepts {accepted}"
        assert (expected in caplog.text) is warned


async def test_a_cap_below_the_number_of_processes_is_a_warning(
    tenancy_config: TenancyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """When it is set, and when the process opens that is one too many; the remedy is named."""
    async with Tenancy(tenancy_config) as first, Tenancy(tenancy_config):
        await first.servers.update("default", max_connections=1)
        assert "the cap of server default" not in caplog.text  # the one that sets it may be a command
        async with Tenancy(tenancy_config) as third:
            expected = "the cap of server default is 1 connections, and 3 processes share it"
            assert expected in caplog.text and "--max-connections" in caplog.text
            caplog.clear()
            await third.servers.update("default", max_connections=2)
            await third.servers.update("default", weight=2.0)
            assert "the cap of server" not in caplog.text
            await third.servers.update("default", max_connections=1)
            assert "the cap of server default is 1 connections, and 2 processes share it" in caplog.text


async def test_a_statement_ends_behind_a_proxy_that_swallows_packets(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """Without ``statement_timeout`` too: after ``sessions.answer_timeout`` nobody waits for the answer."""
    async with proxied(postgres.admin_url) as proxy:
        through = tenancy_config.replace(servers={"default": proxy.url(postgres.admin_url)})
        for seconds in (0, 0.5):
            config = through.replace(sessions={"answer_timeout": seconds})
            async with Tenancy(config) as tenancy:
                if not seconds:
                    await tenancy.tenants.create("acme")
                async with tenancy.internals.router.connection(await tenancy.tenants.get("acme")) as connection:
                    await connection.scalar(text("SELECT 1"))
                    proxy.swallow()
                    statement = asyncio.ensure_future(connection.scalar(text("SELECT 2")))
                    if seconds:
                        async with asyncio.timeout(HANGS):
                            with pytest.raises((TimeoutError, DBAPIError)):
                                await statement
                    else:
                        # what happens without a deadline: nothing ends the wait
                        await asyncio.wait([statement], timeout=1.0)
                        assert not statement.done()
                        statement.cancel()
                        await asyncio.wait([statement])
                proxy.cut()
                proxy.restore()
    assert Server("x", Dsn.parse("postgresql://h/d"), connect_timeout=1)._command_timeout is None


async def test_each_address_has_parameters_of_its_own(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """Settings of tenants' address count for sessions and what SQLAlchemy assumes; those of administration do not."""
    admin = make_url(postgres.admin_url)
    addresses = ServerAddresses(
        admin=admin.update_query_dict({"timezone": "Asia/Tokyo"}).render_as_string(hide_password=False),
        tenants=f"postgresql://{admin.host}:{admin.port}?search_path=app&application_name=shop",
    )
    tenancy = Tenancy(tenancy_config.replace(servers={"default": addresses}))
    await tenancy.open(initialise=True)
    try:
        acme = (await tenancy.tenants.create("acme")).tenant
        async with tenancy.internals.router.connection(acme) as connection:
            assert await connection.scalar(text("SHOW search_path")) == "app"
            assert await connection.scalar(text("SHOW timezone")) != "Asia/Tokyo"
            tag = tenancy.internals.leases.lease("default").tag
            assert await connection.scalar(text("SHOW application_name")) == f"shop/tenancy/{tag}"
            assert connection.dialect.default_schema_name == "app"
        server = tenancy.internals.servers["default"]
        # it leads to PostgreSQL itself: statements are prepared once
        assert not server.is_pooled and server.prepared_statement_cache_size == 100
    finally:
        await tenancy.close()
