"""Claims are renewed while the work goes on, which ends before another process may take it over."""

from __future__ import annotations

import asyncio

import pytest

from tenancy_orm.errors import ControlUnavailableError, JobLostError
from tenancy_orm.jobs import claims, keep_claims


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim of 60 ms, renewed every 10 ms."""
    monkeypatch.setattr(claims, "CLAIM_SECONDS", 0.06)
    monkeypatch.setattr(claims, "_RENEW_SECONDS", 0.01)
    monkeypatch.setattr(claims, "_ATTEMPT_SECONDS", 0.01)


async def test_renewed_claims_do_not_end_the_work() -> None:
    """It goes on for longer than one claim; a failed renewal is repeated."""
    renewals = 0
    done = asyncio.Event()

    async def renew() -> bool:
        nonlocal renewals
        renewals += 1
        if renewals == 2:
            raise ControlUnavailableError("away")
        if renewals == 10:
            done.set()
        return True

    async with keep_claims(renew):
        await done.wait()
    assert renewals == 10


@pytest.mark.parametrize("failure", ["taken", "away", "hangs"])
async def test_work_of_which_the_claim_is_lost_ends(failure: str) -> None:
    """Others have it, or the control database does not answer in time."""

    async def renew() -> bool:
        if failure == "taken":
            return False
        if failure == "away":
            raise ControlUnavailableError("away")
        await asyncio.Event().wait()
        return True

    ended = False
    with pytest.raises(JobLostError):
        async with keep_claims(renew):
            try:
                await asyncio.Event().wait()
            finally:
                ended = True
    assert ended
    task = asyncio.current_task()
    assert task is not None and not task.cancelling()


async def test_a_cancellation_and_an_error_of_the_work_stay_what_they_are() -> None:
    """Neither looks like a lost claim."""

    async def renew() -> bool:
        return True

    async def work() -> None:
        async with keep_claims(renew):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ZeroDivisionError):
        async with keep_claims(renew):
            _ = 1 / 0
