"""The report of a run that brings seeds and reference data to tenants, and what a tenant has of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from ..errors import FleetSeedError, counted
from ..migrations.selection import NO_TENANTS


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedOutcome:
    """The result for one tenant.

    Args:
        tenant_id: The tenant.
        slug: Its slug.
        server: Its server.
        seconds: How long it took.
        applied: The versions that were applied, or would be after a dry run, by name; of reference data the first
            digits of its digest.
        kept: Keys (JSON) of rows that the source of reference data no longer has, and that stay since another table
            refers to them; by name.
        skipped: Seeds that could not run, since PostgreSQL refuses the logins of a suspended or deleted tenant.
        error: Why the first one failed that did, in one line; those after it were not tried.
        sqlstate: PostgreSQL's code of that error.
    """

    tenant_id: UUID
    slug: str
    server: str
    seconds: float
    applied: Mapping[str, int | str] = field(default_factory=dict)
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    error: str | None = None
    sqlstate: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return self.error is None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedReport:
    """The results for all tenants, in order of their creation."""

    outcomes: tuple[SeedOutcome, ...]
    seconds: float
    dry_run: bool = False

    @property
    def failures(self) -> tuple[SeedOutcome, ...]:
        """The tenants that failed."""
        return tuple(outcome for outcome in self.outcomes if not outcome.ok)

    @property
    def changed(self) -> tuple[SeedOutcome, ...]:
        """The tenants that got something, or would get it."""
        return tuple(outcome for outcome in self.outcomes if outcome.applied)

    @property
    def ok(self) -> bool:
        """Whether no tenant failed."""
        return not self.failures

    def raise_for_failures(self) -> None:
        """Raise if any tenant failed.

        Raises:
            FleetSeedError: it has the reason for each of them.
        """
        if not self.ok:
            raise FleetSeedError({x.slug: x.error or "" for x in self.failures}, total=len(self.outcomes))

    def summary(self) -> str:
        """Return one line: how many tenants, how many of them got something or failed, and how long it took."""
        if not self.outcomes:
            return f"seed: nothing to do, {NO_TENANTS}"
        done = [outcome for outcome in self.outcomes if outcome.ok]
        changed = sum(bool(outcome.applied) for outcome in done)
        verb = "to be seeded" if self.dry_run else "seeded"
        counts = [f"{changed} {verb}", f"{len(done) - changed} unchanged", f"{len(self.failures)} failed"]
        return f"seed: {counted(len(self.outcomes))}, {', '.join(counts)}, {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedStatus:
    """What one tenant's database has.

    ``applied`` are the versions in it, by name; ``outstanding`` the names that it lacks, or has an earlier version of.
    Where it could not be read, both are empty, and ``error`` has the reason.
    """

    tenant_id: UUID
    slug: str
    server: str
    applied: Mapping[str, int | str] = field(default_factory=dict)
    outstanding: tuple[str, ...] = ()
    error: str | None = None


class SeedProgress(Protocol):
    """Receives the progress of a run, in the event loop that runs it: for a progress bar."""

    def total(self, count: int) -> None:
        """Receive the number of tenants."""

    def done(self, outcome: SeedOutcome) -> None:
        """Receive the result of one tenant, failed or not."""
