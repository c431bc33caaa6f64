"""The rehearsal on one clone: upgrade, downgrade, upgrade again, and what is compared in between."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from alembic.runtime.migration import RevisionStep
from sqlalchemy.engine import URL

from ..cancellation import run_to_completion
from ..drift.catalogue import Catalogue, read
from ..drift.compare import compare
from ..errors import MigrationError
from ..migrations.connections import Connections
from ..migrations.database import ConnectionAdapter, DatabaseMigration, Target, close, read_state
from ..migrations.failures import describe
from ..migrations.plan import Heads, MigrationStep, Plan, format_revision
from ..migrations.scripts import Environment
from ..operations.progress import StepProgress
from ..postgres.connections import Connection
from ..provisioning.copies.making import DatabaseCopy
from ..provisioning.logins.copy_logins import UNBOUNDED
from ..tenant import Tenant
from .contents import lost, read_digests
from .recorder import Recorder, RecordingAdapter, read_relations
from .report import DifferenceReport, PhaseName, PhaseReport

_NO_DOWNGRADE = "; rehearse the upgrade alone with --no-downgrade (downgrade=False in Python)"


@dataclass(slots=True)
class Findings:
    """What is known of one clone so far; it is also valid after a failure."""

    revision: str | None = None
    phases: list[PhaseReport] = field(default_factory=list)
    differences: list[DifferenceReport] = field(default_factory=list)
    idle_downgrades: tuple[str, ...] = ()
    lost_values: tuple[str, ...] = ()


class CloneRehearsal:
    """Rehearses a migration on one copy of a tenant's database, as the login that owns what is in it.

    Args:
        copy: The copy.
        tenant: The tenant; revisions get it as ``op.get_context().opts["tenant"]``.
        environment: The scripts.
        connections: Their time limits.
        progress: Called with the phase that begins.
    """

    def __init__(
        self,
        copy: DatabaseCopy,
        tenant: Tenant,
        environment: Environment,
        connections: Connections,
        progress: StepProgress,
    ) -> None:
        self._copy = copy
        self._tenant = tenant
        self._environment = environment
        self._limits = replace(connections.limits, attempts=1)
        self._settings = {**UNBOUNDED, "lock_timeout": "0"}
        self._url: URL = connections.url(copy.server, copy.database)
        self._progress = progress
        self.findings = Findings()

    async def stamp(self, heads: Heads) -> None:
        """Write the revisions that the tenant is at into the version table, which has no rows without data."""
        if heads:
            async with self._connected() as connection:
                await connection.executemany(
                    f"INSERT INTO {self._environment.quoted_version_table} VALUES ($1)",  # noqa: S608 - quoted
                    [(head,) for head in sorted(heads)],
                )

    async def run(self, revision: str, fresh: Catalogue | None, *, downgrade: bool) -> None:
        """Rehearse the upgrade to ``revision``; ``findings`` has the results.

        Args:
            revision: The target.
            fresh: What the schema should be after each upgrade; None: it is not compared.
            downgrade: Whether to downgrade and to upgrade again.

        Raises:
            MigrationError: a phase failed, or there is nothing to do.
        """
        heads = await self.heads()
        self.findings.revision = format_revision(heads)
        up = Plan.of(self._environment, "upgrade", revision)
        steps = up.path_from(heads).steps
        if not steps:
            raise MigrationError(f"it is at {up.target} already: there is nothing to rehearse")
        before = await self.catalogue()
        with_values = downgrade and self._copy.content == "data"
        values = await self._digests() if with_values else None
        await self._phase("upgrade", up)
        self._compare("upgrade", fresh, await self.catalogue())
        if not downgrade:
            return
        await self._phase("downgrade", self._return(up, steps))
        self._find_idle_downgrades()
        self._compare("downgrade", before, await self.catalogue())
        if values is not None:
            self.findings.lost_values = lost(values, await self._digests())
        await self._phase("upgrade again", up)
        self._compare("upgrade again", fresh, await self.catalogue())

    async def build(self, revision: str) -> Catalogue:
        """Migrate a copy with nothing in it to ``revision``, and return its catalogue."""
        plan = Plan.of(self._environment, "upgrade", revision)
        migration = DatabaseMigration(plan, self._target(None), adapter=ConnectionAdapter(), limits=self._limits)
        await migration.run()
        return await self.catalogue()

    async def heads(self) -> Heads:
        """Return the revisions that the copy is at."""
        async with self._connected() as connection:
            state = await read_state(
                connection, self._environment, self._target(self._tenant), timeout=self._limits.connect
            )
        return state.heads

    async def catalogue(self) -> Catalogue:
        """Return the copy's schema. Its login stands for the owner of tenants' databases."""
        async with self._connected() as connection:
            return await read(connection, owner=self._copy.login.role)

    async def _digests(self) -> Any:
        async with self._connected() as connection:
            return await read_digests(connection)

    async def _phase(self, name: PhaseName, plan: Plan) -> None:
        self._progress(name)
        async with self._connected() as watcher:
            recorder = Recorder(await read_relations(watcher))
            migration = DatabaseMigration(
                recorder.listening(plan),
                self._target(self._tenant),
                adapter=RecordingAdapter(recorder, watcher),
                limits=self._limits,
            )
            started, error = time.perf_counter(), None
            try:
                await migration.run()
            except Exception as exc:
                error = describe(exc) + (_NO_DOWNGRADE if isinstance(exc.__cause__, NotImplementedError) else "")
                raise MigrationError(f"{name}: {error}") from exc
            finally:
                seconds = time.perf_counter() - started
                self.findings.phases.append(
                    PhaseReport(name=name, seconds=seconds, revisions=recorder.revisions(), error=error)
                )

    def _return(self, up: Plan, steps: Iterable[MigrationStep]) -> Plan:
        """The way back by the same steps. A revision as a target could not name several branches."""
        revision_map = self._environment.script.revision_map

        def back(heads: Any, context: Any) -> list[MigrationStep]:
            found: list[MigrationStep] = []
            for step in reversed(tuple(steps)):
                assert isinstance(step, RevisionStep)  # noqa: S101 - an upgrade has no others
                if not hasattr(step.revision.module, "downgrade"):
                    raise MigrationError(f"revision {step.revision.revision} has no downgrade(){_NO_DOWNGRADE}")
                found.append(RevisionStep(revision_map, step.revision, False))
            return found

        target = self.findings.revision or "base"
        return Plan.of(self._environment, "downgrade", target.split(","), function=back)

    def _find_idle_downgrades(self) -> None:
        """Note the revisions that executed something in the upgrade, and nothing in the downgrade."""
        up, down = self.findings.phases[0], self.findings.phases[1]
        changed = {one.revision for one in up.revisions if one.statements}
        self.findings.idle_downgrades = tuple(
            one.revision for one in down.revisions if not one.statements and one.revision in changed
        )

    def _compare(self, after: PhaseName, expected: Catalogue | None, found: Catalogue) -> None:
        if expected is None:
            return
        self.findings.differences += [
            DifferenceReport(after=after, text=one.text) for one in compare(expected, found) if one.kind != "extension"
        ]

    def _target(self, tenant: Tenant | None) -> Target:
        return Target(label=f"clone of {self._tenant.slug}", url=self._url, connect=self._connect, tenant=tenant)

    async def _connect(self) -> Connection:
        return await self._copy.login.connect(
            timeout=self._limits.connect, settings=self._settings, purpose="tenancy-rehearsal"
        )

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        connection = await self._connect()
        try:
            yield connection
        finally:
            await run_to_completion(close(connection))
