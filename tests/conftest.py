"""A PostgreSQL server for the whole run, and a control database and a ``Tenancy`` for each test.

The server is the one of ``TENANCY_TEST_DSN`` (a superuser's URL), or an embedded one, which ends with the process that
starts it. Each worker of pytest-xdist starts its own: tests look at all sessions and locks of a server, and end them.
Without either the run fails: a suite that skips proves nothing.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import secrets
import signal
from collections.abc import AsyncIterator, Generator, Iterator
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import pytest

from tests.support.postgres import Postgres, close_administrators
from tests.support.shell import python_path

if TYPE_CHECKING:
    from tenancy_orm import Tenancy, TenancyConfig
    from tenancy_orm.control.names import Names
    from tenancy_orm.testing.embedded import EmbeddedServer
    from tests.support.pgbouncer import PgBouncer

DSN_VARIABLE = "TENANCY_TEST_DSN"
EMBEDDED_VERSION_VARIABLE = "TENANCY_TEST_POSTGRES"
EMBEDDED_CONNECTIONS_VARIABLE = "TENANCY_TEST_CONNECTIONS"

_server_key: pytest.StashKey[EmbeddedServer] = pytest.StashKey()
_postgres_key = pytest.StashKey[Postgres]()
_failed_key = pytest.StashKey[bool]()
_run_key = pytest.StashKey[str]()
_ended_key = pytest.StashKey[list[str]]()


# --- the server of the run ------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--keep-databases`` and ``--pooler``."""
    parser.addoption(
        "--pooler",
        action="store_true",
        help="let tenants' sessions of the fixture tenancy go through PgBouncer in transaction mode",
    )
    parser.addoption(
        "--keep-databases",
        action="store_true",
        help="keep the databases of failed tests, and the embedded server's directory, and say where they are",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start a server in the process that runs the tests, or in each of them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # as a shell starts what runs in the background; so would the programs that tests interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    dsn = os.environ.get(DSN_VARIABLE)
    workerinput: dict[str, Any] | None = getattr(config, "workerinput", None)
    if workerinput is not None:
        run, worker = workerinput["run"], workerinput["workerid"]
        given = Postgres(dsn, workerinput["version"], run, worker) if dsn else None
        config.stash[_postgres_key] = given or _start(config, run, worker)
        return
    # read by the workers too, and by the programs that tests start
    os.environ["PYTHONPATH"] = python_path()
    if config.option.collectonly or config.option.help or config.option.version:
        return
    run = config.stash[_run_key] = secrets.token_hex(2)
    if dsn:
        try:
            config.stash[_postgres_key] = Postgres(dsn, asyncio.run(_prepare(dsn)), run, "main")
        except (OSError, asyncpg.PostgresError, TimeoutError) as exc:
            raise pytest.UsageError(f"{DSN_VARIABLE} names a server that does not answer: {exc}") from exc
    elif getattr(config.option, "tx", None):
        _wanted_version()  # before a worker fails
    else:
        config.stash[_postgres_key] = _start(config, run, "main")


def _wanted_version() -> int:
    from tests.support.installed_versions import add_installed_versions

    wanted, found = os.environ.get(EMBEDDED_VERSION_VARIABLE, "18"), add_installed_versions()
    if wanted not in map(str, found):
        raise pytest.UsageError(
            f"{EMBEDDED_VERSION_VARIABLE}={wanted}: there are PostgreSQL {', '.join(map(str, found))} here; "
            f"apt-get install postgresql-{wanted}, or name a server in {DSN_VARIABLE}"
        )
    return int(wanted)


def _start(config: pytest.Config, run: str, worker: str) -> Postgres:
    from tenancy_orm.testing.embedded import EmbeddedServer

    connections = os.environ.get(EMBEDDED_CONNECTIONS_VARIABLE)
    settings = {"max_connections": connections} if connections else None
    server = EmbeddedServer.for_tests(version=_wanted_version(), settings=settings)
    server.ephemeral = not config.option.keep_databases
    server.start()
    # It has no TLS. To ask it for that takes a tenth of each connection; the programs that tests start do ask.
    os.environ.setdefault("PGSSLMODE", "disable")
    asyncio.run(_prepare(server.url()))
    config.stash[_server_key] = server
    return Postgres(server.url(), server.server_version, run, worker, server.bin_dir, server.data_dir)


async def _prepare(dsn: str) -> str:
    connection = await asyncpg.connect(dsn.replace("postgresql+asyncpg:", "postgresql:", 1), timeout=10)
    try:
        if not await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"):
            raise pytest.UsageError(f"{DSN_VARIABLE} must be a superuser's URL")
        # as the first preparation does: later, roles of other tests would lose access by it, which it refuses
        await connection.execute("REVOKE ALL ON DATABASE postgres FROM PUBLIC")
        await connection.execute("REVOKE ALL ON DATABASE template1 FROM PUBLIC")
        return str(await connection.fetchval("SHOW server_version"))
    finally:
        await connection.close()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist which run it is of."""
    postgres = node.config.stash.get(_postgres_key, None)
    node.workerinput.update(run=node.config.stash[_run_key], version=postgres and postgres.version)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Remember where the server of a worker was that has ended."""
    if described := getattr(node, "workeroutput", {}).get("server"):
        node.config.stash.setdefault(_ended_key, []).append(described)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell where the server of this worker is."""
    server = session.config.stash.get(_server_key, None)
    if server is not None and (output := getattr(session.config, "workeroutput", None)) is not None:
        output["server"] = _command_of(server)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which PostgreSQL the tests run on."""
    postgres = config.stash.get(_postgres_key, None)
    if postgres is None:
        return [] if config.option.collectonly else [f"PostgreSQL {_wanted_version()} (embedded, one for each worker)"]
    where = f"embedded, {postgres.data_dir}" if postgres.data_dir else DSN_VARIABLE
    return [f"PostgreSQL {postgres.version} ({where})"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how to look at what ``--keep-databases`` kept."""
    if not config.option.keep_databases:
        return
    server = config.stash.get(_server_key, None)
    for command in config.stash.get(_ended_key, []) if server is None else [_command_of(server)]:
        terminalreporter.write_line(f"databases kept; serve them by: {command}")


def _command_of(server: EmbeddedServer) -> str:
    return f"python -m tenancy_orm.testing.embedded run --version {server.version} --dir {server.data_dir}"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the embedded server."""
    close_administrators()
    server = config.stash.get(_server_key, None)
    if server is not None:
        server.stop()


def pytest_collection() -> None:
    """Collect no garbage while tests are collected, which makes objects by the thousand and drops few."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Spare the garbage collector the tests themselves: thousands of objects that live as long as the process."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember which tests failed, for ``--keep-databases``."""
    report = yield
    item.stash[_failed_key] = item.stash.get(_failed_key, False) or report.failed
    return report


def _keep(request: pytest.FixtureRequest, what: str) -> bool:
    node: pytest.Item = request.node
    if request.config.option.keep_databases and node.stash.get(_failed_key, False):
        node.add_report_section("teardown", "databases", f"kept: {what}")
        return True
    return False


# --- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Postgres:
    """The PostgreSQL server of this run."""
    return pytestconfig.stash[_postgres_key]


@pytest.fixture
async def empty_url(postgres: Postgres, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The URL of a new, empty database, as the superuser; dropped after the test."""
    name = postgres.new_name()
    yield await postgres.create_database(name)
    if not _keep(request, name):
        await postgres.drop_database(name)


@pytest.fixture(scope="session")
def lasting_installation(postgres: Postgres) -> Iterator[Names]:
    """The installation that this worker's tests use in turn: the first one makes its roles and its template."""
    from tenancy_orm.control.names import Names

    prefix = _new_prefix(postgres)
    yield Names(prefix, uuid4())
    if DSN_VARIABLE in os.environ:
        asyncio.run(postgres.drop_all(prefix))


@pytest.fixture
def installation(request: pytest.FixtureRequest, postgres: Postgres, lasting_installation: Names) -> Names:
    """The installation of ``control_url`` and ``name_prefix``; one of the test's own with ``mark.new_installation``."""
    from tenancy_orm.control.names import Names

    if request.node.get_closest_marker("new_installation"):
        return Names(_new_prefix(postgres), uuid4())
    return lasting_installation


def _new_prefix(postgres: Postgres) -> str:
    digits = "".join(filter(str.isdigit, postgres.worker)) or "0"
    return f"w{digits}x{secrets.token_hex(4)}"


@pytest.fixture
async def control_url(
    postgres: Postgres, installation: Names, lasting_installation: Names, request: pytest.FixtureRequest
) -> AsyncIterator[str]:
    """The URL of a new control database that has its tables, its viewer role and no rows, as the superuser.

    It is dropped after the test.
    """
    from tests.support.control_databases import create_control_database

    name = postgres.new_name()
    yield await create_control_database(postgres, name, names=installation, lasts=installation is lasting_installation)
    if not _keep(request, name):
        await postgres.drop_database(name, but=lasting_installation.stem)


@pytest.fixture
def control_if_used(request: pytest.FixtureRequest) -> str | None:
    """``control_url`` where a test uses it: made before ``name_prefix``, and so dropped after it."""
    return str(request.getfixturevalue("control_url")) if "control_url" in request.fixturenames else None


@pytest.fixture
async def name_prefix(
    postgres: Postgres,
    installation: Names,
    lasting_installation: Names,
    control_if_used: str | None,
    request: pytest.FixtureRequest,
) -> AsyncIterator[str]:
    """A ``TenancyConfig.name_prefix``; databases and roles that a test has named so are dropped after it."""
    from tests.support.control_databases import drop_tenants

    prefix = installation.stem.split("_")[0]
    lasts = installation is lasting_installation
    yield prefix
    if _keep(request, f"{prefix}_*"):
        return
    if lasts and control_if_used is not None:
        await drop_tenants(postgres, control_if_used, prefix, installation)
    else:
        await postgres.drop_all(prefix, but=installation if lasts else None)


@pytest.fixture(scope="session")
def pooler(pytestconfig: pytest.Config, postgres: Postgres) -> Iterator[PgBouncer | None]:
    """The PgBouncer in front of the server, with ``--pooler``; otherwise None."""
    if not pytestconfig.getoption("pooler"):
        yield None
        return
    from tests.support.pgbouncer import pgbouncer

    with pgbouncer(postgres, default_pool_size="20") as running:
        yield running


@pytest.fixture
def tenancy_config(postgres: Postgres, name_prefix: str, control_url: str, pooler: PgBouncer | None) -> TenancyConfig:
    """The configuration of ``tenancy``: one server, the tables of ``tests.support.models``, a key of its own."""
    from tenancy_orm import TenancyConfig
    from tenancy_orm.config import ServerAddresses
    from tests.support.models import Base

    server: str | ServerAddresses = postgres.admin_url
    if pooler is not None:
        server = ServerAddresses(admin=postgres.admin_url, tenants=pooler.address)
    return TenancyConfig(
        control_url=control_url,
        servers={"default": server},
        metadata=Base.metadata,
        encryption_keys={"1": base64.b64encode(secrets.token_bytes(32)).decode()},
        name_prefix=name_prefix,
    )


@pytest.fixture
async def tenancy(tenancy_config: TenancyConfig) -> AsyncIterator[Tenancy]:
    """An open ``Tenancy`` on a control database of its own, without tenants."""
    from tenancy_orm import Tenancy

    opened = Tenancy(tenancy_config)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()
