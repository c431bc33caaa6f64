"""The report of a fleet migration, and the protocol of a progress bar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from ..errors import FleetMigrationError, MigrationError, counted
from ..migrations.selection import NO_TENANTS


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantOutcome:
    """The result for one tenant.

    Revisions are in the form of ``plan.format_revision``. ``changed`` is whether this run applied something. After a
    failure, ``after`` is the last revision that was read, and ``error`` one line with the reason. ``extensions`` are
    those that this run installed.
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
    extensions: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the tenant is at the target."""
        return self.error is None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """The results for all tenants, in order of their creation.

    ``skipped`` has the slugs of those that were not started. ``run`` is the number of the recorded run, ``state`` how
    that ended: "done", "failed", "cancelled", "paused"; ``reason`` says why.
    ``is_planned`` is whether its waves asked for the pause.
    """

    command: str
    target: str
    outcomes: tuple[TenantOutcome, ...]
    seconds: float
    skipped: tuple[str, ...] = ()
    run: int | None = None
    state: str = "done"
    reason: str | None = None
    is_planned: bool = False

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
        """How many tenants the run was for."""
        return len(self.outcomes) + len(self.skipped)

    @property
    def ok(self) -> bool:
        """Whether every tenant is at the target, and the run has ended."""
        return not self.failures and not self.skipped and self.state != "paused"

    def raise_for_failures(self) -> None:
        """Raise if any tenant failed or was skipped.

        Raises:
            FleetMigrationError: it has the reason for each of them.
            MigrationError: all tenants are at the target, and a check after the last wave did not hold.
        """
        if self.state == "paused" and not self.reasons:
            raise MigrationError(f"run {self.run} is paused: {self.reason}")
        if not self.ok:
            raise FleetMigrationError(self.reasons, total=self.total)

    @property
    def reasons(self) -> dict[str, str]:
        """The reason, by slug, for every tenant that is not at the target."""
        reasons = {outcome.slug: outcome.error or "" for outcome in self.failures}
        return reasons | dict.fromkeys(self.skipped, f"not started: {_WHY.get(self.state, _WHY['failed'])}")

    @property
    def next_step(self) -> str | None:
        """What an operator can do with a recorded run that did not bring every tenant to the target; None otherwise."""
        if self.run is None or self.ok:
            return None
        if self.state == "paused":
            found = [f"tenancy migrate resume {self.run}"]
            if self.failures:
                found.insert(0, f"tenancy migrate retry {self.run} (its failed tenants again)")
            return (
                f"run {self.run} is paused: {self.reason}; continue with: {', or '.join(found)}; "
                f"or end it: tenancy migrate cancel {self.run}; or take it back: tenancy migrate undo {self.run}"
            )
        found = [f"tenancy migrate retry {self.run} (its failed tenants)"] if self.failures else []
        if self.skipped:
            found.append(f"tenancy migrate resume {self.run} (those that were not started)")
        reason = f": {self.reason}" if self.reason else ""
        state = "has failed" if self.state == "failed" else f"is {self.state}"
        return f"run {self.run} {state}{reason}; continue with: {', or '.join(found)}"

    def summary(self) -> str:
        """Return one line: how many tenants, how many of them migrated or failed, and how long it took."""
        if not self.total:
            return f"{self.command} {self.target}: nothing to do, {NO_TENANTS}"
        done = [outcome for outcome in self.outcomes if outcome.ok]
        migrated = sum(outcome.changed for outcome in done)
        counts = [f"{migrated} migrated", f"{len(done) - migrated} unchanged", f"{len(self.failures)} failed"]
        if self.skipped:
            counts.append(f"{len(self.skipped)} not started")
        number = "" if self.run is None else f" (run {self.run})"
        return f"{self.command} {self.target}: {counted(self.total)}, {', '.join(counts)}, {self.seconds:.1f} s{number}"


_WHY = {
    "failed": "an earlier failure stopped the run",
    "cancelled": "the run was cancelled",
    "paused": "the run is paused",
    "running": "the run was interrupted",
}


class Progress(Protocol):
    """Receives the progress of a run, in the event loop that runs it: for a progress bar."""

    def total(self, count: int) -> None:
        """Receive the number of tenants; called again if tenants were created during the run."""

    def done(self, outcome: TenantOutcome) -> None:
        """Receive the result of one tenant, failed or not."""
