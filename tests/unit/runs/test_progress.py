"""The progress of a run in words, for a log."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tenancy_orm.runs.progress import RunProgress, ServerProgress, SilentProcess, duration_text

ONE = ServerProgress(server="eu-1", total=600, done=29, failed=1, skipped=0, running=5)
OTHER = ServerProgress(server="eu-2", total=400, done=22, failed=0, skipped=0, running=3)
RUN = RunProgress(
    run=17,
    command="upgrade",
    target="head",
    state="running",
    reason=None,
    wave=2,
    waves=4,
    wave_name="5%",
    rate=9.48,
    seconds=6.0,
    servers=(ONE, OTHER),
)


def test_a_line_says_how_far_the_run_is() -> None:
    """With its wave and servers, where there are several; without a time where nothing is known of the rate."""
    assert RUN.line() == (
        "run 17, upgrade head, wave 2 of 4 (5%): 52 of 1000 done, 1 failed, 8 running, 9.5/s, 1 min 40 s left; "
        "eu-1 30/600 (1 failed), eu-2 22/400"
    )
    alone = replace(RUN, waves=1, servers=(OTHER,), rate=0.0)
    assert alone.line() == "run 17, upgrade head: 22 of 400 done, 0 failed, 3 running, 0.0/s"
    assert (alone.left, alone.remaining_seconds) == (378, None)
    ended = replace(alone, state="failed", servers=(replace(OTHER, done=399, failed=1, running=0),))
    assert ended.line() == "run 17 failed, upgrade head: 400 of 400 done, 1 failed, 0 running, 0.0/s"
    assert ended.remaining_seconds == 0
    assert replace(RUN, servers=(replace(OTHER, skipped=378),)).left == 0


def test_a_line_says_for_which_process_the_run_waits() -> None:
    """One that was killed has its tenants until its claim expires; others may not touch them before."""
    until = datetime(2026, 5, 4, 19, 47, 13, tzinfo=UTC)
    dead = SilentProcess(host="vm", pid=15374, tenants=4, claimed_until=until)
    waiting = replace(RUN, waves=1, servers=(OTHER,), silent=(dead, replace(dead, host="other", tenants=1)))
    assert waiting.line().endswith(
        "left, waits for 4 tenants claimed by vm:15374 until 19:47:13 UTC "
        "and 1 tenant claimed by other:15374 until 19:47:13 UTC"
    )
    assert replace(waiting, state="paused").wait_text is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (98, "1 min 38 s"), (3_600, "1 h 0 min"), (90_000, "25 h 0 min")],
)
def test_a_time_has_two_units(seconds: float, text: str) -> None:
    """The two largest."""
    assert duration_text(seconds) == text
