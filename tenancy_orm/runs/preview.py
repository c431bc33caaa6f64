"""``Preview``: what a run would do, computed without a change and without a connection to a tenant's database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alembic.runtime.migration import RevisionStep

from ..errors import MigrationError
from ..migrations.checks import script_of
from ..migrations.data_migrations import of_step
from ..migrations.plan import MigrationStep, Plan, format_revision
from ..migrations.rendering import render, sql_text
from ..tenant import Tenant, placement_of
from .reversal import heads_of
from .waves import Waves


@dataclass(frozen=True, slots=True, kw_only=True)
class WavePreview:
    """A wave of a run: its tenants' slugs, how many of them each server has, and what comes before the next wave."""

    name: str
    tenants: tuple[str, ...]
    servers: Mapping[str, int]
    gate: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionPreview:
    """A revision that would run: up or down, and what its file says of it. ``up`` is None for a stamp.

    ``data_migrations`` are the names of those that it would run; ``has_checks`` is whether its preflight is asked.
    """

    revision: str | None
    up: bool | None
    doc: str | None
    data_migrations: tuple[str, ...] = ()
    has_checks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPreview:
    """What would be done with the tenants that start from one revision.

    ``revision`` and ``target`` are in the form of ``plan.format_revision``. ``error`` is why there is no way to the
    target. ``sql`` is what would be executed, where that was asked for.
    """

    revision: str | None
    target: str | None
    tenants: tuple[str, ...]
    revisions: tuple[RevisionPreview, ...]
    error: str | None = None
    sql: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a run would do: in which order, and with which revisions.

    The revisions that tenants start from are those that the control database has recorded.
    """

    command: str
    target: str
    waves: tuple[WavePreview, ...]
    starts: tuple[StartPreview, ...]

    @property
    def total(self) -> int:
        """How many tenants it is for."""
        return sum(len(wave.tenants) for wave in self.waves)

    @property
    def ok(self) -> bool:
        """Whether there is a way to the target for each tenant."""
        return not any(start.error for start in self.starts)


def preview(plan: Plan, tenants: Sequence[Tenant], waves: Waves, *, sql: bool = False) -> Preview:
    """Compute what a run of ``plan`` would do; call it in a thread, since ``sql`` calls the revisions.

    Raises:
        ConfigurationError: a wave names a tenant that is not in the run.
    """
    starts: dict[str | None, list[str]] = {}
    for tenant in tenants:
        starts.setdefault(tenant.schema_revision, []).append(tenant.slug)
    return Preview(
        command=plan.command,
        target=plan.target,
        waves=tuple(preview_waves(tenants, waves)),
        starts=tuple(
            # a revision may look at its tenant
            preview_start(plan, start, slugs, sql=sql, tenant=tenants[0] if len(tenants) == 1 else None)
            for start, slugs in starts.items()
        ),
    )


def preview_waves(tenants: Sequence[Tenant], waves: Waves) -> list[WavePreview]:
    """Return the waves with their tenants."""
    members: list[list[Tenant]] = [[] for _ in waves.waves]
    for tenant, number in zip(tenants, waves.assign(tenants), strict=True):
        members[number].append(tenant)
    return [
        WavePreview(
            name=wave.name,
            tenants=tuple(tenant.slug for tenant in members[number]),
            servers=dict(Counter(placement_of(tenant).server for tenant in members[number])),
            gate=wave.gate() if number < waves.last or wave.has_checks else None,
        )
        for number, wave in enumerate(waves.waves)
    ]


def preview_start(
    plan: Plan, revision: str | None, slugs: Sequence[str], *, sql: bool = False, tenant: Tenant | None = None
) -> StartPreview:
    """Return what ``plan`` would do with the tenants that are at ``revision``; ``tenant`` is for SQL."""
    heads, rendered = heads_of(revision), None
    try:
        path = plan.path_from(heads)
        if sql:
            rendered = sql_text(render(plan, heads, tenant=tenant))
    except MigrationError as exc:
        return StartPreview(
            revision=revision, target=None, tenants=tuple(slugs), revisions=(), error=str(exc), sql=rendered
        )
    return StartPreview(
        revision=revision,
        target=format_revision(path.end),
        tenants=tuple(slugs),
        revisions=tuple(map(_revision, path.steps)),
        sql=rendered,
    )


def _revision(step: MigrationStep) -> RevisionPreview:
    if isinstance(step, RevisionStep):
        return RevisionPreview(
            revision=step.revision.revision,
            up=step.is_upgrade,
            doc=step.doc,
            data_migrations=tuple(one.name for one in of_step(step) if step.is_upgrade or one.reversal is not None),
            has_checks=script_of(step) is not None,
        )
    return RevisionPreview(revision=None, up=None, doc=step.short_log)


__all__ = ["Preview", "RevisionPreview", "StartPreview", "WavePreview", "preview", "preview_start", "preview_waves"]
