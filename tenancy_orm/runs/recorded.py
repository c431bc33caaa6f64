"""``RecordedRuns``: starts runs, and lets further processes take part in them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..config import TenancyConfig
from ..errors import ConfigurationError, RunMismatchError
from ..jobs import Claimant
from ..migrations.logs import logger
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..tenant import TenantRef, placement_of
from .busy import Order, busiest_first, check_order
from .checks import require_checks, seal_checks
from .records import NewRun, NewTenant, RunRecord, RunRecords, Way
from .report import FleetReport, Progress
from .run import Run
from .waves import Waves
from .work import RunWork

_CODE_VERSIONS: Final = ("GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT", "BUILD_SOURCEVERSION", "SOURCE_VERSION")
"""Variables of CI systems that hold the commit that is deployed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run proceeds, in every process that takes part.

    Raises:
        ConfigurationError: a number is below 1.
    """

    concurrency: int
    server_concurrency: int | None = None
    stop_on_failure: bool = False
    max_failures: int | None = None
    waves: Waves | None = None
    x: Sequence[str] = ()
    order: Order = "created"
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse numbers with which a run would never end."""
        for name in ("concurrency", "server_concurrency", "max_failures"):
            check_number(name, getattr(self, name))

    def as_plan(self, *, everyone: bool) -> dict[str, Any]:
        """Return what is recorded. Values of ``-x`` arguments may be secrets, and are not."""
        return {
            "all": everyone,
            "concurrency": self.concurrency,
            "server_concurrency": self.server_concurrency or self.concurrency,
            "stop_on_failure": self.stop_on_failure,
            "max_failures": self.max_failures,
            **({} if self.waves is None else self.waves.as_json()),
            "x": [argument.partition("=")[0] for argument in self.x],
            "order": self.order,
            **self.more,
        }


def check_number(name: str, number: int | None) -> None:
    """Refuse a number below 1; None is no bound.

    Raises:
        ConfigurationError: it is.
    """
    if number is not None and number < 1:
        raise ConfigurationError(f"{name} must be at least 1, not {number}")


class RecordedRuns:
    """Starts runs, and takes part in them.

    Args:
        services: The services of an open ``Tenancy``.
    """

    def __init__(self, services: FleetServices) -> None:
        self._services = services
        self.records = RunRecords(services.control)
        self._selection = Selection(services.registry)

    async def start(
        self,
        work: RunWork,
        tenants: Iterable[TenantRef] | None,
        options: RunOptions,
        *,
        command: str,
        target: str,
        join: bool = False,
        beside: bool = False,
        undoes: int | None = None,
        targets: Mapping[UUID, Way] | None = None,
        progress: Progress | None = None,
        actor: Actor = SYSTEM,
    ) -> FleetReport:
        """Record a run and work on it until it ends or pauses.

        Args:
            work: What it does.
            tenants: The tenants; all where None.
            options: How it proceeds.
            command: What it does, as it is recorded.
            target: Where it leads.
            join: Take part in a run of the same that is running, if there is one.
            beside: Go past runs that are paused.
            undoes: The run that this one undoes.
            targets: The way of each tenant, where each has its own.
            progress: Called as it proceeds.
            actor: Who starts it.

        Raises:
            RunStateError: a run that is paused has some of the tenants left.
        """
        check_order(options.order)
        chosen = await self._selection.choose(tenants)
        if options.order == "busiest":
            chosen = await busiest_first(chosen, self._services)
        waves = options.waves or Waves()
        waves.check(tiers=self._services.config.tiers, servers=tuple(self._services.servers))
        require_checks(waves)
        plan = options.as_plan(everyone=tenants is None)
        new = NewRun(
            command=command,
            target=target,
            plan=plan,
            fingerprint=await self._fingerprint(command, options.x),
            actor=actor,
            code_version=code_version(self._services.config),
            undoes=undoes,
            seal=partial(seal_checks, self._services.keyring, waves),
        )
        numbers = waves.assign(chosen)
        for number in sorted(set(range(waves.last)) - set(numbers)):
            logger.warning("wave %d (%s) has no tenants", number + 1, waves[number].name)
        rows = [
            NewTenant(
                tenant_id=tenant.id,
                server=placement_of(tenant).server,
                wave=wave,
                target=None if targets is None else targets[tenant.id].target,
                origin=None if targets is None else targets[tenant.id].origin,
            )
            for tenant, wave in zip(chosen, numbers, strict=True)
        ]
        claimant = Claimant()
        run = await self.records.create(new, rows, claimant, join=join, beside=beside)
        return await self._run(run, claimant, work, None, progress, actor)

    async def find_running(self, command: str, target: str, x: Sequence[str]) -> RunRecord | None:
        """Return the run that ``start`` would join; None if there is none."""
        return await self.records.find_running(command, target, await self._fingerprint(command, x))

    async def join(
        self,
        run: int,
        make: Callable[[RunRecord], Awaitable[RunWork]],
        *,
        concurrency: int | None = None,
        x: Sequence[str] = (),
        progress: Progress | None = None,
        actor: Actor = SYSTEM,
    ) -> FleetReport:
        """Take part in a run until it ends or pauses. One that has ended is reported.

        Raises:
            RunNotFoundError: there is none of that number.
            RunMismatchError: this process has other revisions, options or arguments.
        """
        record = await self._check(run, x)
        claimant = Claimant()
        if record.state == "running":
            await self.records.join(run, claimant)
        return await self._run(run, claimant, await make(record), concurrency, progress, actor)

    async def reopen(
        self,
        run: int,
        make: Callable[[RunRecord], Awaitable[RunWork]],
        *,
        retry: bool = False,
        skip_checks: bool = False,
        concurrency: int | None = None,
        x: Sequence[str] = (),
        progress: Progress | None = None,
        actor: Actor = SYSTEM,
    ) -> FleetReport:
        """Let a run go on, with its failed tenants where ``retry`` is set, and take part in it.

        Raises:
            RunNotFoundError, RunMismatchError: as ``join``.
            RunStateError: it has not ended, and cannot be tried again.
        """
        record = await self._check(run, x)
        work = await make(record)
        claimant = Claimant()
        await self.records.reopen(run, claimant, retry=retry, skip_checks=skip_checks, actor=actor)
        return await self._run(run, claimant, work, concurrency, progress, actor)

    async def _run(
        self,
        run: int,
        claimant: Claimant,
        work: RunWork,
        concurrency: int | None,
        progress: Progress | None,
        actor: Actor,
    ) -> FleetReport:
        part = Run(
            self.records,
            run,
            claimant,
            work,
            keyring=self._services.keyring,
            concurrency=concurrency,
            progress=progress,
            actor=actor,
            events=self._services.events,
            limit=self._services.config.migration.timeout,
        )
        return await part.execute()

    async def _check(self, run: int, x: Sequence[str]) -> RunRecord:
        """Return a run that this process may take part in."""
        record = await self.records.get(run)
        expected = list(record.plan["x"])
        if [argument.partition("=")[0] for argument in x] != expected:
            raise RunMismatchError(run, f"the -x arguments {', '.join(expected) or 'none'}: give the same")
        if record.fingerprint != await self._fingerprint(record.command, x):
            of = f" of {record.code_version}" if record.code_version else ""
            raise RunMismatchError(run, f"other revisions or options{of}: use that code, or start another run")
        return record

    async def _fingerprint(self, command: str, x: Sequence[str]) -> str:
        """Return what is the same in all processes that may take part in one run."""
        # in a thread: it may read every revision
        schema = await asyncio.to_thread(self._services.schema.fingerprint)
        parts = [command, *x, "", *self._services.config.extensions, "", schema]
        return sha256("\0".join(parts).encode()).hexdigest()


def code_version(config: TenancyConfig) -> str | None:
    """Return the version of the application: the setting, or the commit that a CI system names."""
    return config.migration.code_version or next((v for name in _CODE_VERSIONS if (v := os.environ.get(name))), None)


__all__ = ["RecordedRuns", "RunOptions"]
