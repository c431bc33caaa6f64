"""The rows of jobs: claimed by one at a time, in order, as the application's own role of the control database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.events import EventBus, JobFailed, JobTakenOver
from tenancy_orm.jobs import Claimant, Job, JobResult, Jobs, manager
from tenancy_orm.worker import Worker
from tests.support.control import control_plane
from tests.support.postgres import Postgres

PASSWORD = "app-secret"


@pytest.fixture
async def jobs(postgres: Postgres, control_url: str) -> AsyncIterator[Jobs]:
    """Jobs, as a role that ``tenancy init --application-role`` would grant its rights."""
    role = postgres.new_name("app")
    async with control_plane(control_url, opened=False) as owner:
        async with postgres.connect() as admin:
            await admin.execute(f"CREATE ROLE \"{role}\" LOGIN PASSWORD '{PASSWORD}'")
        await owner.control.grant_application(role)
        control = ControlDatabase(postgres.url(owner.control.database, user=role, password=PASSWORD))
        try:
            await control.open()
            yield Jobs(control)
        finally:
            await control.close()
            async with postgres.connect(owner.control.database) as admin:
                await admin.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')


async def test_a_job_is_claimed_once_however_many_ask(jobs: Jobs) -> None:
    """Twenty ask for five jobs at once, and each is had by one; the longest due comes first."""
    names = [f"job{number}" for number in range(5)]
    await asyncio.gather(*(jobs.ensure(names) for _ in range(5)))
    found = await asyncio.gather(*(jobs.claim(names, Claimant()) for _ in range(20)))
    assert sorted(job.name for claimed in found for job in claimed) == names
    assert await jobs.claim(names, Claimant(), limit=9) == []

    await jobs.ensure(["late"], due_at=datetime.now(UTC) - timedelta(minutes=1))
    await jobs.ensure(["later"], due_at=datetime.now(UTC) + timedelta(minutes=1))
    await jobs.ensure(["now"])
    names = ["later", "now", "late", "none"]
    assert [job.name for job in await jobs.claim(names, Claimant(), limit=9)] == ["late", "now"]
    wait = await jobs.wait(["later"])
    assert wait is not None
    assert 50 < wait < 60
    assert await jobs.wait(["none"]) is None
    assert await jobs.hasten("later")
    assert not await jobs.hasten("none")
    assert [job.name for job in await jobs.claim(["later"], Claimant())] == ["later"]


async def test_who_has_lost_a_claim_writes_nothing(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim that has run out is another's; renewal, end and return of the former one change nothing."""
    monkeypatch.setattr(manager, "CLAIM_SECONDS", 0.0)
    await jobs.ensure(["job"])
    (former,) = await jobs.claim(["job"], Claimant(host="one", pid=1))
    (status,) = await jobs.list()
    assert status.state == "abandoned"
    monkeypatch.undo()
    (later,) = await jobs.claim(["job"], Claimant(host="two", pid=2))
    assert (former.taken_from, later.taken_from) == (None, "one/1")
    assert not await jobs.renew(former)
    assert not await jobs.finish(former, after=0.0)
    assert not await jobs.release(former)
    (status,) = await jobs.list()
    assert (status.state, status.host, status.pid) == ("running", "two", 2)
    assert not await jobs.forget("job")
    assert await jobs.renew(later)
    assert await jobs.finish(later, after=60.0, error="a\x00b", result={"n": 1})
    (status,) = await jobs.list()
    assert (status.state, status.failures, status.error, status.result) == ("failed", 1, "ab", {"n": 1})
    assert (status.ended_at is not None, status.late_seconds) == (True, 0.0)
    assert await jobs.forget("job")


async def test_a_worker_records_and_announces(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that a job reports count as a failure and keep its interval; an exception brings it back sooner."""
    events, seen = EventBus(), list[object]()
    events.subscribe(JobFailed, seen.append)
    events.subscribe(JobTakenOver, seen.append)

    async def partly() -> JobResult:
        return JobResult({"n": 1}, ["a server is down"])

    async def broken() -> None:
        raise ValueError("no")

    registered = [Job("partly", 3600, partly), Job("broken", 3600, broken)]
    await jobs.ensure(["broken"])
    monkeypatch.setattr(manager, "CLAIM_SECONDS", 0.0)
    await jobs.claim(["broken"], Claimant(host="one", pid=1))
    monkeypatch.undo()
    first = await Worker(jobs, registered, events).run(once=True)
    await jobs.hasten("broken")
    second = await Worker(jobs, registered, events).run(once=True)
    assert [(x.done, x.failed, x.lost) for x in (first, second)] == [(0, 2, 0), (0, 1, 0)]
    found = {job.name: job for job in await jobs.list()}
    assert (found["partly"].error, found["partly"].result) == ("a server is down", {"n": 1})
    assert (found["broken"].failures, found["broken"].error) == (2, "ValueError: no")
    now = datetime.now(UTC)
    assert found["partly"].due_at > now + timedelta(seconds=3000)
    taken, *failed = seen
    assert isinstance(taken, JobTakenOver)
    assert taken.taken_from == "one/1"
    assert sorted(event.failures for event in failed if isinstance(event, JobFailed)) == [1, 1, 2]

    worker = Worker(jobs, [Job("broken", 3600, broken)], events)
    waits = [worker._retry_in(Job("x", 60, broken), failures) for failures in (1, 2, 3, 50)]
    bounds = [(9, 11), (18, 22), (36, 44), (270, 330)]
    assert all(low <= wait <= high for wait, (low, high) in zip(waits, bounds, strict=True))


async def test_a_result_that_no_row_can_hold_is_the_jobs_failure(jobs: Jobs) -> None:
    """It is recorded, and the job keeps its pace, rather than look done and begin again when its claim runs out."""
    wrong = {"count": 3, "time": JobResult({"at": datetime.now(UTC)}), "null": JobResult({"a": "\x00"})}

    def job(name: str) -> Job:
        async def returns() -> JobResult:
            return wrong[name]  # type: ignore[return-value]

        return Job(name, 3600, returns)

    report = await Worker(jobs, [job(name) for name in wrong], EventBus()).run(once=True)
    assert (report.done, report.failed) == (0, 3)
    found = {one.name: (one.state, one.error or "") for one in await jobs.list()}
    assert {state for state, _ in found.values()} == {"failed"}
    assert "the job 'count' returned int; return a JobResult, or None" in found["count"][1]
    assert "the result of the job 'time' is not JSON" in found["time"][1]
    assert "has a null character" in found["null"][1]


def test_what_no_job_can_be_is_refused() -> None:
    async def nothing() -> None: ...

    for name, every in (("", 1.0), ("x" * 201, 1.0), ("a\nb", 1.0), ("x", 0.0), ("x", float("inf"))):
        with pytest.raises(ConfigurationError):
            Job(name, every, nothing)
    with pytest.raises(ConfigurationError, match="two jobs have one name"):
        Worker(Jobs(None), [Job("x", 1, nothing), Job("x", 2, nothing)], EventBus())  # type: ignore[arg-type]
