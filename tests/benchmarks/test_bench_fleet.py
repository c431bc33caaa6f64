"""A fleet migration against ``psql -f``, and a tenant that is at head already against a login and a SELECT.

Run by ``make bench ARGS='-k fleet'``; ``BENCH_FLEET_TENANTS`` is the number of databases. Eight are migrated at once.
Every ratio is of two things measured in the same run, in turns.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import statistics
import time
from collections.abc import AsyncIterator
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

    async def seconds(self, databases: list[str], sql: str) -> float:
        self.file.write_text(sql)
        started = time.perf_counter()
        await asyncio.gather(*(self.run(database) for database in databases))
        return time.perf_counter() - started


async def look(url: str, databases: list[str]) -> float:
    """Seconds to log in to each database, to read its revision and to close the connection, eight at once."""
    slots = asyncio.Semaphore(AT_ONCE)
    parsed = make_url(url)

    async def one(database: str) -> None:
        async with slots:
            connection = await asyncpg.connect(parsed.set(database=database).render_as_string(hide_password=False))
            await connection.fetchval("SELECT version_num FROM alembic_version")
            await connection.close()

    started = time.perf_counter()
    await asyncio.gather(*map(one, databases))
    return time.perf_counter() - started


@pytest.mark.timeout(1_800)
async def test_bench_fleet(fleet: Fleet, project: Project, postgres: Postgres, tmp_path: Path) -> None:
    """One revision (ADD COLUMN, CREATE INDEX) on every tenant: ours, psql's, and nothing to do."""
    psql = Psql(postgres, tmp_path / "revision.sql")
    databases = [fleet.database(slug) for slug in fleet.tenants]
    ours, theirs, nothing, floor, memory = [], [], [], [], []
    for number in range(1, ROUNDS + 1):
        column = f"ours{number}"
        body = f'op.add_column("notes", sa.Column("{column}", sa.Integer))\n'
        body += f'op.create_index("ix_{column}", "notes", ["{column}"])'
        project.add(f"{number:04}", body, down=f"{number - 1:04}")
        ours.append((await upgrade(fleet, changed=TENANTS)) / TENANTS)
        theirs.append(await psql.seconds(databases, same_as_sql(f"theirs{number}")) / TENANTS)
        nothing.append((await upgrade(fleet, changed=0)) / TENANTS)
        floor.append(await look(postgres.admin_url, databases) / TENANTS)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    mine, psqls, idle, bare = (statistics.median(figures) * 1e3 for figures in (ours, theirs, nothing, floor))
    print(f"\n{TENANTS} tenants, one revision, {AT_ONCE} at once, median of {ROUNDS} rounds")
    print(f"tenancy.migrations.upgrade()   {mine:6.1f} ms a tenant   {mine / psqls:.2f} x psql   goal: at most 1.2 x")
    print(f"psql --single-transaction -f   {psqls:6.1f} ms a tenant")
    print(f"nothing to do                  {idle:6.1f} ms a tenant   {idle / bare:.2f} x a look   goal: at most 1.2 x")
    print(f"a look: login, SELECT, close   {bare:6.1f} ms a tenant")
    print(f"most memory after each round   {', '.join(f'{most:.0f}' for most in memory)} MiB   goal: flat")


async def upgrade(fleet: Fleet, *, changed: int) -> float:
    """Seconds of a run, the new template included."""
    report = await fleet.migrations.upgrade(concurrency=AT_ONCE)
    report.raise_for_failures()
    assert len(report.changed) == changed
    return report.seconds


def same_as_sql(column: str) -> str:
    return (
        f"ALTER TABLE notes ADD COLUMN {column} integer;\n"
        f"CREATE INDEX ix_{column} ON notes ({column});\n"
        "UPDATE alembic_version SET version_num = version_num;\n"
    )
