"""Processes that take part in a run are killed or frozen: each revision is applied once, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet import Fleet, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project
from tests.support.runs_process import config_of
from tests.support.shell import ROOT, environment
from tests.support.waiting import until
from tests.support.warm import Program, start_module

pytestmark = pytest.mark.new_installation

SECONDS = 120.0
TENANTS = ("acme", "globex", "initech")
# a second application of it would fail, and leave another row
RATING = """
op.add_column("notes", sa.Column("rating", sa.Integer))
op.execute("INSERT INTO notes (body) VALUES ('0002')")
"""

Task = dict[str, Any]


@pytest.fixture
def task(postgres: Postgres, control_url: str, name_prefix: str, tmp_path: Path) -> Task:
    """Where the other process works."""
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES)
    given = {"control_url": control_url, "admin_url": postgres.admin_url, "name_prefix": name_prefix}
    return {**given, "migrations": str(project.migrations), "root": str(project.root)}


@pytest.fixture
async def fleet(task: Task) -> AsyncIterator[Fleet]:
    """Three tenants at 0001; the project has 0002."""
    async with open_fleet(config_of(task), initialise=True) as opened:
        await opened.create(*TENANTS)
        Project(Path(task["root"])).add("0002", RATING, down="0001")
        yield opened


@asynccontextmanager
async def another(task: Task, **more: Any) -> AsyncIterator[Program]:
    """Another process, which upgrades all tenants."""
    child = await start_module("tests.support.runs_process", cwd=ROOT, env=environment())
    try:
        child.stdin.write(json.dumps({**task, **more}).encode())
        child.stdin.close()
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def is_applied_once(fleet: Fleet) -> None:
    for slug in TENANTS:
        assert await fleet.fetch(slug, "SELECT body FROM notes") == [("0002",)], slug
        assert await fleet.recorded(slug) == "0002"
    records = await fleet.migrations.run_tenants(1)
    assert [(one.state, one.revision_before, one.revision_after, one.changed) for one in records] == [
        ("done", "0001", "0002", True)
    ] * 3
    assert (await fleet.migrations.get_run(1)).state == "done"


@pytest.mark.parametrize("at", ["before the first claim", "before the change", "after the change", "after the last"])
async def test_a_run_that_is_killed_is_resumed(fleet: Fleet, task: Task, at: str) -> None:
    """What it has committed and not recorded is found, with the revision that the tenant had before."""
    async with another(task, at=at, signal="SIGKILL") as child, asyncio.timeout(SECONDS):
        assert await child.wait() == -signal.SIGKILL
    await fleet.expire_claims()
    assert (await fleet.migrations.get_run(1)).is_interrupted
    async with asyncio.timeout(SECONDS):
        assert (await fleet.migrations.resume(1)).ok
    await is_applied_once(fleet)
    lost = [one.losses for one in await fleet.migrations.run_tenants(1)]
    # the first tenant's outcome may not have been written yet either
    assert sum(lost) in ((1, 2) if "change" in at else (0,))


async def test_a_relative_target_is_counted_from_where_each_tenant_was(fleet: Fleet, task: Task) -> None:
    """What was committed before the process was killed is not downgraded again by whoever resumes the run."""
    project = Project(Path(task["root"]))
    project.add("0003", "pass", "pass", down="0002")
    project.add("0004", "pass", "pass", down="0003")
    assert (await fleet.migrations.upgrade()).ok
    async with another(task, down="-1", at="after the change", signal="SIGKILL") as child, asyncio.timeout(SECONDS):
        assert await child.wait() == -signal.SIGKILL
    revisions = [await fleet.revision(slug) for slug in TENANTS]
    assert revisions[1:] == ["0003", "0004"]
    await fleet.expire_claims()
    report = await fleet.migrations.resume(2)
    assert report.ok
    assert [await fleet.revision(slug) for slug in TENANTS] == ["0003"] * 3
    assert [(one.before, one.after, one.changed) for one in report.outcomes] == [("0004", "0003", True)] * 3


async def test_the_rights_are_set_on_what_a_killed_process_has_committed(fleet: Fleet, task: Task) -> None:
    """The grant hook comes after the commit; whoever resumes the run finds nothing to migrate there."""
    create = 'op.execute("CREATE TABLE ledger (n integer)")'
    Project(Path(task["root"])).add("0003", create, down="0002")
    async with another(task, at="after the change", signal="SIGKILL") as child, asyncio.timeout(SECONDS):
        assert await child.wait() == -signal.SIGKILL
    await fleet.expire_claims()
    assert (await fleet.migrations.resume(1)).ok
    for slug in TENANTS:
        assert await fleet.may(slug, "UPDATE", "ledger") is False, slug


@pytest.mark.parametrize("at", ["in the check", "before the second wave", "after the second wave is open"])
async def test_a_process_is_killed_between_waves(fleet: Fleet, task: Task, tmp_path: Path, at: str) -> None:
    """Who goes on checks again, and begins no wave without; a wave that is open was checked."""
    checked, killed = tmp_path / "checked", tmp_path / "killed"
    kill = f"[ -e {killed} ] || {{ touch {killed}; kill -9 $PPID; }}" if at == "in the check" else ""
    (tmp_path / "check.sh").write_text(f"echo $MIGRATION_WAVE $MIGRATION_TENANTS >> {checked}\n{kill}\n")
    more = {"waves": [f"tenant=acme command='sh {tmp_path}/check.sh'"], "signal": "SIGKILL"}
    async with another(task, **more, at=None if kill else at) as child, asyncio.timeout(SECONDS):
        assert await child.wait() == -signal.SIGKILL
    assert checked.read_text() == "1 1\n"
    assert [await fleet.revision(slug) for slug in TENANTS] == ["0002", "0001", "0001"]
    await fleet.expire_claims()
    assert (await fleet.migrations.get_run(1)).is_interrupted
    async with asyncio.timeout(SECONDS):
        assert (await fleet.migrations.join(1)).ok
    assert checked.read_text() == "1 1\n" * (1 if "open" in at else 2)
    await is_applied_once(fleet)


@pytest.mark.parametrize("at", ["before the change", "after the change"])
async def test_a_frozen_process_does_no_harm_when_it_goes_on(fleet: Fleet, task: Task, at: str) -> None:
    """Another takes over its tenants. It notices, writes nothing about them, and takes part again."""
    async with another(task, at=at, signal="SIGSTOP") as child, asyncio.timeout(SECONDS):
        stat = Path(f"/proc/{child.pid}/stat")

        def is_stopped() -> bool:
            return stat.read_text().rpartition(")")[2].split()[0] == "T"

        await until(is_stopped, seconds=SECONDS)
        await fleet.expire_claims()
        joined = asyncio.create_task(fleet.migrations.upgrade(join=True))

        async def is_taken_over() -> bool:
            processes = await fleet.migrations.run_processes(1)
            return len(processes) > 1 and processes[0].is_lost

        await until(is_taken_over, seconds=SECONDS)
        child.send_signal(signal.SIGCONT)
        assert (await joined).ok
        assert await child.wait() == 0
        answer = json.loads(await child.stdout.read())
    assert answer == {"ok": True, "run": 1, "changed": 3}
    await is_applied_once(fleet)
