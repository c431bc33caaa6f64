"""What is written in a URL holds for every connection: the control pool's, the listener's, the tenants', psql's."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import (
    ConfigurationError,
    ControlUnavailableError,
    InvalidCredentialError,
    ServerUnavailableError,
)
from tenancy_orm.postgres import login
from tenancy_orm.postgres.connections import Connection
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.servers.server import Server
from tests.support.postgres import Postgres
from tests.support.tls import TlsProxy, tls_proxy, write_certificate
from tests.support.waiting import until


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the proxy's certificate."""
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    write_certificate(path)
    return path


@pytest.fixture
async def proxy(postgres: Postgres, authority: Path) -> AsyncIterator[TlsProxy]:
    """TLS in front of the server."""
    async with tls_proxy(make_url(postgres.admin_url).port or 5432, authority) as proxy:
        yield proxy


@asynccontextmanager
async def opened(config: TenancyConfig, url: str, **changes: Any) -> AsyncIterator[Tenancy]:
    """A ``Tenancy`` with this control URL and one server, the same unless ``changes`` say otherwise."""
    tenancy = Tenancy(config.replace(control_url=url, **{"servers": None, **changes}))
    await tenancy.open(initialise=True)
    try:
        yield tenancy
    finally:
        await tenancy.close()


def through(proxy: TlsProxy, url: str) -> str:
    """``url``, by the proxy."""
    return make_url(url).set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)


@pytest.mark.parametrize("query", ["sslmode=require", "ssl=require", "sslmode=verify-full&sslrootcert={ca}"])
async def test_a_revocation_arrives_over_tls(
    tenancy_config: TenancyConfig, control_url: str, proxy: TlsProxy, authority: Path, query: str
) -> None:
    """The listener of another process connects as the control pool does, and every connection is encrypted."""
    url = f"{through(proxy, control_url)}?{query.format(ca=authority)}"
    # so that nothing but the notification can end it
    config = tenancy_config.replace(directory={"ttl": 3_600.0})
    async with opened(config, url) as here, opened(config, url) as there:
        created = await here.tenants.create("acme")
        directory = there.internals.directory
        credential = await directory.authenticate(created.api_key)
        assert directory.statistics.listening
        await here.keys.revoke(credential.id)

        async def refused() -> bool:
            try:
                await directory.authenticate(created.api_key)
            except InvalidCredentialError:
                return True
            return False

        await until(refused)
        async with here.session("acme") as session:
            await session.scalar(text("SELECT 1"))
    names = {"tenancy-control", "tenancy-listener", "tenancy-directory", "tenancy-admin", "tenancy"}
    # those of sessions name their process's lease; what uses the connections is counted now and then
    assert {name.partition("/")[0] for name in proxy.encrypted} - {"tenancy-leases"} == names
    assert all(proxy.encrypted.values())


async def test_a_certificate_of_somebody_else_is_refused(
    tenancy_config: TenancyConfig, control_url: str, proxy: TlsProxy, tmp_path: Path
) -> None:
    """With verify-full; the error says so, and names host, port and database."""
    other = tmp_path / "other.pem"
    write_certificate(other)
    url = f"{through(proxy, control_url)}?sslmode=verify-full&sslrootcert={other}"
    with pytest.raises(ControlUnavailableError) as caught:
        async with opened(tenancy_config, url):
            pass
    assert f"127.0.0.1:{proxy.port}/{make_url(control_url).database}" in str(caught.value)
    assert "certificate verify failed" in str(caught.value)


async def test_a_certificate_file_that_is_not_there_is_named(
    tenancy_config: TenancyConfig, control_url: str, proxy: TlsProxy
) -> None:
    """It is an error of the configuration, not an outage."""
    url = f"{through(proxy, control_url)}?sslmode=verify-full&sslrootcert=/nowhere/ca.pem"
    with pytest.raises(ConfigurationError, match=r"the file of sslrootcert for .* cannot be read"):
        async with opened(tenancy_config, url):
            pass


async def test_a_server_without_tls_is_refused(postgres: Postgres) -> None:
    """With sslmode=require nothing is sent in the clear."""
    dsn = Dsn.parse(f"{postgres.admin_url}?sslmode=require")
    with pytest.raises(OSError, match="rejected SSL upgrade"):
        await login.connect(dsn, purpose="test", timeout=5)


async def test_parameters_of_libpq_hold_everywhere(
    tenancy_config: TenancyConfig, control_url: str, proxy: TlsProxy
) -> None:
    """None of them ends in a TypeError, or at the server as a setting that it does not know."""
    query = (
        "sslmode=require&connect_timeout=7&application_name=shop&channel_binding=prefer&target_session_attrs=read-write"
        "&keepalives_idle=11&options=-c%20jit%3Doff%20-c%20DateStyle%3DGerman&statement_cache_size=100&timezone=CET"
    )
    asked = text("SELECT current_setting('jit') || current_setting('datestyle') || current_setting('timezone')")
    async with opened(tenancy_config, f"{through(proxy, control_url)}?{query}") as tenancy:
        assert tenancy.internals.directory.statistics.listening
        await tenancy.tenants.create("acme")
        async with tenancy.session("acme") as session:
            assert await session.scalar(asked) == "offGerman, DMYCET"
        async with tenancy.internals.control.connect() as connection:
            assert await connection.scalar(asked) == "offGerman, DMYCET"
            raw: Any = (await connection.get_raw_connection()).driver_connection
            peer: socket.socket = raw._transport.get_extra_info("socket")
            assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 11
        assert tenancy.internals.servers["default"].connect_timeout == 7
    assert {"shop/tenancy-control", "shop/tenancy-listener", "shop/tenancy-admin", "shop/tenancy"} <= set(
        proxy.encrypted
    )


async def test_the_caches_of_statements_can_be_off(tenancy_config: TenancyConfig, control_url: str) -> None:
    """As PgBouncer in transaction mode needs it, in the control pool as well."""
    url = f"{control_url}?statement_cache_size=0&prepared_statement_cache_size=0"
    async with (
        opened(tenancy_config, url) as tenancy,
        tenancy.internals.control.connect() as connection,
    ):
        raw: Any = await connection.get_raw_connection()
        assert raw.dbapi_connection._prepared_statement_cache is None
        assert raw.driver_connection._stmt_cache.get_max_size() == 0


async def test_the_first_of_two_hosts_is_dead(
    tenancy_config: TenancyConfig, control_url: str, postgres: Postgres
) -> None:
    """Every connection goes to the other one, and the servers are still known to be one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"{control_url.replace('@', f'@127.0.0.1:{port},')}?target_session_attrs=primary"
    async with opened(tenancy_config, url) as tenancy:
        assert tenancy.internals.directory.statistics.listening
        assert tenancy.internals.control.dsn.shares_host(Dsn.parse(postgres.admin_url))
        await tenancy.tenants.create("acme")
        async with tenancy.session("acme") as session:
            assert await session.scalar(text("SELECT 1")) == 1


async def test_a_host_that_does_not_answer_leaves_time_for_the_next(control_url: str) -> None:
    """A lost machine refuses nothing: without a share of the time for each host, the first would take all of it."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        dsn = Dsn.parse(control_url.replace("@", f"@127.0.0.1:{silent.getsockname()[1]},"))
        connection: Connection = await login.connect(dsn, purpose="test", timeout=2)
    await connection.close()


async def test_an_outage_names_the_address_and_the_servers_own_message(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """For the control database: a wrong password, no such database, no server."""
    wrong = make_url(postgres.admin_url).set(password="hunter2").render_as_string(hide_password=False)
    for url, reason in (
        (wrong, "password authentication failed"),
        (postgres.url("no_such_database"), 'database "no_such_database" does not exist (3D000)'),
        ("postgresql://app:hunter2@127.0.0.1:1/control", "Connect call failed"),
    ):
        with pytest.raises(ControlUnavailableError) as caught:
            async with opened(tenancy_config, url):
                pass
        message = str(caught.value)
        assert f"the control database {url.rpartition('@')[2]} is not available: " in message
        assert reason in message
        assert (make_url(url).password or "?") not in message


async def test_an_outage_of_a_server_names_its_address() -> None:
    """The message has the database, the attribute what the system said."""
    server = Server("lost", Dsn.parse("postgresql://a:hunter2@127.0.0.1:1/x"), connect_timeout=5)
    with pytest.raises(ServerUnavailableError, match=r"server 'lost' is not available at 127\.0\.0\.1:1/x: ") as caught:
        await server.connect_admin()
    assert "Connect call failed" in (caught.value.reason or "")
    assert "hunter2" not in str(caught.value)


async def test_no_setting_of_the_server_is_taken_for_a_misspelt_parameter(postgres: Postgres) -> None:
    """Whatever PostgreSQL lists can be given in a URL."""
    async with postgres.connect() as connection:
        names = await connection.fetch("SELECT name FROM pg_settings WHERE context IN ('user', 'superuser')")
    own = {"application_name", "client_encoding", "tcp_user_timeout"}  # the client's own parameters
    for (name,) in names:
        value = "utf8" if name == "client_encoding" else "5"
        dsn = Dsn.parse(f"postgresql://db/control?{name}={value}")
        assert (name in dsn.settings) is (name not in own)


async def test_libpq_gets_the_parameters(control_url: str, proxy: TlsProxy) -> None:
    """The variables that ``tenancy psql`` sets are those that libpq reads."""
    query = "sslmode=require&application_name=shop&options=-c%20jit%3Doff&search_path=a%2C%20b"
    dsn = Dsn.parse(f"{through(proxy, control_url)}?{query}")
    variables = dsn.environment(user=dsn.user or "", database=dsn.database or "", purpose="tenancy-psql")
    program = (
        "import psycopg; c = psycopg.connect(''); "
        "print(*c.execute(\"SELECT current_setting('jit'), current_setting('search_path')\").fetchone())"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        env={**os.environ, **variables, "PGPASSWORD": dsn.password or ""},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert output.decode().strip() == "off a, b"
    assert proxy.encrypted == {"shop/tenancy-psql": True}
