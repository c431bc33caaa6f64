"""``tenancy migrate upgrade --processes``: several processes of one machine do the work of a run, and end with it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from tests.integration.cli.test_cli import COMMAND, Cli, cli
from tests.support.projects import NOTES, Project
from tests.support.shell import processes_in
from tests.support.waiting import until

__all__ = ["cli"]

pytestmark = pytest.mark.timeout(400)  # each test runs several programs, some of them from their start

SECONDS = 150.0
TENANTS = ("acme", "globex", "hooli", "initech")
OPTIONS = ("migrate", "upgrade", "--processes", "2", "--concurrency", "1", "--server-concurrency", "2")

# each process says that it has a tenant, and goes on when another one has said so too; the template's is for nobody
MEET = """
if op.get_context().opts["tenant"] is not None:
    import os, pathlib
    pids = pathlib.Path({pids!r})
    (pids / str(os.getpid())).touch()
    while len(list(pids.iterdir())) < 2:
        op.execute("SELECT pg_sleep(0.05)")
    {then}
"""

MAKE = """
import asyncio, json, os, sys

from tenancy_orm.cli.runtime import load_tenancy


async def main():
    async with load_tenancy() as tenancy:
        for slug in sys.argv[1:]:
            await tenancy.tenants.create(slug)


asyncio.run(main())
print(json.dumps(dict(os.environ)))
"""

LOADED_ONCE = """
import os, pathlib, sys

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import ConfigurationError

if sys.argv[0].endswith("migrate_process.py"):
    pathlib.Path("pid").write_text(str(os.getpid()))
    pathlib.Path("pid").rename("refused")
    raise ConfigurationError("not here")
config = TenancyConfig.from_env()
"""


@dataclass
class Prepared:
    """Four tenants that lack a revision, and where the processes that have run it are known."""

    cli: Cli
    directory: Path
    pids: Path
    variables: dict[str, str]

    def revise(self, then: str = "pass") -> None:
        """Add the revision; ``then`` is what it does once both processes have a tenant."""
        self.pids.mkdir()
        body = MEET.format(pids=str(self.pids), then=then)
        Project(self.directory).add("0002", body, down="0001")

    def met(self) -> set[int]:
        """The processes that have run it."""
        return {int(one.name) for one in self.pids.iterdir()}

    @asynccontextmanager
    async def started(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """The command, in a process of its own."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *COMMAND, *OPTIONS),
            cwd=self.directory,
            env=self.variables,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(SECONDS):
                yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def both_run(self) -> None:
        await until(lambda: len(self.met()) == 2, seconds=SECONDS)

    async def states(self) -> dict[str, int]:
        (listed,) = (await self.cli("migrate", "runs", "--json")).json
        return {name: number for name, number in listed["tenants"].items() if number}


@pytest.fixture
async def prepared(cli: Cli, tmp_path: Path) -> Prepared:
    await cli("init")
    Project(tmp_path).add("0001", NOTES)
    (tmp_path / "make.py").write_text(MAKE)
    # all in one command, since each takes its time to start
    made = await cli(program=("make.py", *TENANTS))
    assert made.status == 0, made.err
    return Prepared(cli, tmp_path, tmp_path / "pids", made.json)


async def test_two_processes_do_the_work_of_one_run(prepared: Prepared) -> None:
    """Each migrates some of the tenants; what one prints is not in the report; none is left."""
    prepared.revise("print('from', os.getpid())")
    async with prepared.started() as process:
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
    helper = prepared.met() - {process.pid}
    assert len(helper) == 1
    *printed, report = out.decode().splitlines()
    assert report.startswith("upgrade head: 4 tenants, 4 migrated, 0 unchanged, 0 failed, ")
    assert set(printed) == {f"from {process.pid}"}
    assert f"from {helper.pop()}" in err.decode()
    (shown,) = [(await prepared.cli("migrate", "show", "1", "--json")).json]
    assert {one["pid"] for one in shown["processes"]} == prepared.met()
    assert processes_in(prepared.directory) == []


async def test_a_failure_in_any_process_fails_the_command(prepared: Prepared) -> None:
    """The report is of the whole run."""
    prepared.revise(f"if os.getppid() != {os.getpid()}: raise ValueError('not here')")
    async with prepared.started() as process:
        out, err = await process.communicate()
        assert process.returncode == 1, err.decode()
    assert "ValueError: not here" in out.decode()
    failed = (await prepared.states())["failed"]
    assert 0 < failed < 4
    assert f"{failed} failed" in out.decode().splitlines()[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interruption_ends_all_of_them(prepared: Prepared, number: signal.Signals) -> None:
    """Each rolls back what it is doing, and its tenants wait for whoever resumes the run."""
    prepared.revise('op.execute("SELECT pg_sleep(600)")')
    async with prepared.started() as process:
        await prepared.both_run()
        process.send_signal(number)
        _, err = await process.communicate()
        assert process.returncode == 128 + number
    assert err.decode().endswith("run 1 is interrupted; continue with: tenancy migrate resume 1\n")
    assert "Traceback" not in err.decode()
    assert processes_in(prepared.directory) == []
    assert await prepared.states() == {"waiting": 4}


async def test_none_outlives_a_command_that_is_killed(prepared: Prepared) -> None:
    """The others give back their tenants, and end."""
    prepared.revise('op.execute("SELECT pg_sleep(600)")')
    async with prepared.started() as process:
        await prepared.both_run()
        process.kill()
        await process.wait()
        await until(lambda: processes_in(prepared.directory) == [], seconds=SECONDS)
    # one is claimed by the process that was killed; nobody can say yet that it was
    assert await prepared.states() == {"running": 1, "waiting": 3}


async def test_the_others_go_on_without_one_that_is_killed(prepared: Prepared, empty_url: str) -> None:
    """The command says so, and migrates its tenants once its claim is over."""
    prepared.revise(f"while os.getppid() != {os.getpid()}: op.execute('SELECT pg_sleep(0.05)')")
    async with prepared.started() as process:
        await prepared.both_run()
        (helper,) = prepared.met() - {process.pid}
        os.kill(helper, signal.SIGKILL)
        assert process.stderr is not None
        said = ""
        while f"has ended with status {-signal.SIGKILL}; the others continue" not in said:
            said = (await process.stderr.readline()).decode()
            assert said
        connection = await asyncpg.connect(empty_url.replace("+asyncpg", ""))
        await connection.execute(
            "UPDATE tenancy.migration_run_processes SET claimed_until = clock_timestamp() WHERE pid = $1", helper
        )
        await connection.close()
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
    assert out.decode().startswith("upgrade head: 4 tenants, 4 migrated, 0 unchanged, 0 failed, ")


async def test_the_others_go_on_without_one_that_cannot_load_the_application(prepared: Prepared) -> None:
    """It says why, without a traceback, and the command that it has ended."""
    (prepared.directory / "app.py").write_text(LOADED_ONCE)
    prepared.variables["TENANCY_APP"] = "app:config"
    body = """
        import os, pathlib
        if op.get_context().opts["tenant"] is not None:
            while not (found := pathlib.Path("refused")).exists() or os.path.exists(f"/proc/{found.read_text()}"):
                op.execute("SELECT pg_sleep(0.05)")
    """
    Project(prepared.directory).add("0002", body, down="0001")
    async with prepared.started() as process:
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
    assert "4 migrated" in out.decode()
    assert "error: 'app:config' cannot be loaded: " in err.decode()
    assert "a process that took part in the run has ended with status 1; the others continue" in err.decode()
    assert "Traceback" not in err.decode()
