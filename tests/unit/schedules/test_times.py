"""When something is due by a tenant's clock."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from croniter import croniter

from tenancy_orm.errors import ConfigurationError
from tenancy_orm.schedules.times import Times

NEW_YORK = ZoneInfo("America/New_York")  # 2026: forward on 8 March, back on 1 November, both at 02:00
DAY = timedelta(days=1)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def between(start: str, end: str, zone: ZoneInfo = NEW_YORK, **options: Any) -> list[str]:
    times = Times.parse(options.get("at"), options.get("cron"), options.get("weekdays"))
    return [f"{moment:%m-%d %H:%M}" for moment in times.between(at(start), at(end), zone)]


@pytest.mark.parametrize("how", [{"at": "02:30"}, {"cron": "30 2 * * *"}])
def test_a_time_that_does_not_exist_and_one_that_exists_twice(how: dict[str, Any]) -> None:
    """Each comes once: an hour later, and the first time."""
    assert between("2026-03-07", "2026-03-10", **how) == ["03-07 07:30", "03-08 07:30", "03-09 06:30"]
    assert at("2026-03-08 07:30").astimezone(NEW_YORK).time() == time(3, 30)
    assert between("2026-11-01", "2026-11-03", at="01:30") == ["11-01 05:30", "11-02 06:30"]
    assert between("2026-11-01", "2026-11-03", cron="30 1 * * *") == ["11-01 05:30", "11-02 06:30"]


def test_times_days_and_bounds() -> None:
    """The first bound is left out and the second is not; the day is the tenant's own."""
    assert between("2026-01-05 11:00", "2026-01-06 11:00", at="06:00") == ["01-06 11:00"]
    assert between("2026-01-05", "2026-01-06", at=["18:00", time(6)]) == ["01-05 11:00", "01-05 23:00"]
    tokyo = ZoneInfo("Asia/Tokyo")
    # Monday morning there is Sunday evening in UTC
    assert between("2026-01-01", "2026-01-08", tokyo, at="06:00", weekdays=["mon"]) == ["01-04 21:00"]
    assert between("2026-01-01", "2026-01-08", tokyo, cron="0 6 * * mon") == ["01-04 21:00"]
    assert between("2026-01-01", "2026-01-08", at="06:00", weekdays=[0, "Sunday"]) == ["01-04 11:00", "01-05 11:00"]
    assert between("2026-01-01", "2026-01-01 00:05", cron="*/2 * * * *") == ["01-01 00:02", "01-01 00:04"]
    # a day that this zone never had
    assert between("2011-12-29", "2012-01-01", ZoneInfo("Pacific/Apia"), at="06:00") == [
        "12-29 16:00",
        "12-30 16:00",
        "12-31 16:00",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"at": "06:00", "cron": "0 6 * * *"},
        {"at": "6 o'clock"},
        {"at": []},
        {"at": "06:00", "weekdays": []},
        {"at": "06:00", "weekdays": ["someday"]},
        {"at": "06:00", "weekdays": [7]},
        {"at": time(6, tzinfo=timezone(timedelta(hours=1)))},
        {"at": "06:00+01:00"},
        {"cron": "0 6 * *"},
        {"cron": "0 0 6 * * *"},
        {"cron": "0 25 * * *"},
        {"cron": "0 6 * * *", "weekdays": ["mon"]},
        {"cron": "0 0 30 2 *"},
        {"cron": "R 6 * * *"},
        {"cron": "0,r(1-5) 6 * * *"},
    ],
)
def test_what_is_malformed_is_refused(wrong: dict[str, Any]) -> None:
    """Before anything is asked of the database."""
    with pytest.raises(ConfigurationError):
        Times.parse(wrong.get("at"), wrong.get("cron"), wrong.get("weekdays"))


def test_too_many_times_are_refused() -> None:
    """Rather than computed for minutes."""
    with pytest.raises(ConfigurationError):
        between("2026-01-01", "2026-01-31", cron="* * * * *")


@pytest.mark.parametrize(
    "cron",
    ["* * * * *", "*/7 2-5,22 * * *", "0 6 * * mon", "5 6 1,15 * fri", "0 0 l * *", "30 23 * * mon#2", "1 1 * mar thu"],
)
def test_cron_times_are_croniter_s(cron: str) -> None:
    """Although it is asked for the days alone."""
    start, end = at("2026-02-25 13:30"), at("2026-03-03 13:30") if cron[0] == "*" else at("2026-05-03 13:30")
    expected = croniter(cron, start.replace(tzinfo=None))
    found = Times.parse(None, cron, None).between(start, end, ZoneInfo("UTC"))
    assert found
    assert [moment.replace(tzinfo=None) for moment in found] == [expected.get_next(datetime) for _ in found]
    assert expected.get_next(datetime) > end.replace(tzinfo=None)


def test_only_what_can_be_the_last_time_is_asked_for() -> None:
    """A cron expression of minutes gives hundreds of times, and the last before each tenant's delay counts."""
    times = Times.parse(None, "*/5 * * * *", None)
    whole = at("2026-01-01"), at("2026-01-01 06:02"), NEW_YORK
    every = times.between(*whole)
    for spread, count in ((0, 1), (1, 1), (2, 1), (3, 2), (60, 13), (10_000, 72)):
        assert times.candidates(*whole, timedelta(minutes=spread)) == every[-count:]
    assert times.candidates(at("2026-01-01"), at("2026-01-01 00:01"), NEW_YORK, DAY) == []
