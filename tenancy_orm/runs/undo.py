"""``Undo``: brings each tenant back to the revision that it had before a run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from alembic.util.exc import CommandError
from sqlalchemy import text

from ..errors import MigrationError, RunStateError, UndoRefusedError, counted
from ..jobs import CLAIM_SECONDS
from ..migrations.failures import describe
from ..migrations.plan import Plan, format_revision
from ..migrations.scripts import Environment
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..tenant import Tenant, TenantRef, placement_of
from .preview import WavePreview
from .records import RunRecord, TenantRecord, Way
from .reversal import heads_of, return_to, taken_back
from .status import TenantRevision


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoneTenant:
    """A tenant that an undo changes: the revision that it has now, and the one that it goes back to.

    ``error`` is why its database could not be read: ``revision`` is then what the control database has recorded.
    """

    slug: str
    server: str
    revision: str | None
    target: str | None
    is_new: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoPlan:
    """What the undo of a run would do.

    Attributes:
        run: The run's number.
        tenants: The tenants that go back.
        untouched: The slugs of those of the run that have the revision which they had before it.
        new: The slugs of those that were created since, with the run's revision, and that stay as they are.
        new_target: The revision that those would go back to; None where tenants of the run had different ones.
        moved: By slug, why it is not certain what to do with a tenant.
        irreversible: By revision, why it cannot be taken back.
        waves: The waves, with the tenants that go back.
    """

    run: int
    tenants: tuple[UndoneTenant, ...]
    untouched: tuple[str, ...]
    new: tuple[str, ...]
    new_target: str | None
    moved: Mapping[str, str]
    irreversible: Mapping[str, str]
    waves: tuple[WavePreview, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing has to be decided first."""
        return self.passes()

    def passes(self, *, stamp_irreversible: bool = False, leave_moved: bool = False) -> bool:
        """Whether nothing has to be decided first, but for what is decided by these arguments of ``undo``."""
        return (leave_moved or not self.moved) and (stamp_irreversible or not self.irreversible)


class _Reader(Protocol):
    async def __call__(self, tenants: Iterable[TenantRef]) -> list[TenantRevision]: ...


# which later run has changed a tenant
_LATER = text(
    "SELECT tenant_id, max(run) AS run FROM tenancy.migration_run_tenants "
    "WHERE run > :run AND (changed OR is_read) GROUP BY tenant_id"
)


class Undo:
    """Plans the undo of one run.

    Args:
        services: The services of an open ``Tenancy``.
        environment: The scripts.
        read: Reads the revisions of tenants from their databases.
        record: The run.
        rows: Its tenants.
    """

    def __init__(
        self,
        services: FleetServices,
        environment: Environment,
        read: _Reader,
        record: RunRecord,
        rows: Iterable[TenantRecord],
    ) -> None:
        if record.command == "extensions":
            raise MigrationError(f"run {record.id} installed extensions; they are not removed again")
        rows = list(rows)
        if record.state == "running" and record.processes:
            raise RunStateError(record.id, "running", "undone; cancel it first")
        # what a process finishes after a pause or a cancellation is not in the databases yet
        if record.processes and (unfinished := [row.slug for row in rows if row.state == "running"]):
            names = ", ".join(unfinished[:5]) + (", ..." if len(unfinished) > 5 else "")
            raise RunStateError(
                record.id,
                record.state,
                f"undone while tenants are being migrated ({names}); try again once tenancy migrate show lists none "
                f"as running: if their process was killed, {CLAIM_SECONDS:g} s later",
            )
        self._services = services
        self._environment = environment
        self._read = read
        self._record = record
        self._rows = {row.tenant_id: row for row in rows}
        self._ends = {row.revision_after for row in self._rows.values() if row.state == "done"}
        self._paths: dict[tuple[str | None, str | None], list[str | None]] = {}

    @property
    def stamps(self) -> bool:
        """Whether the run moved version tables alone, so that its undo does the same."""
        return self._record.command == "stamp" or bool(self._record.plan.get("stamps"))

    @property
    def holds(self) -> bool:
        """Whether the undo moves tenants back, and not forward again as that of a downgrade."""
        if self._record.command == "undo":
            return not self._record.plan["holds"]
        return self._record.command != "downgrade"

    async def plan(
        self, tenants: Iterable[TenantRef] | None, *, include_new: bool, new_target: str | None
    ) -> tuple[UndoPlan, dict[UUID, Way]]:
        """Return what is to be done, and by tenant the way back.

        Raises:
            MigrationError: a given tenant was not in the run; or new tenants are to go back, and it is not known where.
            TenantNotFoundError: a given tenant does not exist.
        """
        chosen = await Selection(self._services.registry).choose(tenants)
        touched = [tenant for tenant in chosen if (row := self._rows.get(tenant.id)) is not None and row.is_read]
        born = [tenant for tenant in chosen if self._is_new(tenant)]
        if tenants is not None:
            self._refuse_others(chosen, born)
        new_target = self._new_target(new_target)
        now = {one.tenant_id: one for one in await self._read([*touched, *born])}
        later = await self._later()
        found = _Found(self._environment, (t.slug for t in chosen if t not in touched and t not in born))
        for tenant in touched:
            row = self._rows[tenant.id]
            self._sort(found, tenant, now[tenant.id], row.revision_before, row, later)
        new = [tenant for tenant in born if heads_of(now[tenant.id].revision) != heads_of(new_target)]
        if include_new and new:
            if new_target is None:
                raise MigrationError(
                    f"tenants of run {self._record.id} had different revisions before it, so that it is not known "
                    f"where new ones go ({', '.join(tenant.slug for tenant in new[:5])}); give the revision"
                )
            for tenant in new:
                self._sort(found, tenant, now[tenant.id], new_target, None, later)
        plan = UndoPlan(
            run=self._record.id,
            tenants=tuple(found.tenants),
            untouched=tuple(tenant.slug for tenant in chosen if tenant.slug in found.untouched),
            new=() if include_new else tuple(tenant.slug for tenant in new),
            new_target=new_target,
            moved=found.moved,
            irreversible=await asyncio.to_thread(found.irreversible) if not self.stamps else {},
        )
        return plan, found.targets

    def _is_new(self, tenant: Tenant) -> bool:
        """Whether a tenant was created since the run began, whether or not the run looked at it."""
        row = self._rows.get(tenant.id)
        if row is not None and row.is_read:
            return False
        return tenant.created_at is not None and tenant.created_at >= self._record.created_at

    def _refuse_others(self, chosen: Iterable[Tenant], born: list[Tenant]) -> None:
        for tenant in chosen:
            if tenant.id not in self._rows and tenant not in born:
                raise MigrationError(f"tenant {tenant.slug!r} was not in run {self._record.id}")

    def _new_target(self, given: str | None) -> str | None:
        """Return the revision that all tenants of the run had, which is what the code before it gave to new ones."""
        if given is not None:
            return given
        before = Counter(row.revision_before for row in self._rows.values() if row.is_read)
        return (next(iter(before)) or "base") if len(before) == 1 else None

    async def _later(self) -> dict[UUID, int]:
        async with self._services.control.connect() as connection:
            rows = await connection.execute(_LATER, {"run": self._record.id})
            return {row.tenant_id: row.run for row in rows}

    def _sort(
        self,
        found: _Found,
        tenant: Tenant,
        status: TenantRevision,
        before: str | None,
        row: TenantRecord | None,
        later: Mapping[UUID, int],
    ) -> None:
        """Decide about one tenant."""
        now = status.revision
        if status.error:
            # the undo of this tenant will fail, and can be retried; so it must not be left out for what is recorded
            now = row.revision_after if row is not None and row.state == "done" else tenant.schema_revision
        elif heads_of(now) == heads_of(before):
            found.untouched.add(tenant.slug)
            return
        try:
            is_brought = row is not None and row.changed and heads_of(now) == heads_of(row.revision_after)
            if not is_brought and tenant.id in later:
                raise MigrationError(
                    f"run {later[tenant.id]} has moved it to {now or 'base'} since; undo that run first"
                )
            states = self._states(before, row)
            if heads_of(now) not in [heads_of(state) for state in states]:
                raise MigrationError(f"it is at {now or 'base'}, where this run has not brought it")
            found.add(tenant, now, before, is_new=row is None, error=status.error)
        except (MigrationError, CommandError) as exc:
            found.moved[tenant.slug] = describe(exc)

    def _states(self, before: str | None, row: TenantRecord | None) -> list[str | None]:
        """Return the revisions that a tenant of this run may be at, from the one before it on."""
        ends = {row.revision_after} if row is not None and row.state == "done" else self._ends
        found: list[str | None] = []
        # not to where this code leads: there may be revisions that the run did not have
        for plan in [self._return_to(end) for end in ends] or [self._plan(row)]:
            key = (before, plan.target)
            if key not in self._paths:
                path = plan.path_from(heads_of(before))
                self._paths[key] = [format_revision(state) for state in path.states]
            found += self._paths[key]
        return found

    def _return_to(self, revision: str | None) -> Plan:
        # what is irreversible on the way is named by the plan
        return return_to(self._environment, revision, stamp=self.stamps, stamp_irreversible=True)

    def _plan(self, row: TenantRecord | None) -> Plan:
        """Return the run's own plan, with this code: no tenant has come to its end."""
        if self._record.command == "undo":
            return self._return_to(row.target if row else None)
        given: Mapping[str, Any] = self._record.plan
        return Plan.of(self._environment, self._record.command, given["revision"], purge=bool(given.get("purge")))


class _Found:
    """What an undo does with each tenant."""

    def __init__(self, environment: Environment, untouched: Iterable[str]) -> None:
        self._environment = environment
        self.untouched = set(untouched)
        self.tenants: list[UndoneTenant] = []
        self.targets: dict[UUID, Way] = {}
        self.moved: dict[str, str] = {}

    def add(self, tenant: Tenant, now: str | None, before: str | None, *, is_new: bool, error: str | None) -> None:
        """Bring a tenant back to ``before``.

        Raises:
            MigrationError, CommandError: there is no way.
        """
        return_to(self._environment, before, stamp_irreversible=True).path_from(heads_of(now))
        target = format_revision(heads_of(before))
        self.targets[tenant.id] = Way(format_revision(heads_of(now)) or "base", target or "base")
        self.tenants.append(
            UndoneTenant(
                slug=tenant.slug,
                server=placement_of(tenant).server,
                revision=now,
                target=target,
                is_new=is_new,
                error=error,
            )
        )

    def irreversible(self) -> dict[str, str]:
        """Return by revision why it cannot be taken back."""
        found: dict[str, str] = {}
        for now, before in dict.fromkeys((one.revision, one.target) for one in self.tenants):
            found |= taken_back(self._environment.script, heads_of(now), heads_of(before))
        return found


def refuse(plan: UndoPlan, *, stamp_irreversible: bool, leave_moved: bool) -> None:
    """Refuse an undo with something that has to be decided first, or with nothing to do.

    Raises:
        UndoRefusedError: there is something; it names all of it.
        MigrationError: no tenant would go back.
    """
    if not plan.passes(stamp_irreversible=stamp_irreversible, leave_moved=leave_moved):
        irreversible = {} if stamp_irreversible else plan.irreversible
        moved = {} if leave_moved else plan.moved
        raise UndoRefusedError(plan.run, irreversible=irreversible, moved=moved)
    if not plan.tenants:
        # a run without tenants would be recorded, and a paused one cancelled for it
        raise MigrationError(nothing_to_undo(plan))


def nothing_to_undo(plan: UndoPlan) -> str:
    """Return why an undo without tenants has nothing to do."""
    why = "no tenant has another revision than before it"
    if plan.moved:
        why = (
            f"of its tenants, later runs have moved on {len(plan.moved)}, and the others are where they were before it"
        )
    new = f"; created since it: {counted(len(plan.new))}, which --include-new brings back" if plan.new else ""
    return f"run {plan.run} has nothing to undo: {why}{new}"


__all__ = ["Undo", "UndoPlan", "UndoneTenant", "nothing_to_undo", "refuse"]
