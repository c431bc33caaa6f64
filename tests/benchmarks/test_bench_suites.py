"""What a database adds to a test: both modes of the plugin, and what people do without it.

Run it with ``make bench ARGS='-k suites'``; ``BENCH_TESTS=60`` for fewer tests than 600. Each way is a suite of its own
that pytest runs in a process of its own, on one server. Every test inserts a row and reads it again. A first run of one
test makes what later ones find there: templates, and a control database. The second one is measured: until its first
test begins, for all tests, less what the same number of tests take that touch no database, and from the last one to the
end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from tests.support import suites
from tests.support.postgres import Postgres
from tests.support.suites import Suite

TESTS = int(os.environ.get("BENCH_TESTS", "600"))
SECONDS = 1_800.0

TABLES = """
from sqlalchemy import Column, DateTime, ForeignKey, Index, Integer, MetaData, String, Table, Text, func

metadata = MetaData()
notes = Table("notes", metadata, Column("id", Integer, primary_key=True), Column("text", Text))
for number in range(7):
    Table(
        f"t{number}",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("note_id", ForeignKey("notes.id"), index=True),
        Column("a", String(100), unique=True),
        Column("b", Integer, index=True),
        Column("c", DateTime(timezone=True), server_default=func.now()),
        Index(f"t{number}_bc", "b", "c"),
    )
"""

SHOP = """
from starlette.applications import Starlette
from starlette.middleware import Middleware

from tables import metadata
from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.asgi import TenancyMiddleware

tenancy = Tenancy(TenancyConfig(control_url="postgresql://app:secret@db.invalid/control", metadata=metadata))
app = Starlette(middleware=[Middleware(TenancyMiddleware, tenancy=tenancy)], lifespan=tenancy.lifespan)
"""

# when the body of each test begins: between the first and the last one lies the work of every test but one, and nothing
# that is done once, at the start or at the end of the run
STARTED = """
import json, time
from pathlib import Path

began = []


def pytest_runtest_call(item):
    began.append(time.time())


def pytest_sessionfinish(session):
    Path("began").write_text(json.dumps([began[0], began[-1]]))
"""

USE = """
    await session.execute(notes.insert().values(text="a"))
    await session.commit()
    assert (await session.execute(notes.select())).one().text == "a"
"""

SESSION = """
@pytest.mark.tenancy(mode="{mode}")
@pytest.mark.parametrize("number", range({tests}))
async def test_it(tenant_session, number):
    session = tenant_session
"""

WITHOUT = """
@pytest.mark.parametrize("number", range({tests}))
async def test_it(number):
    await asyncio.sleep(0)
"""

FIXTURE = """
@pytest.mark.parametrize("number", range({tests}))
async def test_it(session, number):
"""

# a database per test, cloned by one connection that stays open, with nothing around it
CLONED_BY_HAND = """
@pytest.fixture(scope="session")
def admin():
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(URL))

    def execute(sql):
        loop.run_until_complete(connection.execute(sql))

    execute("DROP DATABASE IF EXISTS bench_template")
    execute("CREATE DATABASE bench_template")
    engine = create_engine(AT.set(drivername="postgresql+psycopg", database="bench_template"))
    metadata.create_all(engine)
    engine.dispose()
    yield execute
    execute("DROP DATABASE bench_template")
    loop.run_until_complete(connection.close())
    loop.close()


@pytest.fixture
def cloned(admin):
    admin("CREATE DATABASE bench_clone TEMPLATE bench_template")
    yield
    admin("DROP DATABASE bench_clone WITH (FORCE)")


@pytest.fixture
async def session(cloned):
    engine = create_async_engine(AT.set(drivername="postgresql+asyncpg", database="bench_clone"))
    async with AsyncSession(engine) as session:
        yield session
    await engine.dispose()
"""

PYTEST_POSTGRESQL = """
def load(**connection):
    engine = create_engine(
        AT.set(drivername="postgresql+psycopg", database=connection["dbname"], port=connection["port"])
    )
    metadata.create_all(engine)
    engine.dispose()


server = factories.postgresql_noproc(
    host=AT.host, port=AT.port, user=AT.username, password=AT.password, dbname="bench_pytest", load=[load]
)
postgresql = factories.postgresql("server")


@pytest.fixture
async def session(postgresql):
    engine = create_async_engine(AT.set(drivername="postgresql+asyncpg", database=postgresql.info.dbname))
    async with AsyncSession(engine) as session:
        yield session
    await engine.dispose()
"""

CREATE_ALL = """
@pytest.fixture
async def session():
    engine = create_async_engine(AT.set(drivername="postgresql+asyncpg", database="{database}"))
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
    async with AsyncSession(engine) as session:
        yield session
    await engine.dispose()
"""

IMPORTS = """
import asyncio
import asyncpg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from tables import metadata, notes

URL = {url!r}
AT = make_url(URL)
"""


@dataclass(frozen=True)
class Way:
    """A way to give each test a database: the file with its tests, whether it uses the plugin, and its event loops."""

    name: str
    test: str
    plugin: bool = False
    conftest: str = ""
    loops: str = "session"


@dataclass(frozen=True)
class Run:
    """What a run of a suite took, in seconds: until its first test begins, until the last one does, and to the end."""

    start: float
    tests: float
    end: float


@pytest.fixture
async def database(postgres: Postgres) -> AsyncIterator[str]:
    """The name of an empty database, for ``create_all`` in each test."""
    name = postgres.new_name()
    await postgres.create_database(name)
    yield name
    await postgres.drop_database(name)


def ways(tests: int, database: str) -> list[Way]:
    """What is compared; the first one is what the others are measured against."""
    use = USE
    return [
        Way("no database", WITHOUT.format(tests=tests)),
        Way("CREATE DATABASE ... TEMPLATE, by hand", CLONED_BY_HAND + FIXTURE.format(tests=tests) + use),
        Way("tenancy, mode clone", SESSION.format(mode="clone", tests=tests) + use, plugin=True),
        Way("tenancy, mode rollback", SESSION.format(mode="rollback", tests=tests) + use, plugin=True),
        Way(
            "mode rollback, a loop for each test",
            SESSION.format(mode="rollback", tests=tests) + use,
            plugin=True,
            loops="function",
        ),
        Way(
            "pytest-postgresql, template database",
            "from pytest_postgresql import factories\n" + PYTEST_POSTGRESQL + FIXTURE.format(tests=tests) + use,
            conftest='pytest_plugins = ["pytest_postgresql.plugin"]\n',
        ),
        Way("create_all in each test", CREATE_ALL.format(database=database) + FIXTURE.format(tests=tests) + use),
    ]


async def measure(suite: Suite, *arguments: str) -> Run:
    """Run a suite, all of whose tests must pass."""
    begun = time.time()
    outcome = await suite.run("-x", "-r", "", *arguments)
    ended = time.time()
    assert outcome.status == 0, outcome.text
    first, last = json.loads((suite.directory / "began").read_text("utf-8"))
    return Run(first - begun, last - first, ended - last)


@pytest.mark.timeout(7_200)
async def test_what_a_database_adds_to_a_test(
    postgres: Postgres,
    database: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both modes against each other way, in one run; asserted is only that every test of every way passes."""
    monkeypatch.setattr(suites, "SECONDS", SECONDS)
    # a later run finds what the first one has compiled
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    url = make_url(postgres.admin_url).set(drivername="postgresql").render_as_string(hide_password=False)
    first, second = {}, {}
    for number, way in enumerate(ways(TESTS, database)):
        suite = Suite(tmp_path / str(number), postgres)
        suite.directory.mkdir()
        if not way.plugin:
            del suite.settings["tenancy_app"]
        suite.settings["filterwarnings"] = "[]"
        for what in ("fixture", "test"):
            suite.settings[f"asyncio_default_{what}_loop_scope"] = f'"{way.loops}"'
        suite.write(
            tables=TABLES,
            shop=SHOP,
            conftest=way.conftest + STARTED,
            test_it=IMPORTS.format(url=url) + way.test,
        )
        try:
            first[way.name] = await measure(suite, "test_it.py::test_it[0]")
            second[way.name] = await measure(suite)
        finally:
            await suite.remove()
    nothing, raw = (second[name] for name in list(second)[:2])
    added = {name: (run.tests - nothing.tests) / (TESTS - 1) * 1e3 for name, run in second.items()}
    by_hand = (raw.tests - nothing.tests) / (TESTS - 1) * 1e3
    with capsys.disabled():
        print(f"\n{TESTS} tests, each with a row in 8 tables of its own (make bench ARGS='-k suites')")
        print(f"  {'':40} {'ms added':>9} {'/ by hand':>9} {'s: all tests':>13} {'start':>6} {'1st run':>8} {'end':>6}")
        for name, run in second.items():
            print(
                f"  {name:40} {added[name]:9.2f} {added[name] / by_hand:9.2f} {run.tests:13.2f} "
                f"{run.start:6.2f} {first[name].start:8.2f} {run.end:6.2f}"
            )
