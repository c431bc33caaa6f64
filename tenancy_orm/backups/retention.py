"""Which backups of a tenant are kept: the newest ones, and the newest of each day, week and month."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from ..config import BackupConfig
from .records import Backup


def expired(backups: Iterable[Backup], policy: BackupConfig, *, now: datetime) -> list[Backup]:
    """Return the backups of one tenant that the policy does not keep, the oldest first.

    Days, weeks and months without a backup do not count, so that nothing goes while no new ones are made. A backup in
    which something was found wrong counts for nothing, and goes once there is a newer good one. The newest good one,
    and the newest of those that were restored for a proof, always stay.

    Args:
        backups: Those that are done.
        policy: ``keep_last``, ``keep_daily``, ``keep_weekly`` and ``keep_monthly`` are read from it.
        now: The time.
    """
    newest_first = sorted(
        (one for one in backups if one.state == "done"), key=lambda x: (_began(x), x.id), reverse=True
    )
    good = [one for one in newest_first if one.is_good]
    if not good:
        return []
    kept: set[object] = {one.id for one in good[: policy.keep_last]}
    kept |= {one.id for one in newest_first if one.kept_until is not None and one.kept_until > now}
    kept |= {one.id for one in _proven(good)}
    kept |= _newest_of_each(good, policy.keep_daily, lambda moment: moment.date())
    kept |= _newest_of_each(good, policy.keep_weekly, lambda moment: moment.isocalendar()[:2])
    kept |= _newest_of_each(good, policy.keep_monthly, lambda moment: (moment.year, moment.month))
    kept |= {one.id for one in newest_first if not one.is_good and _began(one) > _began(good[0])}
    return [one for one in reversed(newest_first) if one.id not in kept]


def _began(backup: Backup) -> datetime:
    return backup.started_at.astimezone(UTC)


def _proven(good: Sequence[Backup]) -> Sequence[Backup]:
    return [one for one in good if one.verified_at is not None][:1]


def _newest_of_each(good: Sequence[Backup], count: int, period: Callable[[datetime], object]) -> set[object]:
    found: dict[object, object] = {}
    for one in good:
        found.setdefault(period(_began(one)), one.id)
    return set(list(found.values())[:count])


__all__ = ["expired"]
