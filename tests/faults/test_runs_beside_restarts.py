"""A server restarts, fails over or crashes while a run migrates its tenants: they wait, and nothing is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import text

from tenancy_orm import TenancyConfig
from tenancy_orm.migrations.connections import Connections, Health
from tenancy_orm.protocols import GrantTarget
from tenancy_orm.runs.report import FleetReport, TenantOutcome
from tests.support import restarts
from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project
from tests.support.replication import TestServer, primary_server
from tests.support.waiting import until

SECONDS = 120.0
NEIGHBOURS = tuple(f"neighbour-{number}" for number in range(8))
OTHERS = ("eve", "frank", "mallory")
INSERT = "INSERT INTO notes (body) VALUES ('0002')"
# a second application of it would fail, and leave another row
RATING = f"""
op.add_column("notes", sa.Column("rating", sa.Integer))
op.execute("{INSERT}")
"""
HELD = f"""
from tests.support import restarts
op.add_column("notes", sa.Column("rating", sa.Integer))
restarts.reached()
op.execute("{INSERT}")
"""
INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS notes_body ON notes (body)"
FUNCTION = "SELECT setseed(0.5)"  # a function may do anything
BLOCK = """
from tests.support import restarts
{before}
with op.get_context().autocommit_block():
    restarts.reached()
    op.execute("{statement}")
"""
COMMIT = f"""
from tests.support import restarts
op.execute("{INSERT}")
op.execute("COMMIT")
restarts.reached()
op.execute("{INDEX}")
"""


@pytest.fixture(scope="module")
def other() -> Iterator[TestServer]:
    """The server that goes down."""
    with primary_server() as server:
        yield server


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = Project.create(tmp_path / "app")
    made.add("0001", NOTES, 'op.drop_table("notes")')
    yield made
    restarts.forget()


@pytest.fixture
async def config(
    postgres: Postgres, control_url: str, name_prefix: str, project: Project, other: TestServer
) -> AsyncIterator[TenancyConfig]:
    made = fleet_config(postgres, control_url, name_prefix, project)
    yield made.replace(
        servers={"default": postgres.admin_url, "other": other.url()},
        default_server="default",
        pool={"connect_timeout": 5.0},
        migration={"notice": 0.0},
    )
    if not other.is_running():
        other.start_again()
    await other.as_postgres(postgres).drop_all(name_prefix)


class Watch:
    """Counts outcomes, halts the other server after its first one, and starts it once the neighbours are done."""

    def __init__(self, other: TestServer, *, starts: bool = True) -> None:
        self._other, self._starts = other, starts
        self.outcomes: list[TenantOutcome] = []
        self.halted = False

    def total(self, count: int) -> None:
        """As ``Progress``."""

    def done(self, outcome: TenantOutcome) -> None:
        """As ``Progress``."""
        self.outcomes.append(outcome)
        if outcome.server == "other" and not self.halted:
            self.halted = True
            self._other.halt()
        left = len(NEIGHBOURS) - sum(one.server == "default" for one in self.outcomes)
        if self.halted and self._starts and not left and not self._other.is_running():
            self._other.start_again()


async def make(fleet: Fleet) -> None:
    await fleet.create(*NEIGHBOURS)
    await fleet.create(*OTHERS, server="other")


async def upgrade(fleet: Fleet, watch: Watch | None = None) -> FleetReport:
    async with asyncio.timeout(SECONDS):
        return await fleet.migrations.upgrade(concurrency=2, progress=watch)


async def are_applied_once(fleet: Fleet, *slugs: str) -> None:
    for slug in slugs:
        assert await fleet.fetch(slug, "SELECT body FROM notes") == [("0002",)], slug
        assert await fleet.recorded(slug) == "0002"


def fail_over(monkeypatch: pytest.MonkeyPatch, other: TestServer) -> None:
    """Start the server again once a run has found that it does not answer."""
    reach = Connections.reach

    async def started(self: Connections, server: str, health: Health) -> datetime | None:
        answers = await reach(self, server, health)
        if answers is None and not other.is_running():
            await asyncio.to_thread(other.start_again)
        return answers

    monkeypatch.setattr(Connections, "reach", started)


class Reached:
    """Counts how often a revision is reached, and does something at one of these times."""

    def __init__(self, action: Callable[[], object], *, at: int = 1) -> None:
        self._action, self._at = action, at
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self._at:
            self._action()


@asynccontextmanager
async def to_upgrade(
    config: TenancyConfig, project: Project, body: str, reached: Callable[[], None]
) -> AsyncIterator[Fleet]:
    """All tenants, a revision that they lack, and what eve's calls."""
    async with open_fleet(config) as fleet:
        await make(fleet)
        project.add("0002", body, down="0001")
        restarts.call_back("eve", reached)
        yield fleet


async def start_again(fleet: Fleet, other: TestServer) -> None:
    """Start the server, and wait until it is asked again."""
    other.start_again()
    breaker = fleet.services.servers["other"].breaker
    await until(lambda: not breaker.is_open, seconds=SECONDS)


# --- between tenants ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["upgrade", "undo", "extensions"])
@pytest.mark.parametrize("wait", [0.0, 60.0])
async def test_the_tenants_of_a_server_that_restarts_wait_for_it(
    config: TenancyConfig, project: Project, other: TestServer, command: str, wait: float
) -> None:
    """They failed at once; the other server's tenants go on beside that, and do not wait for it."""
    changed = config.replace(migration={"server_wait": wait})
    async with open_fleet(changed.replace(extensions=["vector"]) if command == "extensions" else changed) as fleet:
        await make(fleet)
        if command == "extensions":
            for slug in (*NEIGHBOURS, *OTHERS):
                await fleet.execute(slug, "DROP EXTENSION vector")
        else:
            project.add("0002", RATING, 'op.drop_column("notes", "rating")', down="0001")
        watch = Watch(other, starts=wait > 0)
        async with asyncio.timeout(SECONDS):
            if command == "upgrade":
                report = await upgrade(fleet, watch)
            elif command == "undo":
                assert (await fleet.migrations.upgrade()).ok
                report = await fleet.migrations.undo(1, concurrency=2, progress=watch)
            else:
                report = await fleet.migrations.install_extensions(concurrency=2, progress=watch)
        assert watch.halted
        failed = {outcome.slug for outcome in report.failures}
        assert len(failed) == (0 if wait else 2) and failed <= set(OTHERS)
        assert {outcome.slug for outcome in watch.outcomes} == {*NEIGHBOURS, *OTHERS}
        if not wait:
            return
        if command == "upgrade":
            await are_applied_once(fleet, *NEIGHBOURS, *OTHERS)
        elif command == "undo":
            assert {await fleet.revision(slug) for slug in (*NEIGHBOURS, *OTHERS)} == {"0001"}
        assert report.run is not None
        # those that were begun when it went down
        assert sum(one.losses for one in await fleet.migrations.run_tenants(report.run)) <= 2


async def test_a_server_that_stays_away_is_waited_for_so_long_and_no_longer(
    config: TenancyConfig, project: Project, other: TestServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tenants fail then, the others are done, and those are tried again once it is back."""
    async with open_fleet(config.replace(migration={"server_wait": 0.5})) as fleet:
        await make(fleet)
        project.add("0002", RATING, down="0001")
        watch = Watch(other, starts=False)
        report = await upgrade(fleet, watch)
        assert len(report.failures) == 2 and {one.server for one in report.failures} == {"other"}
        assert "server other does not answer any more; its tenants wait for it" in caplog.text
        assert "server other has not come back in time; its tenants fail" in caplog.text
        await start_again(fleet, other)
        assert report.run is not None
        assert (await fleet.migrations.retry(report.run)).ok
        await are_applied_once(fleet, *NEIGHBOURS, *OTHERS)


async def test_a_server_that_did_not_answer_from_the_beginning_is_not_waited_for(
    config: TenancyConfig, project: Project, other: TestServer
) -> None:
    """Its tenants fail after one time-out: this is no restart."""
    async with open_fleet(config) as fleet:
        await make(fleet)
        project.add("0002", RATING, down="0001")
        other.halt()
        report = await upgrade(fleet, Watch(other, starts=False))
        assert {outcome.slug for outcome in report.failures} == set(OTHERS)


async def test_a_machine_that_joins_then_leaves_the_tenants_to_the_one_that_waits(
    config: TenancyConfig, project: Project, other: TestServer
) -> None:
    """It has never reached the server, and would let them fail."""
    unreached = "SELECT count(*) FROM tenancy.migration_run_processes WHERE run = 1 AND slots->>'other' = '-1'"
    async with open_fleet(config) as fleet, open_fleet(config) as second:
        await make(fleet)
        project.add("0002", RATING, down="0001")
        watch = Watch(other, starts=False)
        running = asyncio.create_task(upgrade(fleet, watch))
        await until(lambda: watch.halted, seconds=SECONDS)
        joined = asyncio.create_task(second.migrations.join(1))

        async def has_taken_a_turn() -> bool:
            async with fleet.services.control.connect() as connection:
                return bool(await connection.scalar(text(unreached)))

        await until(has_taken_a_turn, seconds=SECONDS)
        await asyncio.to_thread(other.start_again)
        async with asyncio.timeout(SECONDS):
            assert (await running).ok and (await joined).ok
        await are_applied_once(fleet, *NEIGHBOURS, *OTHERS)


# --- in the middle of a revision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["halt", "kill"])
async def test_a_tenant_whose_session_is_lost_with_the_server_is_migrated_again(
    config: TenancyConfig,
    project: Project,
    other: TestServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """By a shut-down and by a crash; what it had changed was rolled back."""
    reached = Reached(getattr(other, how))
    fail_over(monkeypatch, other)
    async with to_upgrade(config, project, HELD, reached) as fleet:
        report = await upgrade(fleet)
        assert report.ok, report.failures
        await are_applied_once(fleet, *NEIGHBOURS, *OTHERS)
        assert reached.count == 2
        records = {one.slug: one for one in await fleet.migrations.run_tenants(1)}
        assert (records["eve"].losses, records["eve"].error) == (1, None)
        assert "tenant eve waits for server other, and is tried again: upgrade 0001 -> 0002" in caplog.text


async def test_a_server_that_is_back_before_anybody_asks_was_restarted_nevertheless(
    config: TenancyConfig, project: Project, other: TestServer
) -> None:
    """By the time of its start: the tenants would fail as if somebody had ended their sessions."""

    def restart() -> None:
        other.halt()
        other.start_again()

    reached = Reached(restart)
    async with to_upgrade(config, project, HELD, reached) as fleet:
        report = await upgrade(fleet)
        assert report.ok, report.failures
        await are_applied_once(fleet, *NEIGHBOURS, *OTHERS)
        assert reached.count == 2


async def test_a_session_that_somebody_ends_is_not_begun_again(
    config: TenancyConfig, project: Project, other: TestServer
) -> None:
    """The server is there: who ends the session alone means to stop the migration."""

    def terminate() -> None:
        other.query("SELECT pg_terminate_backend(%s, 10000)", (restarts.session(),))

    reached = Reached(terminate)
    async with to_upgrade(config, project, HELD, reached) as fleet:
        report = await upgrade(fleet)
        assert [outcome.slug for outcome in report.failures] == ["eve"]
        assert "terminating connection due to administrator command" in str(report.failures[0].error)
        assert reached.count == 1


async def test_a_revision_that_crashes_its_server_is_begun_three_times_and_no_more(
    config: TenancyConfig, project: Project, other: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time ends the sessions of all tenants of that server; the others are migrated nevertheless."""
    beside: list[int] = []
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tenancy-migration' AND datname LIKE %s"

    def crash() -> None:
        beside.append(other.query(sessions, ("%\\_t\\_%",)) - 1)
        other.kill()

    fail_over(monkeypatch, other)
    async with to_upgrade(config, project, HELD, crash) as fleet:
        report = await upgrade(fleet)
        (failure,) = report.failures
        assert failure.slug == "eve" and "its process or its server was lost each time" in str(failure.error)
        # nobody runs beside it again
        assert len(beside) == 3 and beside[1:] == [0, 0], beside
        await are_applied_once(fleet, *NEIGHBOURS, "frank", "mallory")


@pytest.mark.parametrize(
    ("body", "again"),
    [
        (BLOCK.format(before="", statement=INDEX), True),
        (BLOCK.format(before="", statement=INSERT), False),
        (BLOCK.format(before="", statement=FUNCTION), False),
        (BLOCK.format(before=f"op.execute('{FUNCTION}')", statement=INDEX), False),
        (COMMIT, False),
    ],
    ids=["index", "rows", "function", "function before", "COMMIT"],
)
async def test_what_may_have_been_committed_is_not_done_again(
    config: TenancyConfig,
    project: Project,
    other: TestServer,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    again: bool,
) -> None:
    """Nobody knows whether a change of rows outside a transaction was made; an index may be built again."""
    reached = Reached(other.halt)
    fail_over(monkeypatch, other)
    async with to_upgrade(config, project, body, reached) as fleet:
        report = await upgrade(fleet)
        assert reached.count == (2 if again else 1)
        if again:
            assert report.ok, report.failures
        else:
            (failure,) = report.failures
            assert failure.slug == "eve" and "find out what before you run it again" in str(failure.error)
            assert len(await fleet.fetch("eve", "SELECT FROM notes")) <= 1


@pytest.mark.parametrize("each", [False, True])
async def test_what_an_earlier_revision_has_committed_is_not_done_again(
    config: TenancyConfig, project: Project, other: TestServer, monkeypatch: pytest.MonkeyPatch, each: bool
) -> None:
    """Where all revisions share a transaction, it is not recorded before that is committed."""
    reached = Reached(other.halt)
    if each:
        project.configure("target_metadata=target_metadata, transaction_per_migration=True")
    fail_over(monkeypatch, other)
    block = f'with op.get_context().autocommit_block():\n    op.execute("{INSERT}")'
    async with to_upgrade(config, project, block, reached) as fleet:
        project.add("0003", HELD.replace(INSERT, "SELECT 1"), down="0002")
        report = await upgrade(fleet)
        assert report.ok is each, report.failures
        for slug in (*NEIGHBOURS, *OTHERS):
            assert await fleet.fetch(slug, "SELECT body FROM notes") == [("0002",)], slug
        assert reached.count == (2 if each else 1)
        assert await fleet.revision("eve") == ("0003" if each else "0001")


DATA = """

from tenancy_orm.migrations import data_migration
from tests.support import restarts

@data_migration(table="notes")
def count(batch):
    restarts.reached_by(batch.tenant)
    return f"UPDATE notes SET body = body || '+' WHERE {batch.rows}"
"""


async def test_a_data_migration_goes_on_at_its_last_batch(
    config: TenancyConfig, project: Project, other: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batches and checkpoints are transactions of their own: each row is changed once."""
    reached = Reached(other.halt, at=2)
    fail_over(monkeypatch, other)
    async with open_fleet(config) as fleet:
        await fleet.create("eve", server="other")
        await fleet.execute("eve", "INSERT INTO notes (body) SELECT 'x' FROM generate_series(1, 3000)")
        path = project.add("0002", "pass", down="0001")
        path.write_text(path.read_text() + DATA)
        restarts.call_back("eve", reached)
        report = await upgrade(fleet)
        assert report.ok, report.failures
        assert await fleet.fetch("eve", "SELECT DISTINCT body FROM notes") == [("x+",)]
        assert reached.count > 2


async def test_a_grant_hook_whose_server_is_lost_runs_again(
    config: TenancyConfig, project: Project, other: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry has the revision only once the rights are set."""
    reached = Reached(other.halt, at=2)

    def hook(target: GrantTarget) -> list[str]:
        reached()
        return [f"GRANT SELECT ON public.notes TO {target.role}"]

    fail_over(monkeypatch, other)
    async with open_fleet(config.replace(provisioning={"grants": hook})) as fleet:
        await fleet.create("eve", server="other")
        project.add("0002", RATING, down="0001")
        report = await upgrade(fleet)
        assert report.ok, report.failures
        await are_applied_once(fleet, "eve")
        assert reached.count == 3


async def test_ctrl_c_ends_a_run_that_waits_for_a_server(
    config: TenancyConfig, project: Project, other: TestServer
) -> None:
    """Its tenants wait, and whoever resumes the run finds them."""
    async with open_fleet(config) as fleet:
        await make(fleet)
        project.add("0002", RATING, down="0001")
        watch = Watch(other, starts=False)
        running = asyncio.create_task(upgrade(fleet, watch))
        await until(lambda: watch.halted and len(watch.outcomes) == len(NEIGHBOURS) + 1, seconds=SECONDS)
        running.cancel()
        async with asyncio.timeout(SECONDS):
            with pytest.raises(asyncio.CancelledError):
                await running
        states = {one.slug: one.state for one in await fleet.migrations.run_tenants(1)}
        assert sorted(states.values()) == ["done"] * (len(NEIGHBOURS) + 1) + ["waiting"] * 2
        await start_again(fleet, other)
        async with asyncio.timeout(SECONDS):
            assert (await fleet.migrations.resume(1)).ok
        await are_applied_once(fleet, *NEIGHBOURS, *OTHERS)
