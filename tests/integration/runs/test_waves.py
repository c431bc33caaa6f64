"""A run goes on with its next wave only where what comes before it holds."""

from __future__ import annotations

import asyncio
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import ConfigurationError, RunStateError
from tenancy_orm.runs import Wave, WaveReport, Waves, gate
from tests.support.fleet import Fleet, open_fleet
from tests.support.projects import Project
from tests.support.waiting import until

SLUGS = ("acme", "globex", "initech", "umbrella")
COLUMN = ('op.add_column("notes", sa.Column("title", sa.Text))', 'op.drop_column("notes", "title")')
# fails for one tenant until a file is there
BROKEN = """
from pathlib import Path
tenant = op.get_context().opts["tenant"]
if tenant is not None and tenant.slug in {slugs} and not Path({mended!r}).exists():
    raise RuntimeError("broken here")
op.add_column("notes", sa.Column("title", sa.Text))
"""


@pytest.fixture
async def fleet(fleet: Fleet) -> Fleet:
    """Four tenants at 0001."""
    await fleet.create("umbrella")
    return fleet


class Checks(types.ModuleType):
    """A module of an application's, with checks that are called and answer as a test wants."""

    def __init__(self) -> None:
        super().__init__("run_checks")
        self.reports: list[WaveReport] = []
        self.answer: Any = None
        self.entered = asyncio.Event()
        self.may_end = asyncio.Event()

    async def check(self, report: WaveReport) -> Any:
        self.reports.append(report)
        return self.answer

    async def slow(self, report: WaveReport) -> Any:
        self.reports.append(report)
        self.entered.set()
        await self.may_end.wait()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    module = Checks()
    monkeypatch.setitem(sys.modules, "run_checks", module)
    return module


def canary(**more: Any) -> Waves:
    return Waves((Wave(name="canary", tenants=["acme"], **more),))


async def migrated(fleet: Fleet) -> list[str]:
    """The tenants that are at 0002."""
    return [slug for slug in SLUGS if await fleet.revision(slug) == "0002"]


async def test_a_run_pauses_between_waves_and_goes_on(fleet: Fleet, project: Project, checks: Checks) -> None:
    """The canary alone is migrated, its check gets a report, and the rest follows when somebody says so."""
    project.add("0002", *COLUMN, down="0001")
    report = await fleet.migrations.upgrade(waves=canary(functions="run_checks:check", pause=True))
    assert report.run is not None
    assert (report.state, report.is_planned, report.ok) == ("paused", True, False)
    assert report.reason == "paused before wave 2 (rest), as planned"
    assert await migrated(fleet) == ["acme"]
    (seen,) = checks.reports
    assert (seen.run, seen.wave, seen.name, seen.tenants, seen.failed) == (report.run, 1, "canary", ("acme",), ())
    assert await fleet.registry.fleet_revision() != "0002"

    progress = await fleet.migrations.progress(report.run)
    assert (progress.state, progress.wave, progress.wave_name, progress.total) == ("paused", 2, "rest", 4)
    assert (progress.done, progress.failed, progress.left) == (1, 0, 3)
    line = f"run {report.run} paused, upgrade head, wave 2 of 2 (rest): 1 of 4 done, 0 failed, 0 running"
    assert progress.line().startswith(line)
    with pytest.raises(RunStateError):
        await fleet.migrations.pause(report.run)

    done = await fleet.migrations.resume(report.run)
    done.raise_for_failures()
    assert (done.state, await migrated(fleet), len(checks.reports)) == ("done", list(SLUGS), 1)
    assert await fleet.registry.fleet_revision() == "0002"


async def test_a_broken_canary_saves_the_others(fleet: Fleet, project: Project, tmp_path: Path) -> None:
    """Without waves the migration would go on with everybody; with them it pauses, and a retry goes on."""
    project.add("0002", BROKEN.format(slugs=("acme",), mended=str(tmp_path / "mended")), COLUMN[1], down="0001")
    paused = await fleet.migrations.upgrade(waves=canary())
    assert paused.run is not None
    assert (paused.state, paused.is_planned) == ("paused", False)
    assert paused.reason == "1 of 1 tenants failed in wave 'canary', none may: acme"
    assert await migrated(fleet) == []

    unmended = await fleet.migrations.resume(paused.run)
    assert (unmended.state, await migrated(fleet)) == ("paused", [])
    (tmp_path / "mended").touch()
    done = await fleet.migrations.retry(paused.run)
    assert (done.state, done.ok, await migrated(fleet)) == ("done", True, list(SLUGS))

    (tmp_path / "mended").unlink()
    await fleet.migrations.downgrade("0001")
    whole = await fleet.migrations.upgrade()
    assert (whole.state, await migrated(fleet)) == ("failed", ["globex", "initech", "umbrella"])


async def test_a_budget_lets_some_fail_and_checks_can_be_skipped(
    fleet: Fleet, project: Project, checks: Checks, tmp_path: Path
) -> None:
    """A share of the wave; a check that does not hold is repeated by resume, or passed over when asked for."""
    project.add("0002", BROKEN.format(slugs=("acme",), mended="/nowhere"), COLUMN[1], down="0001")
    checks.answer = "too many errors"
    half = Wave(tenants=["acme", "globex"], error_budget=0.5, functions="run_checks:check")
    paused = await fleet.migrations.upgrade(waves=Waves((half,)))
    assert paused.run is not None
    assert (paused.state, paused.reason) == ("paused", "function run_checks:check says: too many errors")
    assert (await fleet.migrations.resume(paused.run)).state == "paused"
    assert [report.failed for report in checks.reports] == [("acme",), ("acme",)]
    ended = await fleet.migrations.resume(paused.run, skip_checks=True)
    assert (ended.state, await migrated(fleet), len(checks.reports)) == ("failed", ["globex", "initech", "umbrella"], 2)


async def test_a_check_after_the_last_wave(fleet: Fleet, project: Project, checks: Checks) -> None:
    """All tenants are migrated, and the run is not done before it holds."""
    project.add("0002", *COLUMN, down="0001")
    checks.answer = False
    waves = Waves((Wave(rest=True, functions="run_checks:check"),))
    paused = await fleet.migrations.upgrade(waves=waves)
    assert paused.run is not None
    assert (paused.state, paused.ok, await migrated(fleet)) == ("paused", False, list(SLUGS))
    assert await fleet.registry.fleet_revision() != "0002"
    checks.answer = True
    assert (await fleet.migrations.resume(paused.run)).ok
    assert await fleet.registry.fleet_revision() == "0002"
    checks.answer = False
    again = await fleet.migrations.downgrade("0001", waves=waves)
    assert again.run is not None
    assert (again.state, (await fleet.migrations.resume(again.run, skip_checks=True)).state) == ("paused", "done")


async def test_failures_are_bounded(fleet: Fleet, project: Project, tmp_path: Path) -> None:
    """After so many no other tenant is started; a mended revision lets the run go on."""
    project.add("0002", BROKEN.format(slugs=SLUGS, mended=str(tmp_path / "mended")), COLUMN[1], down="0001")
    stopped = await fleet.migrations.upgrade(concurrency=1, max_failures=2)
    assert stopped.run is not None
    assert (stopped.state, stopped.reason) == ("failed", "stopped after 2 failures")
    assert (len(stopped.failures), len(stopped.skipped)) == (2, 2)
    (tmp_path / "mended").touch()
    assert (await fleet.migrations.resume(stopped.run)).state == "failed"
    assert (await fleet.migrations.retry(stopped.run)).ok


async def test_who_was_skipped_has_its_wave_when_the_run_goes_on(
    fleet: Fleet, project: Project, checks: Checks, tmp_path: Path
) -> None:
    """A retry of the canary alone comes to the last wave; the others are not migrated all at once after it."""
    project.add("0002", BROKEN.format(slugs=("acme",), mended=str(tmp_path / "mended")), COLUMN[1], down="0001")
    waves = Waves((*canary().waves[:1], Wave(tenants=["globex"], functions="run_checks:check")))
    stopped = await fleet.migrations.upgrade(waves=waves, max_failures=1)
    assert stopped.run is not None
    (tmp_path / "mended").touch()
    retried = await fleet.migrations.retry(stopped.run)
    assert (retried.state, await migrated(fleet)) == ("failed", ["acme"])
    checks.answer = False
    assert (await fleet.migrations.resume(stopped.run)).state == "paused"
    assert (await migrated(fleet), [report.tenants for report in checks.reports]) == (["acme", "globex"], [("globex",)])


async def test_only_a_wave_that_has_ended_is_passed_over(fleet: Fleet, project: Project) -> None:
    """After a pause that was planned the next wave is still to come: its failures stop the run."""
    project.add("0002", BROKEN.format(slugs=("globex",), mended="/nowhere"), COLUMN[1], down="0001")
    waves = Waves((*canary(pause=True).waves[:1], Wave(tenants=["globex"])))
    planned = await fleet.migrations.upgrade(waves=waves)
    assert planned.run is not None
    paused = await fleet.migrations.resume(planned.run, skip_checks=True)
    assert (paused.state, await migrated(fleet)) == ("paused", ["acme"])
    await fleet.migrations.resume(planned.run, skip_checks=True)
    assert await migrated(fleet) == ["acme", "initech", "umbrella"]


async def test_one_machine_checks_for_all_of_them(
    fleet: Fleet, config: TenancyConfig, project: Project, checks: Checks
) -> None:
    """Another one that takes part in the run neither checks nor goes on before the check has ended."""
    project.add("0002", *COLUMN, down="0001")
    async with open_fleet(config) as other:
        first = asyncio.create_task(fleet.migrations.upgrade(waves=canary(functions="run_checks:slow")))
        await checks.entered.wait()
        (run,) = await fleet.migrations.runs()
        second = asyncio.create_task(other.migrations.join(run.id))
        await until_processes(fleet, run.id, 2)
        assert (await migrated(fleet), len(checks.reports)) == (["acme"], 1)
        checks.may_end.set()
        reports = await asyncio.gather(first, second)
    assert [report.state for report in reports] == ["done", "done"]
    assert (await migrated(fleet), len(checks.reports)) == (list(SLUGS), 1)


async def test_another_machine_does_what_a_killed_one_was_at(
    fleet: Fleet, config: TenancyConfig, project: Project, checks: Checks
) -> None:
    """The claim on the end of a wave is that of its process; when it is lost, the checks begin again."""
    project.add("0002", *COLUMN, down="0001")
    async with open_fleet(config) as other:
        first = asyncio.create_task(fleet.migrations.upgrade(waves=canary(functions="run_checks:slow")))
        await checks.entered.wait()
        (run,) = await fleet.migrations.runs()
        # as if it had been silent for long
        async with fleet.services.control.transaction() as connection:
            await connection.exec_driver_sql(
                "UPDATE tenancy.migration_run_processes SET left_at = clock_timestamp(), is_lost = true"
            )
        second = asyncio.create_task(other.migrations.join(run.id))
        await until(lambda: len(checks.reports) == 2)
        assert await migrated(fleet) == ["acme"]
        checks.may_end.set()
        report = await second
        await first
    assert (report.state, await migrated(fleet)) == ("done", list(SLUGS))
    assert len(checks.reports) == 2


async def test_a_cancelled_run_ends_its_wait(fleet: Fleet, project: Project) -> None:
    """Somebody who cancels or pauses a run need not wait for what is between its waves."""
    project.add("0002", *COLUMN, down="0001")
    running = asyncio.create_task(fleet.migrations.upgrade(waves=canary(wait=3_600)))
    await fleet_at(fleet, ["acme"])
    (run,) = await fleet.migrations.runs()
    await fleet.migrations.pause(run.id)
    paused = await running
    assert (paused.state, paused.is_planned, await migrated(fleet)) == ("paused", False, ["acme"])
    again = asyncio.create_task(fleet.migrations.resume(run.id))
    await until_processes(fleet, run.id, 1)
    await fleet.migrations.cancel(run.id)
    assert ((await again).state, await migrated(fleet)) == ("cancelled", ["acme"])


async def test_a_check_that_somebody_has_written_into_the_records_is_not_run(
    fleet: Fleet, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can write there could run programs on operators' machines; the seal of the installation's key prevents it."""
    project.add("0002", *COLUMN, down="0001")
    paused = await fleet.migrations.upgrade(waves=canary(commands="false"))
    assert (paused.state, paused.reason) == ("paused", "command 'false' exited with status 1")
    assert paused.run is not None
    async with fleet.services.control.transaction() as connection:
        await connection.exec_driver_sql(
            "UPDATE tenancy.migration_runs SET plan = jsonb_set(plan, '{waves,0,commands}', "
            f'\'["touch {tmp_path}/written", "false"]\')'
        )
    refused = await fleet.migrations.resume(paused.run)
    assert (refused.state, (tmp_path / "written").exists()) == ("paused", False)
    assert "not recorded by a process of this installation" in (refused.reason or "")

    # nor what an earlier run was started with, by somebody who copies it with its seal
    other = await fleet.migrations.upgrade(waves=canary(commands=f"touch {tmp_path}/copied"), beside=True)
    assert (other.state, (tmp_path / "copied").exists()) == ("done", True)
    (tmp_path / "copied").unlink()
    async with fleet.services.control.transaction() as connection:
        await connection.exec_driver_sql(
            "UPDATE tenancy.migration_runs r SET plan = r.plan || jsonb_build_object("
            "'waves', o.plan -> 'waves', 'seal', o.plan -> 'seal') "
            f"FROM tenancy.migration_runs o WHERE r.id = {paused.run} AND o.id = {other.run}"
        )
    refused = await fleet.migrations.resume(paused.run)
    assert (refused.state, (tmp_path / "copied").exists()) == ("paused", False)

    monkeypatch.setattr(gate, "is_sealed", lambda *_: True)
    await fleet.migrations.resume(paused.run)
    assert (tmp_path / "copied").exists()


async def test_a_check_that_becomes_pending_after_the_preflight_is_asked_all_the_same(
    fleet: Fleet, project: Project, checks: Checks
) -> None:
    """Before its revision runs: the preflight has not asked it where the tenant had that revision already."""
    project.add(
        "0002", *COLUMN, down="0001", preflight='yield Check("no empty notes", "SELECT FROM notes WHERE body = \'\'")'
    )
    (await fleet.migrations.upgrade(tenants=["globex"])).raise_for_failures()
    project.add("0003", down="0002")
    running = asyncio.create_task(fleet.migrations.upgrade(waves=canary(functions="run_checks:slow")))
    async with asyncio.timeout(60):
        await checks.entered.wait()
    # somebody restores a backup
    await fleet.execute("globex", "ALTER TABLE notes DROP title; INSERT INTO notes VALUES (1, '')")
    await fleet.execute("globex", "UPDATE alembic_version SET version_num = '0001'")
    checks.may_end.set()
    report = await running
    assert report.reasons == {"globex": "upgrade 0001 -> 0002: preflight: no empty notes: 1 row"}
    assert [await fleet.revision(slug) for slug in SLUGS] == ["0003", "0001", "0003", "0003"]
    assert "title" not in await fleet.columns("globex")


async def test_a_preview_touches_nothing(fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says who is in which wave, what would run from where, and the SQL; without a run, a template, a connection."""
    project.add("0002", *COLUMN, down="0001", message="add a title")
    await fleet.migrations.upgrade(tenants=["globex"])
    project.add("0003", 'op.create_index("notes_title", "notes", ["title"])', down="0002", message="an index")
    await fleet.registry.set_revision(fleet.tenants["umbrella"].id, "9999")
    runs = await fleet.migrations.runs()

    async def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a server was connected to")

    monkeypatch.setattr(fleet.services.servers["default"], "connect_admin", refuse)
    found = await fleet.migrations.preview("upgrade", "head", waves=canary(pause=True), sql=True)
    assert [(wave.name, wave.tenants, wave.servers, wave.gate) for wave in found.waves] == [
        ("canary", ("acme",), {"default": 1}, "none failed, pause"),
        ("rest", ("globex", "initech", "umbrella"), {"default": 3}, None),
    ]
    starts = {start.revision: start for start in found.starts}
    assert [(step.revision, step.up, step.doc) for step in starts["0001"].revisions] == [
        ("0002", True, "add a title"),
        ("0003", True, "an index"),
    ]
    assert (starts["0001"].tenants, starts["0001"].target) == (("acme", "initech"), "0003")
    assert "ADD COLUMN title TEXT" in (starts["0001"].sql or "")
    assert "CREATE INDEX" in (starts["0002"].sql or "") and "ADD COLUMN" not in (starts["0002"].sql or "")
    assert "9999" in (starts["9999"].error or "") and not found.ok
    assert await fleet.migrations.runs() == runs
    for waves, message in (
        (Waves((Wave(tenants="acmee"),)), "'acmee', which is not a tenant of this run"),
        (Waves((Wave(tiers="fre"),)), "no tier 'fre'"),
        (Waves((Wave(servers="eu"),)), "no server 'eu'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            await fleet.migrations.preview("upgrade", "head", waves=waves)
        with pytest.raises(ConfigurationError, match=message):
            await fleet.migrations.upgrade(waves=waves)
    assert await fleet.migrations.runs() == runs


async def until_processes(fleet: Fleet, run: int, count: int) -> None:
    """Wait until so many processes take part in a run."""

    async def there() -> bool:
        return (await fleet.migrations.get_run(run)).processes == count

    await until(there)


async def fleet_at(fleet: Fleet, slugs: list[str]) -> None:
    """Wait until these tenants are migrated."""

    async def there() -> bool:
        return await migrated(fleet) == slugs

    await until(there)


async def test_a_run_that_is_resumed_does_not_go_past_a_paused_one(
    fleet: Fleet, project: Project, tmp_path: Path
) -> None:
    """As little as one that is started, unless it was started beside it."""
    project.add("0002", BROKEN.format(slugs=("acme",), mended=str(tmp_path / "mended")), COLUMN[1], down="0001")
    failed = await fleet.migrations.upgrade(concurrency=1, max_failures=1)
    assert failed.run is not None
    assert (failed.state, failed.reason) == ("failed", "stopped after 1 failures")
    (tmp_path / "mended").touch()
    paused = await fleet.migrations.upgrade(waves=canary(pause=True))
    assert paused.run is not None
    assert await migrated(fleet) == ["acme"]
    with pytest.raises(RunStateError, match=f"run {paused.run} .*, before run {failed.run} goes on"):
        await fleet.migrations.resume(failed.run)
    assert await migrated(fleet) == ["acme"]
    assert (await fleet.migrations.resume(paused.run)).ok
    assert (await fleet.migrations.resume(failed.run)).skipped == ()


@pytest.mark.parametrize("name", ["server_concurrency", "max_failures"])
async def test_a_run_with_a_number_with_which_it_would_not_end_is_refused(
    fleet: Fleet, project: Project, name: str
) -> None:
    project.add("0002", *COLUMN, down="0001")
    arguments: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigurationError, match=f"{name} must be at least 1"):
        await fleet.migrations.upgrade(**arguments)
    assert await fleet.migrations.runs() == []
