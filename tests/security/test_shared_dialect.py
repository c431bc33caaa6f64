"""What one tenant's role sets for itself shapes no connection but its own, and not even those of this package.

All tenants of a server share SQLAlchemy's dialect, which asks its first connection what it takes for granted of every
later one.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from sqlalchemy import inspect, literal, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import ServerAddresses
from tenancy_orm.errors import ConfigurationError, ServerUnavailableError
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.postgres.quoting import quote_identifier
from tenancy_orm.servers import Servers
from tenancy_orm.servers import server as servers
from tenancy_orm.servers.settings import BOUNDS, PINNED, PINNED_WHERE_KNOWN, default_schema, named_in, read_settings
from tenancy_orm.tenant import Tenant
from tests.support.models import Base, Note
from tests.support.postgres import Postgres
from tests.support.provisioning import (
    VERSIONS,
    lasting_control_database,
    placement,
    plain_administrator,
    running_server,
)
from tests.support.waiting import until

BACKSLASH = r"C:\new"
_TLS = (80877103).to_bytes(4)  # asks whether the server speaks TLS

# what a tenant's role sets for itself; the last one would keep it from setting more
SETTINGS = {
    "default_transaction_isolation": "'serializable'",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "standard_conforming_strings": "off",
    "backslash_quote": "on",
    "search_path": "elsewhere",
    "datestyle": "'German, DMY'",
    "intervalstyle": "'iso_8601'",
    "timezone": "'Asia/Tokyo'",
    "bytea_output": "'escape'",
    "extra_float_digits": "-15",
    "xmlbinary": "'hex'",
    "xmloption": "'document'",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "row_security": "off",
    "quote_all_identifiers": "on",
    "gin_fuzzy_search_limit": "1",
    "default_text_search_config": "'simple'",
    "synchronous_commit": "off",
    "exit_on_error": "on",
    "lock_timeout": "1",
    "idle_session_timeout": "50",
    "lc_numeric": "'POSIX'",
    "local_preload_libraries": "'nowhere'",
    "statement_timeout": "1",
}


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"pg{version}")
def server(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Postgres]:
    """A server of each version."""
    with running_server(request.param, f"{postgres.worker}-dialect") as running:
        yield running


@dataclass
class Neighbours:
    """Two tenants, of which the first has a hostile role."""

    server: Postgres
    config: TenancyConfig
    hostile: Tenant
    other: Tenant
    passwords: dict[str, str] = field(repr=False)

    def url(self, tenant: Tenant, *, driver: str | None = None) -> str:
        role = placement(tenant).role
        return self.server.url(placement(tenant).database, user=role, password=self.passwords[role], driver=driver)

    async def administered_in(self, url: str) -> None:
        """Let the administrator's URL name another database; no ``Tenancy`` is open."""
        async with self.server.connect(make_url(self.config.control_url).database or "") as connection:
            await connection.execute("UPDATE tenancy.servers SET maintenance_database = $1", make_url(url).database)

    async def set(self, **settings: str) -> None:
        """What the hostile role runs, by its own right."""
        connection = await asyncpg.connect(self.url(self.hostile), timeout=10)
        try:
            for name, value in settings.items():
                await connection.execute(f"ALTER ROLE CURRENT_USER SET {name} = {value}")
        finally:
            await connection.close()


@pytest.fixture
async def two(server: Postgres) -> AsyncIterator[Neighbours]:
    """Two tenants; no ``Tenancy`` is open."""
    async with lasting_control_database(server, "dia") as control_url:
        config = TenancyConfig(
            control_url=control_url,
            servers={"default": server.admin_url},
            metadata=Base.metadata,
            encryption_keys={"1": secrets.token_bytes(32)},
            name_prefix="dia",
        )
        tenancy = Tenancy(config)
        await tenancy.open(initialise=True)
        try:
            made = [await tenancy.tenants.create(slug) for slug in ("mallory", "acme")]
            tenants = [await tenancy.tenants.get(slug) for slug in ("mallory", "acme")]
            assert len(made) == 2
            passwords = {placement(tenant).role: tenancy.internals.provisioner.password(tenant) for tenant in tenants}
        finally:
            await tenancy.close()
        yield Neighbours(server, config, tenants[0], tenants[1], passwords)


@asynccontextmanager
async def fresh(two: Neighbours, **changes: Any) -> AsyncIterator[Tenancy]:
    """A new process's ``Tenancy``: the hostile tenant's connection is its first, and still open."""
    async with Tenancy(two.config.replace(**changes)) as tenancy, tenancy.session("mallory") as session:
        assert await session.scalar(text("SELECT current_user::text")) == placement(two.hostile).role
        yield tenancy


async def isolation_after_autocommit(engine: AsyncEngine) -> str:
    """The isolation level of a connection after it was used under AUTOCOMMIT and returned."""
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT pg_backend_pid()")) == pid
        return str(await connection.scalar(text("SHOW transaction_isolation")))


async def through_a_literal(engine: AsyncEngine, value: str) -> str:
    """What PostgreSQL reads of a value that SQLAlchemy has written into the statement."""
    async with engine.connect() as connection:
        return str(await connection.scalar(select(literal(value, literal_execute=True))))


async def schema_of_reflection(engine: AsyncEngine) -> tuple[str | None, set[str]]:
    async with engine.connect() as connection:
        return await connection.run_sync(
            lambda sync: (inspect(sync).default_schema_name, set(inspect(sync).get_table_names()))
        )


# --- the attack, where nothing protects ------------------------------------------------------------------------------


async def test_a_dialect_that_a_tenant_initialises_misleads_the_others(two: Neighbours) -> None:
    """What the protection is for: engines by hand that share the dialect of the first."""
    await two.set(
        default_transaction_isolation="'serializable'", standard_conforming_strings="off", search_path="elsewhere"
    )
    admin = await asyncpg.connect(two.server.url(placement(two.hostile).database))
    await admin.execute(f"CREATE SCHEMA elsewhere; GRANT USAGE ON SCHEMA elsewhere TO {placement(two.hostile).role}")
    await admin.close()
    first = create_async_engine(two.url(two.hostile, driver="asyncpg"), poolclass=NullPool)
    async with first.connect():
        pass
    other = create_async_engine(two.url(two.other, driver="asyncpg"))
    try:
        async with other.connect():
            pass
        other.sync_engine.dialect = other.sync_engine.pool._dialect = first.sync_engine.dialect

        assert await isolation_after_autocommit(other) == "serializable"
        assert await through_a_literal(other, BACKSLASH) == r"C:\\new"
        assert (await schema_of_reflection(other))[0] == "elsewhere"
    finally:
        await first.dispose()
        await other.dispose()


async def test_a_role_s_settings_are_in_force_on_its_plain_connections(two: Neighbours) -> None:
    """What the pins are for: PostgreSQL lets a role set all of these for itself."""
    # the first would refuse the login, the second end the connection at its first error, the third every statement
    harmless = {"local_preload_libraries": "", "exit_on_error": "off", "statement_timeout": "0"}
    await two.set(**{name: value for name, value in SETTINGS.items() if name not in harmless})
    own = await asyncpg.connect(two.url(two.hostile), timeout=10)
    try:
        rows = await own.fetch("SELECT lower(name) AS name FROM pg_settings WHERE source = 'user'")
        assert {row["name"] for row in rows} >= SETTINGS.keys() - harmless.keys()
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await own.execute("INSERT INTO public.notes (body) VALUES ('x')")
    finally:
        own.terminate()


# --- with it --------------------------------------------------------------------------------------------------------


async def test_the_first_tenant_shapes_no_other_s_connections(two: Neighbours) -> None:
    """Isolation, literals and reflection of another tenant are the server's own."""
    await two.set(**SETTINGS)
    async with fresh(two) as tenancy, tenancy.internals.router.lease(two.other) as engine:
        assert await isolation_after_autocommit(engine) == "read committed"
        assert await through_a_literal(engine, BACKSLASH) == BACKSLASH
        schema, tables = await schema_of_reflection(engine)
        assert (schema, tables >= {"notes", "tags"}) == ("public", True)
        async with tenancy.session("acme") as session:
            session.add(Note(body="written"))
            await session.commit()


async def test_what_a_role_sets_for_itself_does_not_count(two: Neighbours) -> None:
    """The hostile tenant's own sessions work as before, on the server's settings, also after RESET ALL."""
    async with fresh(two) as tenancy, tenancy.session("mallory") as session:
        before = (await session.execute(text("SELECT lower(name), setting FROM pg_settings"))).all()
    await two.set(**SETTINGS)
    async with fresh(two) as tenancy, tenancy.internals.router.lease(two.hostile) as engine:
        async with tenancy.session("mallory") as session:
            session.add(Note(body=BACKSLASH))
            await session.commit()
            await session.execute(text("RESET ALL"))
            await session.commit()
            after = (await session.execute(text("SELECT lower(name), setting FROM pg_settings"))).all()
            assert await session.scalar(text("SELECT body FROM notes")) == BACKSLASH
        assert {(name, setting) for name, setting in after if name in PINNED} == {
            (name, setting) for name, setting in before if name in PINNED
        }
        assert {name for name, _ in after} >= PINNED
        assert await isolation_after_autocommit(engine) == "read committed"
        assert await through_a_literal(engine, BACKSLASH) == BACKSLASH


async def test_a_role_that_a_tenant_takes_on_at_login_does_not_count(two: Neighbours) -> None:
    """``role`` is pinned, though ``pg_settings`` does not list it."""
    role, group = placement(two.hostile).role, quote_identifier(f"group_{secrets.token_hex(4)}")
    async with two.server.connect() as admin:
        await admin.execute(f"CREATE ROLE {group}; GRANT {group} TO {role}")
        await two.set(role=group)
        plain = await asyncpg.connect(two.url(two.hostile), timeout=10)
        assert await plain.fetchval("SELECT current_user::text") == group.strip('"')
        await plain.close()
        async with Tenancy(two.config) as tenancy:
            assert await tenancy.fetch_value("SELECT current_user::text", tenant="mallory") == role
        await admin.execute(f"DROP ROLE {group}")


async def test_what_a_session_sets_reaches_no_other_tenant(two: Neighbours) -> None:
    """Neither a SET on a connection of the pool, nor one in force while the others connect."""
    async with fresh(two) as tenancy, tenancy.session("mallory") as session:
        await session.execute(text("SELECT set_config('standard_conforming_strings', 'off', false)"))
        await session.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        await session.execute(text("SET search_path = elsewhere"))
        await session.commit()
        async with tenancy.internals.router.lease(two.other) as engine:
            assert await isolation_after_autocommit(engine) == "read committed"
            assert await through_a_literal(engine, BACKSLASH) == BACKSLASH
            assert (await schema_of_reflection(engine))[0] == "public"


async def test_the_proof_at_creation_starts_from_the_server_s_settings(two: Neighbours) -> None:
    """``connect_tenant`` pins for whoever calls it, without a router."""
    await two.set(**SETTINGS)
    found = Servers(two.config)["default"]
    connection: Any = await found.connect_tenant(
        placement(two.hostile), two.passwords[placement(two.hostile).role], tenant="mallory"
    )
    try:
        assert await connection.fetchval("SHOW search_path") == '"$user", public'
        assert await connection.fetchval("SHOW statement_timeout") == "0"
    finally:
        await connection.close()


# --- the administrator ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("superuser", [True, False])
async def test_the_administrator_s_own_settings_do_not_matter_either(two: Neighbours, superuser: bool) -> None:
    """Nor those of the database that it logs in to; a superuser reads in the files what they hide."""
    async with plain_administrator(two.server) as url:
        await two.administered_in(url)
        administrator, database = make_url(url).username or "", make_url(url).database or ""
        async with two.server.connect() as admin:
            if superuser:
                await admin.execute(f"ALTER ROLE {quote_identifier(administrator)} SUPERUSER")
            for name in ("default_transaction_isolation", "standard_conforming_strings", "search_path", "timezone"):
                await admin.execute(
                    f"ALTER ROLE {quote_identifier(administrator)} SET {name} = {SETTINGS[name]};"
                    f"ALTER DATABASE {quote_identifier(database)} SET {name} = {SETTINGS[name]}"
                )
        async with fresh(two, servers={"default": url}) as tenancy, tenancy.internals.router.lease(two.other) as engine:
            assert await isolation_after_autocommit(engine) == "read committed"
            assert await through_a_literal(engine, BACKSLASH) == BACKSLASH
            assert (await schema_of_reflection(engine))[0] == "public"
            zone = await tenancy.fetch_value("SHOW timezone", tenant="acme")
            async with two.server.connect() as admin:
                written = await admin.fetchval(
                    "SELECT setting FROM pg_file_settings WHERE applied AND lower(name) = 'timezone'"
                )
            assert zone == (written if superuser else "GMT")


async def test_an_administrator_that_cannot_log_in_is_an_error_of_the_server_until_it_can(two: Neighbours) -> None:
    """It is no refusal of the tenant, and the next connection asks again."""
    async with plain_administrator(two.server) as url:
        await two.administered_in(url)
        name = quote_identifier(make_url(url).username or "")
        async with Tenancy(two.config.replace(servers={"default": url})) as tenancy, two.server.connect() as admin:
            await admin.execute(f"ALTER ROLE {name} NOLOGIN")
            for _ in range(2):
                with pytest.raises(ServerUnavailableError) as caught:
                    await tenancy.fetch_value("SELECT 1", tenant="acme")
                assert (type(caught.value), caught.value.sqlstate) == (ServerUnavailableError, "28000")
                assert caught.value.tenant == "acme"
            await admin.execute(f"ALTER ROLE {name} LOGIN")
            assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1


async def test_five_hundred_cold_requests_ask_once(two: Neighbours, monkeypatch: pytest.MonkeyPatch) -> None:
    """One administrative connection for all of them, and none later; some of them are cancelled.

    Another one counts who uses the server's connections, however many requests there are.
    """
    logins = 0
    connect_admin = servers.Server.connect_admin

    async def counted(self: servers.Server, *args: Any, **options: Any) -> Any:
        nonlocal logins
        logins += options.get("purpose") != "tenancy-leases"
        return await connect_admin(self, *args, **options)

    async with Tenancy(two.config) as tenancy:
        monkeypatch.setattr(servers.Server, "connect_admin", counted)
        calls = [
            asyncio.create_task(tenancy.fetch_value("SELECT 1", tenant=slug))
            for slug in ("mallory", "acme")
            for _ in range(250)
        ]
        await until(lambda: logins)
        for call in calls[::5]:
            call.cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [answer for answer in answers if not isinstance(answer, asyncio.CancelledError)] == [1] * 400
        assert logins == 1


# --- whose word counts ----------------------------------------------------------------------------------------------


async def test_settings_of_the_application_win(two: Neighbours) -> None:
    """``session_settings`` over the pins and ``ALTER DATABASE``, the server's URL over both."""
    await two.set(search_path="nowhere", timezone="'Asia/Tokyo'")
    async with two.server.connect() as admin:
        await admin.execute(f"ALTER DATABASE {placement(two.other).database} SET search_path = theirs")
    url = make_url(two.server.admin_url).update_query_dict(
        {"timezone": "Europe/Paris", "options": "-c lock_timeout=7s"}
    )
    changes = {
        "servers": {"default": url.render_as_string(hide_password=False)},
        "sessions": {
            "settings": {
                "Search_Path": 'App, "$user", public',
                "TimeZone": "UTC",
                "lock_timeout": "9s",
                "my.own": "x",
            },
            "statement_timeout": 30.0,
        },
    }
    async with fresh(two, **changes) as tenancy:
        for tenant in ("mallory", "acme"):
            found = [
                await tenancy.fetch_value(f"SHOW {name}", tenant=tenant)
                for name in ("search_path", "timezone", "lock_timeout", "my.own", "statement_timeout")
            ]
            assert found == ['App, "$user", public', "Europe/Paris", "7s", "x", "30s"]
        async with tenancy.internals.router.lease(two.other) as engine:
            assert (await schema_of_reflection(engine))[0] == "app"


async def test_a_setting_that_the_server_refuses_is_an_error_of_the_configuration(two: Neighbours) -> None:
    """It names what was configured, not the tenant or its server's health."""
    async with Tenancy(two.config.replace(sessions={"settings": {"timezone": "Nowhere/Land"}})) as tenancy:
        with pytest.raises(ConfigurationError, match=r"sessions.settings \(22023\): timezone"):
            await tenancy.fetch_value("SELECT 1", tenant="acme")


async def test_behind_a_pooler_only_what_is_configured_is_sent(two: Neighbours) -> None:
    """PgBouncer refuses startup parameters that it does not know. What all tenants share is safe there as well."""
    await two.set(default_transaction_isolation="'serializable'", standard_conforming_strings="off")
    url = make_url(two.server.admin_url).update_query_dict(
        {"statement_cache_size": "0", "prepared_statement_cache_size": "0"}
    )
    async with (
        fresh(two, servers={"default": url.render_as_string(hide_password=False)}) as tenancy,
        tenancy.internals.router.lease(two.other) as engine,
    ):
        sent = await tenancy.fetch_all("SELECT name FROM pg_settings WHERE source = 'client'", tenant="acme")
        assert {name for (name,) in sent} == {"application_name", "client_encoding"}
        assert await isolation_after_autocommit(engine) == "read committed"
        assert await through_a_literal(engine, BACKSLASH) == BACKSLASH


async def test_what_would_end_every_transaction_does_not_count(two: Neighbours) -> None:
    """A role's own bounds of a millisecond; its connections have those of the configuration."""
    await two.set(idle_in_transaction_session_timeout="1")
    connection = await asyncpg.connect(two.url(two.hostile), timeout=10)
    try:
        assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "1ms"
        known = connection.get_server_version().major >= 17
    finally:
        await connection.close()
    if known:
        await two.set(transaction_timeout="1")
    async with fresh(two, provisioning={"role_settings": {"transaction_timeout": "30min"}}) as tenancy:
        shown = "SHOW idle_in_transaction_session_timeout"
        assert await tenancy.fetch_value(shown, tenant="mallory") == "5min"
        if known:
            assert await tenancy.fetch_value("SHOW transaction_timeout", tenant="mallory") == "30min"


@asynccontextmanager
async def refusing_settings(port: int) -> AsyncIterator[int]:
    """PgBouncer's answer to startup parameters that it does not know (08P01), in front of a real server."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size, startup = await packet(reader)
        if startup == _TLS:
            writer.write(b"N")
            size, startup = await packet(reader)
        names = startup[4:].split(b"\0")[0::2]
        if unknown := set(names) - {b"", b"user", b"database", b"application_name", b"client_encoding"}:
            message = f"unsupported startup parameter: {min(unknown).decode()}"
            fields = f"SFATAL\0C08P01\0M{message}\0".encode()
            writer.write(b"E" + (len(fields) + 5).to_bytes(4) + fields + b"\0")
            writer.close()
            return
        inner, outer = await asyncio.open_connection("127.0.0.1", port)
        outer.write(size + startup)
        await asyncio.gather(pump(reader, outer), pump(inner, writer))

    async def packet(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
        size = await reader.readexactly(4)
        return size, await reader.readexactly(int.from_bytes(size) - 4)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()
        with suppress(ConnectionError):
            await sink.wait_closed()

    served: set[asyncio.Task[None]] = set()

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.add(asyncio.ensure_future(serve(reader, writer)))

    listener = await asyncio.start_server(tracked, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await asyncio.gather(*served)


async def test_a_pooler_that_refuses_the_settings_is_served_without(
    two: Neighbours, caplog: pytest.LogCaptureFixture
) -> None:
    """Its address does not say so: tenants are served, and the log names what that costs."""
    direct = make_url(two.server.admin_url)
    assert direct.port is not None
    async with refusing_settings(direct.port) as port:
        with pytest.raises(asyncpg.ProtocolViolationError):
            await asyncpg.connect(
                direct.set(port=port).render_as_string(hide_password=False), server_settings={"search_path": "x"}
            )
        addresses = ServerAddresses(admin=two.server.admin_url, tenants=f"postgresql://127.0.0.1:{port}")
        async with fresh(two, servers={"default": addresses}) as tenancy:
            assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
    assert sum("refuses startup parameters" in record.message for record in caplog.records) == 1


async def test_a_change_of_the_server_s_configuration_is_followed(
    two: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By connections that are opened some minutes later, without a restart."""
    async with two.server.connect() as admin, Tenancy(two.config) as tenancy:
        await tenancy.fetch_value("SELECT 1", tenant="acme")
        await admin.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        try:
            await admin.execute("SELECT pg_reload_conf()")
            monkeypatch.setattr(servers, "SETTINGS_SECONDS", 0.0)

            async def read_only() -> bool:
                tenancy.internals.router.retire(two.other.id)
                async with tenancy.session("acme") as session:
                    return bool(await session.scalar(text("SHOW transaction_read_only")) == "on")

            await until(read_only)
        finally:
            await admin.execute("SET default_transaction_read_only = off")
            await admin.execute("ALTER SYSTEM RESET default_transaction_read_only")
            await admin.execute("SELECT pg_reload_conf()")


# --- reading --------------------------------------------------------------------------------------------------------


async def test_every_pin_is_a_setting_that_a_role_may_give_itself(server: Postgres) -> None:
    """So none of them is missing on some version, and none would be refused at the start of a connection."""
    async with server.connect() as admin:
        found = await read_settings(admin, {"idle_in_transaction_session_timeout": "5min"})
        known = set(await admin.fetchval("SELECT array_agg(lower(name)) FROM pg_settings"))
    assert found.keys() == PINNED | ({*PINNED_WHERE_KNOWN, *BOUNDS} & known) | {"role"}
    assert found["idle_in_transaction_session_timeout"] == "5min"
    role = f"plain_{secrets.token_hex(4)}"
    async with server.connect() as admin:
        await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'plain'; GRANT CONNECT ON DATABASE postgres TO {role}")
        plain = await asyncpg.connect(
            server.url(user=role, password="plain"),
            timeout=10,
            server_settings=found,
        )
        assert await plain.fetchval("SHOW search_path") == found["search_path"]
        await plain.close()
        await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize(
    ("search_path", "schema"),
    [
        ('"$user", public', "public"),
        ("App, public", "app"),
        ('"My ""App""", public', 'My "App"'),
        ('"a,b"', "a,b"),
        ("", "public"),
    ],
)
def test_the_default_schema_is_the_first_of_the_search_path(search_path: str, schema: str) -> None:
    """As PostgreSQL reads it, in a database without a schema of the role's own name."""
    assert default_schema(search_path) == schema


def test_settings_in_a_url_are_found() -> None:
    """By themselves, and in every form within ``options``."""
    url = Dsn.parse("postgresql://h/d?TimeZone=UTC&options=-c%20search_path%3Dx%20-cjit%3Doff%20--lock-timeout%3D1")
    assert named_in(url) >= {"timezone", "search_path", "jit", "lock_timeout"}
