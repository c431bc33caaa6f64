"""Backups and restores of small tenants against ``pg_dump`` and ``pg_restore`` in a shell loop, as many at once.

Run by ``make bench ARGS='-k backups'``. ``BENCH_BACKUP_TENANTS`` is the number of databases, and
``BENCH_BACKUP_AT_ONCE`` how many are worked on at once. Every ratio is of two things measured in one run, in turns.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import statistics
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import Backup
from tenancy_orm.restores import BackupSource
from tests.support.postgres import Postgres

TENANTS = int(os.environ.get("BENCH_BACKUP_TENANTS", "200"))
AT_ONCE = int(os.environ.get("BENCH_BACKUP_AT_ONCE", "4"))
ROUNDS = 3
ROWS = "INSERT INTO notes (body) SELECT md5(n::text) || repeat('x', 100) FROM generate_series(1, 1000) n"


@pytest.fixture
def tenancy_config(tenancy_config: TenancyConfig, tmp_path: Path) -> TenancyConfig:
    backup = {"store": f"file:{tmp_path / 'store'}", "directory": tmp_path / "spool", "concurrency": AT_ONCE}
    return tenancy_config.replace(backup=backup)


@pytest.fixture
async def databases(tenancy: Tenancy) -> dict[str, str]:
    """The tenants' databases, by slug; each has 1,000 rows."""
    found: dict[str, str] = {}
    for number in range(TENANTS):
        created = await tenancy.tenants.create(f"t{number}")
        async with tenancy.transaction(created.tenant) as session:
            await session.execute(text(ROWS))
        assert created.tenant.placement is not None
        found[created.tenant.slug] = created.tenant.placement.database
    return found


class Shell:
    """A shell loop of PostgreSQL's programs."""

    def __init__(self, postgres: Postgres, directory: Path) -> None:
        program = str(postgres.bin_dir / "pg_dump") if postgres.bin_dir else shutil.which("pg_dump")
        if program is None:
            pytest.fail("there is no pg_dump to measure against; install postgresql-client")
        url = make_url(postgres.admin_url)
        self.bin = Path(program).parent
        self.directory = directory
        self.environment = {
            **os.environ,
            "PGHOST": url.host or "localhost",
            "PGPORT": str(url.port or 5432),
            "PGUSER": url.username or "postgres",
            "PGPASSWORD": str(url.password or ""),
        }

    async def each(self, names: list[str], command: str) -> None:
        """Run a command for each name, which is ``{}`` in it."""
        line = f"xargs -P {AT_ONCE} -I{{}} sh -ec {shlex.quote(command)}"
        process = await asyncio.create_subprocess_shell(line, stdin=asyncio.subprocess.PIPE, env=self.environment)
        await process.communicate("\n".join(names).encode())
        assert process.returncode == 0

    async def dump(self, names: list[str]) -> None:
        await self.each(names, f"rm -rf {self.directory}/{{}}; {self.bin}/pg_dump -Fd -f {self.directory}/{{}} {{}}")

    async def restore(self, names: list[str]) -> None:
        await self.each(
            names,
            f"{self.bin}/createdb -T template0 {{}}_r; {self.bin}/pg_restore -e -O -x -d {{}}_r {self.directory}/{{}}",
        )

    async def drop(self, names: list[str]) -> None:
        await self.each(names, f"{self.bin}/dropdb {{}}_r")


async def milliseconds(work: Awaitable[object]) -> float:
    """Of one tenant, by the clock."""
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1e3 / TENANTS


async def restore_all(tenancy: Tenancy, made: list[Backup]) -> None:
    queue = iter(made)

    async def work() -> None:
        for backup in queue:
            assert backup.slug is not None
            await tenancy.restores.restore(backup.slug, BackupSource(tenancy.backups, backup))

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())


async def verify_all(tenancy: Tenancy, made: list[Backup]) -> None:
    queue = iter(made)

    async def work() -> None:
        for backup in queue:
            assert (await tenancy.backups.verify(backup)).is_good

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())


@pytest.mark.timeout(0)
async def test_backups_and_restores(
    tenancy: Tenancy, databases: dict[str, str], postgres: Postgres, tmp_path: Path
) -> None:
    shell, names = Shell(postgres, tmp_path), list(databases.values())
    # keys are made once
    await tenancy.backups.run(list(databases))
    costs: dict[str, list[float]] = {}
    made: list[Backup] = []

    async def back_up() -> None:
        report = await tenancy.backups.run(list(databases))
        assert not report.reasons
        made[:] = report.done

    for _ in range(ROUNDS):
        costs.setdefault("backup", []).append(await milliseconds(back_up()))
        costs.setdefault("pg_dump", []).append(await milliseconds(shell.dump(names)))
        costs.setdefault("verification", []).append(await milliseconds(verify_all(tenancy, made)))
        costs.setdefault("pg_restore", []).append(await milliseconds(shell.restore(names)))
        await shell.drop(names)
    costs["restore"] = [await milliseconds(restore_all(tenancy, made))]
    found = {name: statistics.median(values) for name, values in costs.items()}
    print(f"\n{TENANTS} tenants with 1,000 rows, {AT_ONCE} at once, ms a tenant:")
    for name, value in found.items():
        print(f"  {name:<14} {value:7.1f}")
    print(f"  backup / pg_dump               {found['backup'] / found['pg_dump']:.2f}")
    print(f"  verification / pg_restore      {found['verification'] / found['pg_restore']:.2f}")
    print(f"  restore and swap / pg_restore  {found['restore'] / found['pg_restore']:.2f}")
