"""The search for drift: reads a fingerprint of every tenant's schema, and compares those that differ in detail.

Only fingerprints are kept. Of tenants with the same fingerprint one is read a second time, in detail.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..errors import MigrationError, UnknownTierError
from ..migrations.concurrency import interleave, map_concurrently
from ..migrations.connections import Connections, Health
from ..migrations.database import close, lock, read_state
from ..migrations.failures import describe
from ..migrations.plan import Heads, format_revision
from ..migrations.scripts import Environment
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..tenant import Tenant, TenantRef, placement_of
from . import catalogue
from .catalogue import Catalogue, Ignored
from .compare import Difference, compare
from .reference import References, ignored_at
from .report import DriftGroup, DriftProgress, DriftReport

TENANT_SECONDS = 60.0
"""How long reading one tenant's catalogue may take, connecting included."""

_CHANGING = "its schema changes while it is read, or a run migrates it; try again"
_LOCK_SECONDS = 2.0  # for which a run that migrates a tenant is waited for
_ROUNDS = 3  # how often a tenant is read while its schema changes


@dataclass(frozen=True, slots=True)
class _Place:
    """What decides which schema a tenant should have: templates differ between servers, as their extensions may."""

    server: str
    heads: Heads


@dataclass(frozen=True, slots=True)
class _Drift:
    """A tenant with another schema than its revision's."""

    tenant: Tenant
    place: _Place
    fingerprint: str
    expected: Catalogue


class DriftDetector:
    """One search for drift.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
        environment: The migrations; None without any.
        concurrency: How many tenants are read at once.
        progress: Called as the search proceeds.
    """

    def __init__(
        self,
        services: FleetServices,
        connections: Connections,
        environment: Environment | None,
        *,
        concurrency: int,
        progress: DriftProgress | None = None,
    ) -> None:
        self._services = services
        self._connections = connections
        self._environment = environment
        self._concurrency = concurrency
        self._progress = progress
        self._selection = Selection(services.registry)
        self._health = Health()
        self._ignored = Ignored(services.config.migration.drift_ignore)
        self._references = References(services, connections, environment, self._ignored)
        self._expected: dict[_Place, Catalogue | str] = {}  # or why there is none
        self._catalogues: dict[str, Catalogue] = {}  # by fingerprint: those of most servers are equal
        self._errors: dict[str, str] = {}

    async def run(
        self,
        tenants: Iterable[TenantRef] | None = None,
        *,
        tiers: Collection[str] = (),
        servers: Collection[str] = (),
    ) -> DriftReport:
        """Search tenants, or all, that are of one of these tiers and on one of these servers, and return the report.

        Raises:
            UnknownTierError, UnknownServerError: there is no such tier or server.
            TenancyError: as ``Selection.choose``.
        """
        started = time.monotonic()
        self._check(tiers, servers)
        chosen = [
            tenant
            for tenant in await self._selection.choose(tenants)
            if (not tiers or tenant.tier in tiers) and (not servers or placement_of(tenant).server in servers)
        ]
        order = {tenant.id: number for number, tenant in enumerate(chosen)}
        if self._progress is not None:
            self._progress.total(len(chosen))
        pending, groups, matching = chosen, list[DriftGroup](), 0
        for last in (number == _ROUNDS - 1 for number in range(_ROUNDS)):
            found = await self._classify(pending)
            matching += found.count(None)
            drifts = sorted((one for one in found if one is not None), key=lambda one: order[one.tenant.id])
            pending = []
            for members in _grouped(drifts):
                differences = await self._differences(members[0])
                if differences is None:
                    # a migration runs, for example
                    pending += [member.tenant for member in members]
                else:
                    groups.append(_group(members, differences))
            if not pending or last:
                break
        self._errors.update((tenant.slug, _CHANGING) for tenant in pending)
        return DriftReport(
            groups=tuple(sorted(groups, key=lambda group: -len(group.tenants))),
            matching=matching,
            errors=self._errors,
            seconds=time.monotonic() - started,
        )

    def _check(self, tiers: Collection[str], servers: Collection[str]) -> None:
        configured = self._services.config.tiers
        if unknown := next((tier for tier in tiers if tier not in configured), None):
            raise UnknownTierError(unknown, tuple(configured))
        for server in servers:
            self._services.servers[server]  # raises

    async def _classify(self, tenants: list[Tenant]) -> list[_Drift | None]:
        """Read tenants; None is one that has the schema of its revision. Those that cannot be compared are no part."""
        read = await map_concurrently(self._fingerprint, interleave(tenants), self._concurrency)
        known = [one for one in read if one is not None]
        places = list(dict.fromkeys(place for _, place, _ in known if place not in self._expected))
        slots = asyncio.Semaphore(self._concurrency)

        async def learn(place: _Place) -> None:
            async with slots:
                self._expected[place] = await self._learn(place)

        async with asyncio.TaskGroup() as group:
            for place in places:
                group.create_task(learn(place))
        found: list[_Drift | None] = []
        for tenant, place, fingerprint in known:
            expected = self._expected[place]
            if isinstance(expected, str):
                self._errors[tenant.slug] = expected
            elif fingerprint == expected.fingerprint:
                found.append(None)
            else:
                found.append(_Drift(tenant, place, fingerprint, expected))
        return found

    async def _learn(self, place: _Place) -> Catalogue | str:
        """Read what a tenant's schema should be; or return why that cannot be."""
        try:
            found = await self._references.read(place.server, place.heads)
        except Exception as exc:  # noqa: BLE001 - a revision may raise anything; it is reported for these tenants
            return f"nothing to compare it with at {format_revision(place.heads) or 'base'}: {describe(exc)}"
        return self._catalogues.setdefault(found.fingerprint, found)

    async def _fingerprint(self, tenant: Tenant) -> tuple[Tenant, _Place, str] | None:
        try:
            place, found = await self._read(tenant)
        except Exception as exc:  # noqa: BLE001 - any error is reported for this tenant
            if not await self._selection.is_gone(tenant, exc):
                self._errors[tenant.slug] = describe(exc)
            return None
        finally:
            if self._progress is not None:
                self._progress.done(tenant.slug)
        # hashing takes as long as a round trip
        return tenant, place, found.fingerprint

    async def _read(self, tenant: Tenant, *, alone: bool = False) -> tuple[_Place, Catalogue]:
        """Read a tenant's revision and catalogue, in a bounded time; ``alone``: while no run migrates it."""
        placement = placement_of(tenant)
        target = self._connections.target(tenant, self._health)
        try:
            async with asyncio.timeout(TENANT_SECONDS):
                connection = await target.connect()
                try:
                    limit = self._connections.limits.connect
                    if alone:
                        await lock(connection, timeout=_LOCK_SECONDS)
                    state = await read_state(connection, self._environment, target, timeout=limit)
                    found = await catalogue.read(
                        connection,
                        owner=self._services.names.owner,
                        role=placement.role,
                        ignored=ignored_at(state.heads, self._environment, self._ignored),
                        timeout=TENANT_SECONDS,
                    )
                finally:
                    await close(connection)
        except TimeoutError as exc:
            raise MigrationError(f"its catalogue could not be read within {TENANT_SECONDS:g} s") from exc
        return _Place(placement.server, state.heads), found

    async def _differences(self, drift: _Drift) -> list[Difference] | None:
        """Return how a tenant differs; None if it has changed since its fingerprint was read, or a run migrates it."""
        try:
            place, found = await self._read(drift.tenant, alone=True)
        except Exception:  # noqa: BLE001 - it is read again, and the error is reported then
            return None
        if place != drift.place or found.fingerprint != drift.fingerprint:
            return None
        return compare(drift.expected, found)


def _grouped(drifts: Iterable[_Drift]) -> Iterable[list[_Drift]]:
    """Those that differ in the same way, also on different servers."""
    groups: dict[tuple[str, str, Heads], list[_Drift]] = {}
    for one in drifts:
        groups.setdefault((one.fingerprint, one.expected.fingerprint, one.place.heads), []).append(one)
    return groups.values()


def _group(members: list[_Drift], differences: list[Difference]) -> DriftGroup:
    first = members[0]
    return DriftGroup(
        tenants=tuple(member.tenant.slug for member in members),
        roles=tuple(placement_of(member.tenant).role for member in members),
        servers=tuple(sorted({member.place.server for member in members})),
        revision=format_revision(first.place.heads),
        fingerprint=first.fingerprint,
        expected=first.expected.fingerprint,
        differences=tuple(differences),
    )


__all__ = ["TENANT_SECONDS", "DriftDetector"]
