"""``BackupStatus``: how old the newest backups are: of how many tenants, and of the control database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupStatus:
    """How old the newest good backups are. Deleted tenants do not count.

    Attributes:
        tenants: How many tenants there are.
        backed_up: How many of them have a backup in which nothing wrong was found.
        verified: How many of them have one that was restored by a verification.
        overdue: How many have no good backup of the last ``overdue_after`` seconds, and are older themselves.
        overdue_slugs: Those that have waited the longest; not all where there are many.
        overdue_after: Seconds; None: none is overdue.
        oldest_seconds: The age of the oldest of all tenants' newest good backups; None where there is none.
        oldest_verified_seconds: The same of those that were verified.
        control_seconds: The age of the control database's newest good backup; None where there is none.
        control_is_overdue: Whether it has none of the last ``overdue_after`` seconds.
    """

    tenants: int
    backed_up: int
    verified: int
    overdue: int
    overdue_slugs: Sequence[str]
    overdue_after: float | None
    oldest_seconds: float | None
    oldest_verified_seconds: float | None
    control_seconds: float | None
    control_is_overdue: bool

    @property
    def errors(self) -> tuple[str, ...]:
        """What an operator has to look at, a line each."""
        found = []
        if self.overdue:
            more = (
                f" and {self.overdue - len(self.overdue_slugs)} more" if self.overdue > len(self.overdue_slugs) else ""
            )
            found.append(
                f"{self.overdue} of {self.tenants} tenants have no good backup of the last {self.overdue_after:.0f} s: "
                f"{', '.join(self.overdue_slugs)}{more}; the reasons: tenancy backup list TENANT"
            )
        if self.control_is_overdue:
            found.append(
                f"the control database has no good backup of the last {self.overdue_after:.0f} s; the reasons: tenancy "
                "backup list control"
            )
        return tuple(found)


__all__ = ["BackupStatus"]
