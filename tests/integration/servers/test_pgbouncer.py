"""``tenancy servers pgbouncer``: what it generates runs, its check finds what is wrong, and tenants stay apart."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import ServerAddresses
from tenancy_orm.control.names import Names
from tenancy_orm.errors import ConfigurationError, PoolerError
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.servers.pgbouncer import files, parse_version
from tenancy_orm.servers.pgbouncer_auth import auth_user, function_name
from tests.support.pgbouncer import PgBouncer, free_port, installed_version, pgbouncer, running
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.served import variables
from tests.support.shell import ROOT, environment
from tests.support.warm import Finished, run_module

Cli = Callable[..., Awaitable[Finished]]


@pytest.fixture
def names(tenancy: Tenancy) -> Names:
    """The installation's names."""
    return Names(tenancy.config.name_prefix, tenancy.internals.control.installation)


@pytest.fixture
async def cli(tenancy: Tenancy, postgres: Postgres, tmp_path: Path, names: Names) -> AsyncIterator[Cli]:
    """The command, and afterwards no role of PgBouncer's on the server."""

    async def command(*arguments: str, tenants: str | None = None, **changes: str) -> Finished:
        env = environment(
            **variables(tenancy.config), TENANCY_METADATA="tests.support.models:Base.metadata", COLUMNS="200", **changes
        )
        if tenants is not None:
            env["TENANCY_SERVERS"] = f"default={postgres.admin_url} default.tenants={tenants}"
        return await run_module("tenancy_orm.cli", "servers", "pgbouncer", *arguments, cwd=tmp_path, env=env)

    yield command
    user = auth_user(names)
    async with postgres.connect() as admin:
        await admin.execute(f'DROP SCHEMA IF EXISTS "{user}" CASCADE')
        if await admin.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", user):
            await admin.execute(f'DROP OWNED BY "{user}"; DROP ROLE "{user}"')


@contextmanager
def started(directory: Path, **changes: str) -> Iterator[PgBouncer]:
    """Run what was generated, on a port of its own and without a directory for its log."""
    port, path = free_port(), directory / "pgbouncer.ini"
    own = {
        "listen_addr": "127.0.0.1",
        "listen_port": str(port),
        "logfile": str(directory / "pgbouncer.log"),
        "pidfile": "",
        **changes,
    }
    ini = path.read_text()
    for name, value in own.items():
        ini, count = re.subn(rf"(?m)^{name} =.*$", f"{name} = {value}", ini)
        assert count == 1, name
    path.write_text(f"{ini}unix_socket_dir =\n")
    with running(directory, port) as pooler:
        yield pooler


def commands_of_the_page() -> list[list[str]]:
    """What docs/pgbouncer.md says to run, in words."""
    page = (ROOT / "docs" / "pgbouncer.md").read_text()
    [block] = re.findall(r"```sh\n(tenancy servers pgbouncer eu --out.*?)```", page, re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def test_the_page_installs_the_files_for_the_user_of_the_package() -> None:
    """Who that is, the service of the package says: ``postgres`` on Debian, ``pgbouncer`` elsewhere."""
    service = Path("/lib/systemd/system/pgbouncer.service")
    install = commands_of_the_page()[2]
    users = re.findall(r"(?m)^User=(.+)$", service.read_text()) if service.exists() else ["postgres"]
    assert users == ["pgbouncer"] or users == [install[install.index("-o") + 1]]
    assert install[install.index("-m") + 1] == "600"


async def test_what_is_generated_serves_the_installation(
    cli: Cli, tenancy: Tenancy, postgres: Postgres, tmp_path: Path
) -> None:
    """Tenants log in with their own secrets, and settings hold, also against a role's own.

    The check agrees, and notices what is changed.
    """
    for slug in ("acme", "globex"):
        await tenancy.tenants.create(slug)
    with tempfile.TemporaryDirectory() as made:
        await asyncio.to_thread(Path(made).chmod, 0o711)
        directory = Path(made) / "pgbouncer"
        directory.mkdir()
        version = installed_version()
        make, function, install, _ = commands_of_the_page()
        out = tmp_path / make[-1]
        done = await cli("--for", version, *make[4:])
        assert done.status == 0, done.err
        assert (out / "userlist.txt").stat().st_mode & 0o777 == 0o600
        userlist = (out / "userlist.txt").read_text()
        again = await cli("--for", version, *make[4:])
        assert again.status == 0, again.err
        assert (out / "userlist.txt").read_text() == userlist  # the role has this password already
        async with postgres.connect() as admin:
            await admin.execute((tmp_path / function[-1]).read_text())
        # as this user, and elsewhere
        assert f"\nauth_file = {install[-1]}userlist.txt\n" in (out / "pgbouncer.ini").read_text()
        install[install.index("-o") + 1], install[-1] = str(os.geteuid()), str(directory)
        await asyncio.to_thread(subprocess.run, install[1:], cwd=tmp_path, check=True)
        with started(directory, auth_file=str(directory / "userlist.txt")) as pooler:
            address = f"{pooler.address}?statement_cache_size=0"
            pooled = tenancy.config.replace(
                servers={"default": ServerAddresses(admin=postgres.admin_url, tenants=address)}
            )
            async with opened(pooled) as other:
                for slug in ("acme", "globex"):
                    async with other.session(slug) as session:
                        await session.execute(text("ALTER ROLE CURRENT_USER SET search_path = nowhere"))
                        await session.commit()
                admin_connection = await other.internals.servers["default"].connect_admin()
                await admin_connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename ~ '_t_[0-9a-f]{32}$'"
                )
                await admin_connection.close()
                other.internals.router.retire((await other.tenants.get("acme")).id)
                async with other.session("acme") as session:
                    # a pooler without connect_query loses this
                    assert await session.scalar(text("SHOW search_path")) == '"$user", public'
                assert await asyncio.to_thread(other.sync.fetch_value, "SHOW search_path", tenant="acme")
            user, password = json.loads("[" + userlist.strip().replace('" "', '", "') + "]")
            console = f"postgresql://{user}:{password}@127.0.0.1:{pooler.port}/pgbouncer"
            checked = await cli("--check", "--json", "--console", "$CONSOLE", tenants=address, CONSOLE=console)
            assert checked.status == 0, checked.out + checked.err
            found = [one["text"] for one in json.loads(checked.out)]
            assert "it cannot reach another tenant's database" in found
            assert "pool_mode = transaction" in found
        with started(directory, pool_mode="statement", default_pool_size="50") as wrong:
            console = f"postgresql://{user}:{password}@127.0.0.1:{wrong.port}/pgbouncer"
            checked = await cli("--check", "--console", console, tenants=wrong.address)
            assert checked.status == 1, checked.out
            assert re.search(r"(?m)^no  .*refuses transactions.*; set pool_mode = transaction in it$", checked.out)
            assert re.search(r"(?m)^no  default_pool_size = 50; a role may have \d+ at most$", checked.out)
    direct = await cli("--check")
    assert direct.status == 1
    assert "connect to server 'default' directly" in direct.err
    assert "tenancy servers update default --tenants 'postgresql://HOST:6432?" in direct.err


async def test_the_function_tells_no_other_secret_and_no_other_role(
    cli: Cli, tenancy: Tenancy, postgres: Postgres, names: Names
) -> None:
    """Its role reads tenants' secrets alone, and can change nothing.

    A tenant that gets to the database (a layer is off) can neither call the function nor put another in its place.
    """
    acme = (await tenancy.tenants.create("acme")).tenant
    assert acme.placement is not None
    done = await cli("--json", "--for", "1.25")
    assert done.status == 0, done.err
    user, function = auth_user(names), function_name(names)
    async with postgres.connect() as admin:
        await admin.execute(json.loads(done.out)["auth_query.sql"])
        name, given = json.loads("[" + json.loads(done.out)["userlist.txt"].replace('" "', '", "') + "]")
        secret = await admin.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = $1", acme.placement.role)
        await admin.execute(f'GRANT CONNECT ON DATABASE postgres TO "{acme.placement.role}"')
        url = make_url(postgres.admin_url)

        async def as_role(name: str, password: str) -> Any:
            return await asyncpg.connect(
                url.set(username=name, password=password).render_as_string(hide_password=False)
            )

        assert name == user
        asking = await as_role(user, given)
        try:
            query = f"SELECT secret FROM {function}($1)"
            assert await asking.fetchval(query, acme.placement.role) == secret
            for other in (url.username, user, names.owner, f"{acme.placement.role}_abcdef", "x' OR true --"):
                assert await asking.fetch(query, other) == []
            for refused in (
                "SELECT rolpassword FROM pg_authid",
                f'CREATE TABLE "{user}".taken (id int)',
                f"CREATE OR REPLACE FUNCTION {function}(username text) RETURNS text LANGUAGE sql AS 'SELECT 1::text'",
                f'SET ROLE "{acme.placement.role}"',
            ):
                with pytest.raises(asyncpg.PostgresError):
                    await asking.execute(refused)
        finally:
            await asking.close()
        tenant = await as_role(acme.placement.role, tenancy.internals.provisioner.password(acme))
        try:
            for refused in (query.replace("$1", "'x'"), f'CREATE TABLE "{user}".mine (id int)'):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await tenant.execute(refused)
        finally:
            await tenant.close()
            await admin.execute(f'REVOKE CONNECT ON DATABASE postgres FROM "{acme.placement.role}"')
        # the check finds what an operator has opened
        await admin.execute(f'GRANT EXECUTE ON FUNCTION {function}(text) TO "{acme.placement.role}"')
    checked = await cli("--check", tenants="postgresql://127.0.0.1:1")
    assert checked.status == 1
    assert f"REVOKE ALL ON FUNCTION {function}(text) FROM {acme.placement.role}" in checked.out


async def test_statement_mode_is_refused_by_the_first_session(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """With the remedy, on both sides; without the check it is an error of each BEGIN. Session mode works."""
    with pgbouncer(postgres, pool_mode="statement") as wrong, pgbouncer(postgres, pool_mode="session") as right:
        client = await asyncpg.connect(wrong.url(postgres.admin_url), statement_cache_size=0)
        with pytest.raises(asyncpg.PostgresError, match="transaction blocks not allowed"):
            await client.execute("BEGIN")
        client.terminate()
        for pooler in (wrong, right):
            addresses = ServerAddresses(admin=postgres.admin_url, tenants=pooler.address)
            config = tenancy_config.replace(servers={"default": addresses})
            async with opened(config, initialise=True) as tenancy:
                if pooler is wrong:
                    await tenancy.tenants.create("acme")
                    with pytest.raises(PoolerError, match="set pool_mode = transaction"):
                        await tenancy.fetch_value("SELECT 1", tenant="acme")
                    with pytest.raises(PoolerError, match="set pool_mode = transaction"):
                        await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme")
                    assert tenancy.internals.router.statistics().servers["default"].open == 0
                else:
                    assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
                    async with tenancy.session("acme") as session:
                        raw = await (await session.connection()).get_raw_connection()
                        with pytest.raises(PoolerError, match="LISTEN receives nothing"):
                            await raw.driver_connection.add_listener("news", print)  # type: ignore[union-attr]

                    assert await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme") == 1

                    def listen() -> None:
                        with tenancy.sync.session("acme") as session:
                            driver: Any = session.connection().connection.driver_connection
                            with pytest.raises(PoolerError, match="LISTEN receives nothing"):
                                next(driver.notifies(timeout=0))

                    await asyncio.to_thread(listen)
    async with opened(tenancy_config) as tenancy, tenancy.session("acme") as session:
        raw = await (await session.connection()).get_raw_connection()
        driver: Any = raw.driver_connection
        await driver.add_listener("news", print)
        await driver.remove_listener("news", print)


def test_what_does_not_fit_is_refused_and_what_is_sent_is_set(tenancy_config: TenancyConfig) -> None:
    """Several hosts, too many PgBouncers, a version without SCRAM; settings reach each connection, quoted."""
    config = tenancy_config.replace(sessions={"statement_timeout": 2.5, "settings": {"lc_time": "it's"}})

    def make(url: str = "postgresql://admin@db.example:5433/postgres?sslmode=verify-full", **options: Any) -> str:
        given = {"version": (1, 25), "accepted": 97, "database": "postgres", "least_limit": 20, **options}
        names, chosen = Names("shop", UUID(int=7)), given.pop("config", config)
        return files("eu", Dsn.parse(url), names, chosen, verifier="v", password="p", **given).ini

    ini = make(settings={"search_path": '"$user", public', "timezone": "UTC", "role": "none"}, poolers=3)
    expected = "SET lc_time=E''it''''s'';SET statement_timeout=E''2500ms'';SET search_path=\"$user\", public;"
    assert f"connect_query='{expected}'\n" in ini
    assert "ignore_startup_parameters = lc_time, statement_timeout\n" in ini
    assert "default_pool_size = 6\n" in ini and "server_tls_sslmode = verify-full\n" in ini
    assert "auth_dbname = tenancy_auth\n" in ini and "host=db.example port=5433" in ini
    assert "auth_dbname" not in make(version=(1, 18))
    assert "max_prepared_statements" not in make(version=(1, 20))
    many = make(settings={f"setting_{number}": "x" * 40 for number in range(20)})
    assert "setting_19" in many and 1 < len(re.findall("SET setting_", many)) < 8
    long = tenancy_config.replace(sessions={"settings": {"lc_time": "x" * 600}})
    for refused in ({"url": "postgresql://a,b/postgres"}, {"poolers": 21}, {"config": long}):
        with pytest.raises(ConfigurationError):
            make(**refused)
    for version in ("latest", "1.13.0"):
        with pytest.raises(ConfigurationError):
            parse_version(version)
    assert parse_version("1.25.2") == (1, 25)
