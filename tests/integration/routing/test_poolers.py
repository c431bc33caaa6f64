"""A real PgBouncer in transaction mode between this package and PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.cli.secrets import _accept_keys
from tenancy_orm.config import ServerAddresses
from tenancy_orm.errors import MarkerMismatchError, PoolerError, ServerUnavailableError
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.postgres.poolers import backend_pid
from tests.support.models import Note
from tests.support.pgbouncer import PgBouncer, pgbouncer
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.proxy import proxied
from tests.support.waiting import HANGS, until

_LOCKS = (
    "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database "
    "WHERE l.locktype = 'advisory' AND d.datname = $1"
)


@pytest.fixture(scope="module")
def bouncer(pytestconfig: pytest.Config, postgres: Postgres) -> Iterator[PgBouncer]:
    """One PgBouncer for the module."""
    with pgbouncer(postgres) as running:
        yield running


@pytest.fixture
def pooled_config(tenancy_config: TenancyConfig, postgres: Postgres, bouncer: PgBouncer) -> TenancyConfig:
    """Tenants' sessions go through the pooler, administration does not."""
    addresses = ServerAddresses(admin=postgres.admin_url, tenants=bouncer.address)
    return tenancy_config.replace(servers={"default": addresses})


@pytest.fixture
async def pooled(pooled_config: TenancyConfig) -> AsyncIterator[Tenancy]:
    """An open ``Tenancy`` of ``pooled_config``."""
    async with opened(pooled_config, initialise=True) as tenancy:
        yield tenancy


async def pid_of(connection: AsyncConnection) -> tuple[int, int]:
    """The process id of the login, and that of the backend."""
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    assert driver is not None
    return driver.get_server_pid(), await connection.scalar(text("SELECT pg_backend_pid()"))


async def test_a_pooler_for_administration_is_refused_and_leaves_nothing(
    tenancy_config: TenancyConfig, postgres: Postgres, bouncer: PgBouncer
) -> None:
    """At an opening and at ``tenancy init``, with the pooler's own reason and the remedy; no lock stays behind."""
    # what happened without the check: the lock stays with the pooler, for whoever comes next
    client = await asyncpg.connect(bouncer.url(postgres.admin_url), statement_cache_size=0)
    pid = await client.fetchval("SELECT pg_backend_pid() FROM pg_advisory_lock(77)")
    await client.close()
    async with postgres.connect() as observer:
        locked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 77 AND pid = $1"
        assert await observer.fetchval(locked, pid) == 1
        await observer.execute("SELECT pg_terminate_backend($1)", pid)
    through = tenancy_config.replace(servers={"default": bouncer.url(postgres.admin_url)})
    for initialise in (False, True):
        with pytest.raises(PoolerError) as caught:
            await Tenancy(through).open(initialise=initialise)
        message = str(caught.value)
        assert f"127.0.0.1:{bouncer.port}/postgres: unsupported startup parameter: tenancy.direct (08P01)" in message
        assert "'default'" in message and "ServerAddresses" in message
    # a pooler that came later is found by the first login
    servers = Tenancy(tenancy_config)
    await servers.open(initialise=False)
    try:
        server = servers.internals.servers["default"]
        server.dsn, server._is_proved = Dsn.parse(bouncer.url(postgres.admin_url)), False
        with pytest.raises(PoolerError):
            await servers.internals.provisioner.prepare_server("default")
    finally:
        await servers.close()


async def test_a_pooler_that_drops_what_it_does_not_know_is_found_too(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """Its sign is that the parameter of the login is not in force."""
    with pgbouncer(postgres, ignore_startup_parameters="tenancy.direct") as lenient:
        through = tenancy_config.replace(servers={"default": lenient.url(postgres.admin_url)})
        told = r"a parameter of the login is not that of the session .*options=neon_proxy_params_compat:true"
        with pytest.raises(PoolerError, match=told):
            await Tenancy(through).open()


async def test_a_proxy_with_process_ids_of_its_own_is_no_pooler(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """It has a backend for each client. What keeps a creation waiting is found by the backend's process id."""
    async with proxied(postgres.admin_url, own_process_ids=True) as proxy:
        client = await asyncpg.connect(proxy.url(postgres.admin_url))
        assert client.get_server_pid() == 0x7F000001 != await client.fetchval("SELECT pg_backend_pid()")
        await client.close()
        through = tenancy_config.replace(servers={"default": proxy.url(postgres.admin_url)})
        async with opened(through, initialise=True) as tenancy:
            acme = await tenancy.tenants.create("acme")
            assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
            server = tenancy.internals.servers["default"]
            connection = await server.connect_admin()
            try:
                pid = await connection.fetchval("SELECT pg_backend_pid()")
                assert await backend_pid(connection) == pid != connection.get_server_pid()
            finally:
                await connection.close()
            await tenancy.tenants.delete(acme.tenant)
            await tenancy.tenants.purge(acme.tenant)


async def test_tenants_work_through_a_pooler(
    pooled: Tenancy, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """Two tenants at once, each in its own database; nothing is prepared under a name, and the marker is checked."""
    created = {slug: await pooled.tenants.create(slug) for slug in ("acme", "globex")}

    async def work(slug: str, number: int) -> None:
        async with pooled.session(slug) as session:
            session.add(Note(body=f"{slug} {number}"))
            await session.commit()
            found = (await session.scalars(text("SELECT body FROM notes"))).all()
            assert {note.split()[0] for note in found} == {slug}
            assert await session.scalar(text("SELECT current_database()")) == (
                created[slug].tenant.placement.database  # type: ignore[union-attr]
            )

    with caplog.at_level(logging.WARNING, "tenancy_orm.routing"):
        await asyncio.gather(*(work(slug, number) for number in range(20) for slug in created))
    assert caplog.text.count("a connection pooler answers tenants of server default") == 1
    for slug, one in created.items():
        async with pooled.internals.router.connection(one.tenant) as connection:
            login, backend = await pid_of(connection)
            assert login != backend
            assert await connection.scalar(text("SELECT count(*) FROM pg_prepared_statements")) == 0, slug
            assert (await connection.execute(text("SELECT count(*) FROM notes"))).scalar_one() == 20
            # a cursor of the server, and a type that the driver does not know
            streamed = await connection.stream(text("SELECT generate_series(1, :last)"), {"last": 200})
            assert [row[0] async for row in streamed] == list(range(1, 201))
        async with pooled.internals.router.connection(one.tenant) as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            assert [await connection.scalar(text("SELECT :n + 1"), {"n": n}) for n in range(5)] == [1, 2, 3, 4, 5]
    async with postgres.connect() as admin:
        await admin.execute(f"COMMENT ON DATABASE {created['acme'].tenant.placement.database} IS 'x'")  # type: ignore[union-attr]
    pooled.internals.router.retire(created["acme"].tenant.id)
    with pytest.raises(MarkerMismatchError):
        async with pooled.session("acme") as session:
            await session.scalar(text("SELECT 1"))


async def test_what_sqlalchemy_assumes_holds_behind_a_pooler(pooled: Tenancy) -> None:
    """PgBouncer keeps three of the pinned settings for each client; a role's own value does not win over them."""
    await pooled.tenants.create("acme")
    async with pooled.session("acme") as session:
        await session.execute(text("ALTER ROLE CURRENT_USER SET standard_conforming_strings = off"))
        await session.execute(text("ALTER ROLE CURRENT_USER SET search_path = nowhere"))
        await session.commit()
    acme = (await pooled.tenants.get("acme")).placement
    assert acme is not None
    admin = await pooled.internals.servers["default"].connect_admin()
    try:
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", acme.role)
    finally:
        await admin.close()
    pooled.internals.router.retire((await pooled.tenants.get("acme")).id)
    async with pooled.session("acme") as session:
        assert await session.scalar(text("SHOW standard_conforming_strings")) == "on"
        # this one is lost: it holds for the tenant's own connections, and for no other tenant's
        assert await session.scalar(text("SHOW search_path")) == "nowhere"
    await pooled.tenants.create("globex")
    async with pooled.session("globex") as session:
        assert await session.scalar(text("SHOW search_path")) == '"$user", public'


async def test_a_suspension_ends_what_goes_through_a_pooler(pooled: Tenancy, postgres: Postgres) -> None:
    """The pooler's own connections end, and it can open no more; after the activation it works again."""
    acme = (await pooled.tenants.create("acme")).tenant
    assert acme.placement is not None
    role = acme.placement.role
    async with pooled.internals.router.connection(acme) as connection:
        await connection.scalar(text("SELECT 1"))
        await pooled.tenants.suspend("acme", reason="unpaid")
        with pytest.raises(Exception, match=r"closed|terminat|login"):
            await connection.scalar(text("SELECT 2"))
    async with postgres.connect() as admin:
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1"
        assert await admin.fetchval(sessions, role) == 0
    server = pooled.internals.servers["default"]
    password = pooled.internals.provisioner.password(acme)
    with pytest.raises(ServerUnavailableError) as caught:
        await server.connect_tenant(acme.placement, password, tenant="acme")
    assert caught.value.sqlstate == "08P01" and f"127.0.0.1:{server.traffic.dsn.hosts[0][1]}" in str(caught.value)
    await pooled.tenants.activate("acme")
    async with asyncio.timeout(HANGS):
        while True:
            try:
                async with pooled.session("acme") as session:
                    assert await session.scalar(text("SELECT 3")) == 3
                break
            except ServerUnavailableError:
                # server_login_retry: the pooler tries again after a second
                await asyncio.sleep(0.1)


async def test_a_password_that_was_rotated_is_read_again_behind_a_pooler(
    pooled: Tenancy, pooled_config: TenancyConfig
) -> None:
    """A process that missed the rotation is refused with 08P01, as anything is, and looks for the new password."""
    await pooled.tenants.create("acme")
    old = await pooled.tenants.get("acme")
    async with Tenancy(pooled_config) as other:
        await other.secrets.rotate_passwords()
    async with pooled.internals.router.connection(old) as connection:
        assert await connection.scalar(text("SELECT 1")) == 1


async def test_the_control_database_works_through_a_pooler_with_a_direct_address(
    pooled_config: TenancyConfig, control_url: str, bouncer: PgBouncer, postgres: Postgres
) -> None:
    """LISTEN and migrations use the direct one. Without it, or with a pooler there too, opening is refused."""
    through = pooled_config.replace(control_url=bouncer.url(control_url))
    for initialise in (False, True):
        with pytest.raises(PoolerError, match=r"control_url leads .*unsupported startup.*set control\.listen_url"):
            await Tenancy(through).open(initialise=initialise)
    with pytest.raises(PoolerError, match=r"control\.listen_url must be"):
        await Tenancy(through.replace(control={"listen_url": bouncer.url(control_url)})).open()
    whole = through.replace(control={"listen_url": control_url})
    tenancy = Tenancy(whole)
    await tenancy.open(initialise=True)
    try:
        created = await asyncio.gather(*(tenancy.tenants.create(f"t{number}") for number in range(3)))
        found = await asyncio.gather(*(tenancy.tenants.get_by_api_key(one.api_key) for one in created for _ in "1234"))
        assert {one.id for one in found} == {one.tenant.id for one in created}
        assert tenancy.internals.directory.listening
        assert (await tenancy.audit.verify()).ok
        async with tenancy.internals.control.connect() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM pg_prepared_statements")) == 0
    finally:
        await tenancy.close()
    # a command that opens the control database by itself
    assert (await _accept_keys(whole))["encryption_keys"] == list(whole.sealing_keys)
    async with postgres.connect() as admin:

        async def no_locks() -> bool:
            return bool(await admin.fetchval(_LOCKS, postgres.database_of(control_url)) == 0)

        # a backend gives up its locks a moment after its client has closed the connection
        await until(no_locks)
