"""The report of a rehearsal. All times are in seconds, all sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import RehearsalError, counted
from ..provisioning.copies.making import Content

PhaseName = Literal["upgrade", "downgrade", "upgrade again"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LockReport:
    """A lock that a statement took on a table or index which existed before, from the statement to its release.

    ``mode`` is PostgreSQL's name without "Lock", such as "AccessExclusive"; ``blocks`` is what of an application waits
    for it: "reads and writes", "writes" or "schema changes".
    """

    relation: str
    mode: str
    blocks: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteReport:
    """A table that a statement rewrote, or an index that it built again; ``size`` is what it was before."""

    relation: str
    kind: Literal["table", "index"]
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementReport:
    """One statement of a revision, with its time, the locks that it took and kept, and what it rewrote."""

    sql: str
    seconds: float
    locks: tuple[LockReport, ...] = ()
    rewrites: tuple[RewriteReport, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionReport:
    """One revision in one phase, with its own statements.

    ``seconds`` includes the revision's own Python code, the version table and the preflight, but no data migrations.
    ``preflight_seconds`` and ``data_seconds`` are the statements of its preflight and of its data migrations; None
    without them.
    """

    revision: str
    seconds: float
    statements: tuple[StatementReport, ...]
    preflight_seconds: float | None = None
    data_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseReport:
    """An upgrade or downgrade of one clone. ``error`` is why it failed; None if it did not."""

    name: PhaseName
    seconds: float
    revisions: tuple[RevisionReport, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferenceReport:
    """A way in which the clone's schema is not as it should be; ``after`` is the phase that it was found after."""

    after: PhaseName
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneReport:
    """What happened on the clone of one tenant.

    ``size`` is that of the tenant's database. ``lost_values`` are columns ("public.notes.body") with values that
    an upgrade and downgrade do not bring back. ``left_out`` is what a clone does not get. ``error`` is why the tenant
    could not be cloned, or a phase failed.
    """

    slug: str
    server: str
    size: int
    revision: str | None
    copy_seconds: float | None
    phases: tuple[PhaseReport, ...] = ()
    differences: tuple[DifferenceReport, ...] = ()
    idle_downgrades: tuple[str, ...] = ()
    lost_values: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every phase succeeded, and the schema was as it should be after each."""
        return self.error is None and not self.differences

    @property
    def upgrade(self) -> PhaseReport | None:
        """The first upgrade; None if it was not reached."""
        return next((phase for phase in self.phases if phase.name == "upgrade"), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long the upgrade of the fleet may take.

    ``low`` and ``high`` are the bounds for all ``tenants`` that are behind, ``concurrency`` at once; ``longest`` are
    those for the largest of them. ``method`` says how they were found.
    """

    tenants: int
    total_bytes: int
    concurrency: int
    low: float
    high: float
    longest_low: float
    longest_high: float
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsalReport:
    """The report of a rehearsal: each clone, an estimate for the fleet, and notes on what could not be found out."""

    target: str
    content: Content
    clones: tuple[CloneReport, ...]
    estimate: Estimate | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every clone went well."""
        return all(clone.ok for clone in self.clones)

    @property
    def failures(self) -> dict[str, str]:
        """The reason, by slug, for each clone that did not go well."""
        found = {}
        for clone in self.clones:
            if clone.error is not None:
                found[clone.slug] = clone.error
            elif clone.differences:
                first = clone.differences[0]
                more = f" and {len(clone.differences) - 1} more" if len(clone.differences) > 1 else ""
                found[clone.slug] = f"differs after {first.after}: {first.text}{more}"
        return found

    def raise_for_failures(self) -> None:
        """Raise if a clone did not go well.

        Raises:
            RehearsalError: it has the reason for each.
        """
        if not self.ok:
            raise RehearsalError(self.failures, total=len(self.clones))

    def summary(self) -> str:
        """Return one line: how many clones, how many of them failed or differ, and how long it took."""
        failed = sum(clone.error is not None for clone in self.clones)
        differ = sum(clone.error is None and bool(clone.differences) for clone in self.clones)
        good = len(self.clones) - failed - differ
        return (
            f"rehearsal of upgrade {self.target}: clones of {counted(len(self.clones))}, {good} good, {failed} failed, "
            f"{differ} differ, {self.seconds:.1f} s; no tenant was changed"
        )
