"""Which backups are kept."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from tenancy_orm.backups import Backup
from tenancy_orm.backups.retention import expired
from tenancy_orm.config import BackupConfig

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


def backup(age_days: float, **values: Any) -> Backup:
    fields: dict[str, Any] = dict.fromkeys(Backup.__dataclass_fields__)
    fields |= {"id": uuid4(), "state": "done", "started_at": NOW - timedelta(days=age_days), **values}
    return Backup(**fields)


def kept_ages(backups: list[Backup], **policy: int) -> list[float]:
    none: dict[str, Any] = {"keep_last": 1, "keep_daily": 0, "keep_weekly": 0, "keep_monthly": 0}
    gone: set[UUID] = {one.id for one in expired(backups, BackupConfig(**{**none, **policy}), now=NOW)}
    return [(NOW - one.started_at).total_seconds() / 86_400 for one in backups if one.id not in gone]


def test_the_newest_of_each_period_are_kept() -> None:
    daily = [backup(age) for age in range(100)]
    assert kept_ages(daily) == [0]
    assert kept_ages(daily, keep_last=3) == [0, 1, 2]
    assert kept_ages([backup(0), backup(0.1), backup(1), backup(1.1)], keep_daily=2) == [0, 1]
    assert kept_ages(daily, keep_weekly=3) == [0, 7, 14]
    assert kept_ages(daily, keep_monthly=3) == [0, 29, 60]
    assert kept_ages(daily, keep_daily=3, keep_weekly=2) == [0, 1, 2, 7]
    # the oldest first
    ages = [one.started_at for one in expired(daily, BackupConfig(), now=NOW)]
    assert ages == sorted(ages)


def test_periods_without_backups_do_not_count() -> None:
    """A tenant that is not backed up any more keeps what it has."""
    assert kept_ages([backup(300), backup(301), backup(302.1)], keep_daily=3) == [300, 301, 302.1]


def test_the_last_good_one_and_the_last_proven_one_stay() -> None:
    bad = {"verified_at": NOW, "verify_error": "x"}
    assert kept_ages([backup(0, **bad), backup(1), backup(2)]) == [0, 1]
    assert kept_ages([backup(0), backup(1, **bad), backup(2)]) == [0]
    assert kept_ages([backup(0, **bad), backup(1, **bad)]) == [0, 1]
    assert kept_ages([backup(0), backup(1), backup(2, verified_at=NOW), backup(3, verified_at=NOW)]) == [0, 2]


def test_what_somebody_keeps_stays_until_then() -> None:
    old = backup(200, kept_until=NOW + timedelta(seconds=1))
    assert kept_ages([backup(0), old]) == [0, 200]
    assert kept_ages([backup(0), replace(old, kept_until=NOW)]) == [0]
    running = [backup(0, state="running"), backup(5, state="failed"), backup(1), backup(2)]
    assert [one.state for one in expired(running, BackupConfig(keep_daily=0, keep_last=1), now=NOW)] == ["done"]
