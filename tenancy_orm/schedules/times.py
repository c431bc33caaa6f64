"""When something is due, by the clock on the wall of a time zone. State without I/O."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Any, Final
from zoneinfo import ZoneInfo

from ..errors import ConfigurationError, MissingExtraError

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SHIFT = timedelta(hours=3)  # more than any clock is moved at once, but for islands that change the date
_RANDOM = re.compile(r"(^|[\s,])r($|[\s,/(])", re.IGNORECASE)
_ANY_DAY = datetime(2026, 1, 1)  # noqa: DTZ001 - on the wall
_MOST = 10_000  # times of one look-back; a cron expression of minutes over a week


@dataclass(frozen=True, slots=True)
class Times:
    """Times of the day, on all days or some of the week; or a cron expression.

    Times are read off the wall clock. One that does not exist, since the clock is moved forward past it, comes as much
    later as the clock is moved (02:30 becomes 03:30). One that exists twice comes once, the first time.
    """

    at: tuple[time, ...] = ()
    weekdays: frozenset[int] = frozenset()
    cron: str | None = None

    @classmethod
    def parse(
        cls,
        at: str | time | Iterable[str | time] | None,
        cron: str | None,
        weekdays: Iterable[str | int] | None,
    ) -> Times:
        """Read the arguments of ``ScheduleManager.due``.

        Raises:
            ConfigurationError: one is malformed, or not exactly one of ``at`` and ``cron`` is given.
            MissingExtraError: there is a cron expression, and croniter is not installed.
        """
        if (at is None) == (cron is None):
            raise ConfigurationError("give a schedule either at or cron")
        if cron is not None:
            if weekdays is not None:
                raise ConfigurationError("write the weekdays into the cron expression")
            _check_cron(cron)
            return cls(cron=cron)
        given = [at] if isinstance(at, (str, time)) else list(at or ())
        if not given:
            raise ConfigurationError("at has no time")
        days = frozenset(_weekday(day) for day in weekdays) if weekdays is not None else frozenset(range(7))
        if not days:
            raise ConfigurationError("weekdays has no day")
        return cls(at=tuple(sorted({_time(one) for one in given})), weekdays=days)

    def candidates(self, after: datetime, until: datetime, zone: ZoneInfo, spread: timedelta) -> list[datetime]:
        """Those of ``between`` that can be the last one of a tenant, which comes less than ``spread`` later."""
        found = self.between(after, until, zone)
        return found[max(0, bisect_right(found, until - spread) - 1) :]

    def between(self, after: datetime, until: datetime, zone: ZoneInfo) -> list[datetime]:
        """The times after ``after`` and no later than ``until``, in UTC, in order.

        Raises:
            ConfigurationError: there are more than ten thousand.
        """
        local = self._cron_times if self.cron is not None else self._day_times
        start, end = (_wall(moment, zone) for moment in (after, until))
        found: set[datetime] = set()
        for naive in local(start - _SHIFT, end + _SHIFT):
            moment = naive.replace(tzinfo=zone, fold=0).astimezone(UTC)
            if after < moment <= until:
                found.add(moment)
                if len(found) > _MOST:
                    raise ConfigurationError(f"more than {_MOST} times to catch up with; make catch_up shorter")
        return sorted(found)

    def _day_times(self, start: datetime, end: datetime) -> Iterator[datetime]:
        day = start.date() - timedelta(days=1)  # the clock of a day that is left out belongs to the day before
        while day <= end.date():
            if day.weekday() in self.weekdays:
                for moment in self.at:
                    yield datetime.combine(day, moment)
            day += timedelta(days=1)

    def _cron_times(self, start: datetime, end: datetime) -> Iterator[datetime]:
        # croniter takes its time for each: it is asked for the days alone
        assert self.cron is not None  # noqa: S101 - whoever calls this has looked
        minutes, hours = _croniter().expand(self.cron)[0][:2]
        midnight = datetime.combine(start.date(), time())
        days = _croniter()(" ".join(["0", "0", *self.cron.split()[2:]]), midnight - timedelta(minutes=1))
        while (day := days.get_next(datetime)) <= end:
            for hour in range(24) if hours == ["*"] else hours:
                for minute in range(60) if minutes == ["*"] else minutes:
                    yield day + timedelta(hours=hour, minutes=minute)


def _wall(moment: datetime, zone: ZoneInfo) -> datetime:
    return moment.astimezone(zone).replace(tzinfo=None)


def _time(given: str | time) -> time:
    try:
        found = given if isinstance(given, time) else time.fromisoformat(given)
    except ValueError:
        raise ConfigurationError(f"{given!r} is not a time of day; write it as '06:00'") from None
    if found.tzinfo is not None:
        raise ConfigurationError(f"{given!r} has a time zone, and each tenant has its own")
    return found


def _weekday(given: str | int) -> int:
    if isinstance(given, int) and 0 <= given <= 6:
        return given
    if isinstance(given, str) and len(given) >= 3 and given[:3].lower() in _DAYS:
        return _DAYS.index(given[:3].lower())
    raise ConfigurationError(f"{given!r} is not a weekday; write 'mon' to 'sun', or 0 (Monday) to 6")


def _check_cron(cron: object) -> None:
    # an expression of six fields has seconds; an R is another time whenever it is read
    if not isinstance(cron, str) or len(cron.split()) != 5 or _RANDOM.search(cron) or not _croniter().is_valid(cron):
        raise ConfigurationError(f"{cron!r} is not a cron expression of five fields, such as '0 6 * * mon'")
    try:
        _croniter()(cron, _ANY_DAY).get_next()
    except ValueError:
        raise ConfigurationError(f"no day is one of the cron expression {cron!r}") from None


def _croniter() -> Any:
    try:
        from croniter import croniter
    except ImportError as exc:
        raise MissingExtraError("croniter", "cron") from exc
    return croniter


__all__ = ["Times"]
