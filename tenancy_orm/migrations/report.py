"""What a fleet migration reports: to a progress bar while it runs, and at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from ..errors import FleetMigrationError


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantOutcome:
    """How it ended for one tenant.

    Revisions are as ``plan.format_revision`` writes them. ``changed`` tells whether this run applied something; where
    it failed, ``after`` is the revision last seen, and ``error`` one line that says why.
    """

    tenant_id: UUID
    slug: str
    server: str
    before: str | None
    after: str | None
    changed: bool
    seconds: float
    error: str | None = None
    sqlstate: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the tenant is where it should be."""
        return self.error is None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """How it ended for all tenants, in order of their creation.

    ``skipped`` are the slugs of those that were not begun, because an earlier failure stopped the run.
    """

    command: str
    target: str
    outcomes: tuple[TenantOutcome, ...]
    seconds: float
    skipped: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[TenantOutcome, ...]:
        """The tenants that failed."""
        return tuple(outcome for outcome in self.outcomes if not outcome.ok)

    @property
    def changed(self) -> tuple[TenantOutcome, ...]:
        """The tenants to which something was applied."""
        return tuple(outcome for outcome in self.outcomes if outcome.changed)

    @property
    def total(self) -> int:
        """How many tenants were to be migrated."""
        return len(self.outcomes) + len(self.skipped)

    @property
    def ok(self) -> bool:
        """Whether every tenant is where it should be."""
        return not self.failures and not self.skipped

    def raise_for_failures(self) -> None:
        """Raise if any tenant failed or was skipped.

        Raises:
            FleetMigrationError: with the reason for each of them.
        """
        if not self.ok:
            raise FleetMigrationError(self.reasons, total=self.total)

    @property
    def reasons(self) -> dict[str, str]:
        """Why, by slug, for every tenant that is not where it should be."""
        reasons = {outcome.slug: outcome.error or "" for outcome in self.failures}
        return reasons | dict.fromkeys(self.skipped, "not begun: an earlier failure stopped the run")

    def summary(self) -> str:
        """One line: how many tenants, how many migrated, how many failed, in how many seconds."""
        done = [outcome for outcome in self.outcomes if outcome.ok]
        migrated = sum(outcome.changed for outcome in done)
        parts = [f"{migrated} migrated", f"{len(done) - migrated} unchanged", f"{len(self.failures)} failed"]
        if self.skipped:
            parts.append(f"{len(self.skipped)} not begun")
        return f"{self.command} {self.target}: {self.total} tenants, {', '.join(parts)}, {self.seconds:.1f} s"


class Progress(Protocol):
    """Told how a run goes on, from the event loop that runs it: for a progress bar."""

    def total(self, count: int) -> None:
        """There are ``count`` tenants to do; called again when tenants are added that were created during the run."""

    def done(self, outcome: TenantOutcome) -> None:
        """One tenant is done, well or not."""
