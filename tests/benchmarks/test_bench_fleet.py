"""A fleet migration against ``psql -f``, and a tenant that is at head already against a login and a SELECT.

Run by ``make bench ARGS='-k fleet'``; ``BENCH_FLEET_TENANTS`` is the number of databases. Eight are migrated at once.
Every ratio is of two things measured in the same run, in turns: by the clock, and by the time that processors have
worked for it, in this process, in PostgreSQL and in psql. That one depends less on what else runs on the machine.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import statistics
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import astuple, dataclass
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project

TENANTS = int(os.environ.get("BENCH_FLEET_TENANTS", "200"))
AT_ONCE = 8
ROUNDS = 3


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path)
    project.add("0000", NOTES)
    return project


@pytest.fixture
async def fleet(postgres: Postgres, name_prefix: str, control_url: str, project: Project) -> AsyncIterator[Fleet]:
    config = fleet_config(postgres, control_url, name_prefix, project)
    async with open_fleet(config, initialise=True) as opened:
        slugs = [f"t{number}" for number in range(TENANTS)]
        for start in range(0, TENANTS, 4):
            await asyncio.gather(*(opened.create(slug) for slug in slugs[start : start + 4]))
        yield opened


class Psql:
    """Runs one SQL file on many databases."""

    def __init__(self, postgres: Postgres, file: Path) -> None:
        found = str(postgres.bin_dir / "psql") if postgres.bin_dir else shutil.which("psql")
        if found is None:
            pytest.fail("there is no psql to measure against; install postgresql-client")
        self.program: str = found
        self.file = file
        self.url = make_url(postgres.admin_url)
        self.slots = asyncio.Semaphore(AT_ONCE)

    async def run(self, database: str) -> None:
        url = self.url
        arguments = ["-qX", "-v", "ON_ERROR_STOP=1", "--single-transaction", "-f", str(self.file)]
        address = ["-h", url.host or "localhost", "-p", str(url.port or 5432), "-U", url.username or "postgres"]
        async with self.slots:
            process = await asyncio.create_subprocess_exec(
                self.program, *arguments, *address, database, env={**os.environ, "PGPASSWORD": url.password or ""}
            )
            assert await process.wait() == 0

    async def run_on(self, databases: list[str], sql: str) -> None:
        self.file.write_text(sql)
        await asyncio.gather(*(self.run(database) for database in databases))


@dataclass(frozen=True)
class Cost:
    """Milliseconds a tenant: by the clock, and of processors in this process, in programs it started, in PostgreSQL."""

    clock: float
    own: float
    programs: float
    postgres: float

    @property
    def work(self) -> float:
        return self.own + self.programs + self.postgres

    def __str__(self) -> str:
        own = f"{self.own + self.programs:.1f} here and {self.postgres:.1f} in PostgreSQL"
        return f"{self.clock:6.1f} ms a tenant, {self.work:5.1f} of processors: {own}"

    @classmethod
    def median(cls, costs: list[Cost]) -> Cost:
        return cls(*map(statistics.median, zip(*map(astuple, costs), strict=True)))


class Meter:
    """Measures what something costs. The CPU of a server of somebody else is not known: 0."""

    def __init__(self, postgres: Postgres) -> None:
        pid = None if postgres.data_dir is None else postgres.data_dir / "pgdata" / "postmaster.pid"
        self.pid = None if pid is None else int(pid.read_text().split()[0])

    async def cost(self, work: Awaitable[object]) -> Cost:
        before = (time.perf_counter(), *self._processors())
        await work
        ended = time.perf_counter()
        # the server counts a backend when it has gone
        await asyncio.sleep(0.3)
        after = (ended, *self._processors())
        return Cost(*((new - old) * 1e3 / TENANTS for old, new in zip(before, after, strict=True)))

    def _processors(self) -> tuple[float, float, float]:
        own, programs = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        return own.ru_utime + own.ru_stime, programs.ru_utime + programs.ru_stime, self._server()

    def _server(self) -> float:
        """Seconds of all backends, those that have gone included."""
        if self.pid is None:
            return 0.0
        ticks = 0
        for directory in Path("/proc").iterdir():
            if not directory.name.isdigit():
                continue
            try:
                # after the name, which may have spaces: state, parent, ..., utime, stime, and those of dead children
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has gone
            if int(directory.name) == self.pid:
                ticks += sum(map(int, fields[11:15]))
            elif int(fields[1]) == self.pid:
                ticks += sum(map(int, fields[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")


async def look(url: str, databases: list[str]) -> None:
    """Log in to each database, read its revision and close the connection, eight at once."""
    slots = asyncio.Semaphore(AT_ONCE)
    parsed = make_url(url)

    async def one(database: str) -> None:
        async with slots:
            connection = await asyncpg.connect(parsed.set(database=database).render_as_string(hide_password=False))
            await connection.fetchval("SELECT version_num FROM alembic_version")
            await connection.close()

    await asyncio.gather(*map(one, databases))


@pytest.mark.timeout(1_800)
async def test_bench_fleet(fleet: Fleet, project: Project, postgres: Postgres, tmp_path: Path) -> None:
    """One revision (ADD COLUMN, CREATE INDEX) on every tenant: ours, psql's, and nothing to do."""
    psql, meter = Psql(postgres, tmp_path / "revision.sql"), Meter(postgres)
    databases = [fleet.database(slug) for slug in fleet.tenants]
    ours, theirs, nothing, floor, template, memory = [], [], [], [], [], []
    for number in range(1, ROUNDS + 1):
        column = f"ours{number}"
        body = f'op.add_column("notes", sa.Column("{column}", sa.Integer))\n'
        body += f'op.create_index("ix_{column}", "notes", ["{column}"])'
        project.add(f"{number:04}", body, down=f"{number - 1:04}")
        started = time.perf_counter()
        await fleet.provisioner.template("default")
        template.append((time.perf_counter() - started) * 1e3)
        ours.append(await meter.cost(upgrade(fleet, changed=TENANTS)))
        theirs.append(await meter.cost(psql.run_on(databases, same_as_sql(f"theirs{number}"))))
        nothing.append(await meter.cost(upgrade(fleet, changed=0)))
        floor.append(await meter.cost(look(postgres.admin_url, databases)))
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    mine, psqls, idle, bare = map(Cost.median, (ours, theirs, nothing, floor))
    print(f"\n{TENANTS} tenants, one revision, {AT_ONCE} at once, median of {ROUNDS} rounds, {os.cpu_count()} cores")
    print(f"tenancy.migrations.upgrade()  {mine}")
    print(f"psql --single-transaction -f  {psqls}")
    print(f"  ratio {mine.clock / psqls.clock:.2f} by the clock, {mine.work / psqls.work:.2f} of processors, goal: 1.2")
    print(f"nothing to do                 {idle}")
    print(f"a look: login, SELECT, close  {bare}")
    print(f"  ratio {idle.clock / bare.clock:.2f} by the clock, {idle.work / bare.work:.2f} of processors, goal: 1.2")
    print(f"before, for the whole run: the new template, {statistics.median(template):.0f} ms")
    print(f"most memory after each round  {', '.join(f'{most:.0f}' for most in memory)} MiB, goal: flat")


async def upgrade(fleet: Fleet, *, changed: int) -> None:
    report = await fleet.migrations.upgrade(concurrency=AT_ONCE)
    report.raise_for_failures()
    assert len(report.changed) == changed


def same_as_sql(column: str) -> str:
    return (
        f"ALTER TABLE notes ADD COLUMN {column} integer;\n"
        f"CREATE INDEX ix_{column} ON notes ({column});\n"
        "UPDATE alembic_version SET version_num = version_num;\n"
    )
