"""``RegistryRebuilding``: registers tenants again that a new or an old control database does not know.

An old one may also name a database that another one has replaced since, by a restore or a move: then its row gets that.

The markers of their databases name them. What the control database alone had, such as slugs, keys and quotas, is lost:
slugs are given, and keys are issued again. A clone is one again, and ends in time, since its database says so. Each
tenant is taken in steps, and a second run goes on with those that a first one has begun: its row, in maintenance, and
the record of a clone; a new password; then, as reconcile does it, its role, grants and marker; a login that proves
them; and the end of the maintenance.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Literal
from uuid import UUID

from sqlalchemy import select

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..connections import ConnectionLeases
from ..context import refuse_while_bound
from ..control import installation
from ..control.database import ControlDatabase
from ..control.models import former_slugs, tenants
from ..errors import ConfigurationError, InvalidSlugError
from ..operations import Operations
from ..postgres.errors import describe
from ..postgres.failures import FAILURES
from ..provisioning import Provisioner
from ..provisioning.creation.clone_marks import METADATA
from ..provisioning.provisioner import services_of
from ..provisioning.reconciling.marked_databases import MarkedDatabase, MarkedDatabases
from ..registry.registry import Registry
from ..registry.rows import TENANT_COLUMNS, tenant_from_row
from ..rotation import SecretManager
from ..secrets.data_keys import DataKeys
from ..tenant import Placement, Status, Tenant
from ..tenants.fields import check_slug
from .tombstones import Tombstones

logger = logging.getLogger("tenancy_orm.restores")

REASON = "the control database is being rebuilt"
"""The reason of the maintenance that a tenant is in until it is proved."""

FoundState = Literal["found", "taken", "beside", "refused"]
"""Whether a database can be taken, was taken, is kept beside the one in use, or is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundDatabase:
    """A database with the marker of a tenant that the registry lacks, or has without a database.

    Attributes:
        server: The server's name.
        database: The database's name.
        tenant_id: The tenant.
        state: What is or would be done with it.
        slug: The slug that the tenant has, or would get; None for a database beside the one in use.
        revision: The revision of its schema.
        size_bytes: Its size; None where the administrator may not ask.
        reason: Why it is not taken; empty where it is.
        replaces: The server and the database that the tenant's row names, which it has replaced; None where the tenant
            has no row.
        clone_of: The tenant that it is a clone of; None where it is none.
        expires_at: When a clone is deleted and purged, as before.
    """

    server: str
    database: str
    tenant_id: UUID
    state: FoundState
    slug: str | None = None
    revision: str | None = None
    size_bytes: int | None = None
    reason: str = ""
    replaces: str | None = None
    clone_of: UUID | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildReport:
    """What was found, and what was done with it.

    Attributes:
        installation: The installation that the databases are of. A control database that has another id takes it over.
        databases: The databases of tenants that the registry does not know, or did not.
        others: How many databases have the markers of other installations, which are left alone.
        unknown: Why servers could not be looked at, by name: what they have is not known.
    """

    installation: UUID
    databases: tuple[FoundDatabase, ...] = ()
    others: Mapping[UUID, int] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every server was looked at, and no tenant is refused."""
        return not self.unknown and all(one.state != "refused" for one in self.databases)


@dataclass(slots=True)
class _Found:
    """The report, and what is behind its databases."""

    report: RebuildReport
    # in the order of the report
    marked: list[MarkedDatabase]
    registered: frozenset[UUID]
    # tenants with rows that name databases that were replaced, or do not exist
    stale: frozenset[UUID]

    def beside(self, one: FoundDatabase) -> list[MarkedDatabase]:
        pairs = zip(self.report.databases, self.marked, strict=True)
        return [marked for found, marked in pairs if found.tenant_id == one.tenant_id and found.state == "beside"]


class RegistryRebuilding:
    """Registers tenants again by the markers of their databases (``tenancy.rebuilding``).

    Only operators may: while a tenant is bound, everything is refused.

    Args:
        config: The configuration.
        control: The control database.
        audit: The log of changes.
        registry: The tenants' rows.
        operations: The records of operations.
        provisioner: Knows the servers.
        secrets: Rotates passwords.
        tombstones: Know who was purged, as the store of backups says.
        leases: Tells this process from others.
        data_keys: With envelope encryption.
    """

    def __init__(
        self,
        *,
        config: TenancyConfig,
        control: ControlDatabase,
        audit: AuditLog,
        registry: Registry,
        operations: Operations,
        provisioner: Provisioner,
        secrets: SecretManager,
        tombstones: Tombstones,
        leases: ConnectionLeases,
        data_keys: DataKeys | None = None,
    ) -> None:
        self._config = config
        self._control = control
        self._audit = audit
        self._registry = registry
        self._operations = operations
        self._servers = services_of(provisioner).servers
        self._marked = MarkedDatabases(services_of(provisioner))
        self._secrets = secrets
        self._tombstones = tombstones
        self._leases = leases
        self._data_keys = data_keys

    # --- looking ----------------------------------------------------------------------------------------------------

    async def look(
        self,
        *,
        slugs: Mapping[UUID, str] = MappingProxyType({}),
        tiers: Mapping[UUID, str] = MappingProxyType({}),
        installation: UUID | None = None,
    ) -> RebuildReport:
        """Find the databases of tenants that the registry does not know, on every server. Nothing is changed.

        So are those of tenants with rows that name a database that was replaced since, or does not exist.

        Args:
            slugs: Slugs of tenants by their ids; another tenant gets ``tenant-`` and the last 12 digits of its id.
            tiers: Tiers of tenants by their ids; another tenant gets the default tier.
            installation: The installation, where the control database is new and the servers have those of several.

        Raises:
            ConfigurationError: ``slugs`` or ``tiers`` names an unknown id, or what is invalid, given twice or taken;
                the installation is not the only one, or not that of the tenants that the registry has.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("rebuilding the registry")
        return (await self._look(slugs, tiers, installation)).report

    async def _look(self, slugs: Mapping[UUID, str], tiers: Mapping[UUID, str], chosen: UUID | None) -> _Found:
        unknown: dict[str, str] = {}

        async def on(server: str) -> list[MarkedDatabase]:
            try:
                return await self._marked.on(server)
            except FAILURES as exc:
                unknown[server] = describe(exc)
                return []

        every = [one for found in await asyncio.gather(*map(on, self._servers)) for one in found]
        every = list({(self._cluster(one.server), one.name): one for one in every}.values())
        own, has_tenants = await self._own()
        # a comment can be forged, name and owner cannot: only both choose the installation
        counted = Counter(one.installation for one in every if one.ours)
        of = _choose(own, has_tenants, counted, chosen)
        marked = [one for one in every if one.installation == of]
        rows, unproved = await self._rows(), await self._registry.rebuilding()
        await self._check(slugs, tiers, {one.tenant_id for one in marked}, rows, complete=not unknown)
        stale = await self._stale([one for one in marked if one.tenant_id not in unproved], rows)
        lost = [one for one in marked if one.tenant_id not in rows or one.tenant_id in unproved | stale]
        lost += [one for one in marked if one.tenant_id in rows and rows[one.tenant_id].status is Status.PURGED]
        live = Counter(one.tenant_id for one in lost if one.role is not None)
        slots = asyncio.Semaphore(self._config.provisioning.concurrency)

        async def describe_one(one: MarkedDatabase) -> FoundDatabase:
            async with slots:
                found = await self._describe(one, live[one.tenant_id], rows, slugs)
            if found.state != "found" or one.tenant_id not in stale:
                return found
            place = rows[one.tenant_id].placement
            return replace(found, replaces=None if place is None else f"{place.server}/{place.database}")

        found = await asyncio.gather(*map(describe_one, lost))
        report = RebuildReport(
            installation=of,
            databases=tuple(found),
            others={which: number for which, number in counted.items() if which != of},
            unknown=dict(sorted(unknown.items())),
        )
        return _Found(report, lost, unproved, stale)

    async def _stale(self, marked: Sequence[MarkedDatabase], rows: Mapping[UUID, Tenant]) -> frozenset[UUID]:
        """Return the tenants that use another database than their rows name: that was replaced, or does not exist."""
        places: dict[UUID, Placement] = {}
        for one in marked:
            place = rows[one.tenant_id].placement if one.tenant_id in rows else None
            if place is None or place.server not in self._servers or not one.ours or one.replaced:
                continue
            if (self._cluster(one.server), one.name) != (self._cluster(place.server), place.database):
                places[one.tenant_id] = place
        found = set()
        for tenant_id, place in places.items():
            # where the server does not answer, or is not configured, its databases are not known either
            with suppress(*FAILURES):
                if await self._marked.is_stale(place):
                    found.add(tenant_id)
        return frozenset(found)

    def _cluster(self, server: str) -> str:
        row = self._servers[server].row
        return server if row is None or row.identity is None else row.identity

    async def _own(self) -> tuple[UUID, bool]:
        async with self._control.connect() as connection:
            own, _ = await installation.read(connection)
            return own, (await connection.execute(select(tenants.c.id).limit(1))).first() is not None

    async def _rows(self) -> dict[UUID, Tenant]:
        async with self._control.connect() as connection:
            found = await connection.execute(select(*TENANT_COLUMNS))
            return {one.id: one for one in map(tenant_from_row, found)}

    async def _check(
        self,
        slugs: Mapping[UUID, str],
        tiers: Mapping[UUID, str],
        ids: set[UUID],
        rows: Mapping[UUID, Tenant],
        *,
        complete: bool,
    ) -> None:
        """Refuse slugs and tiers that not every tenant can get."""
        if complete and (strange := sorted(str(one) for one in {*slugs, *tiers} - ids)):
            raise ConfigurationError(f"no database has the marker of {', '.join(strange)}: correct the ids")
        if strange := sorted({tier for tier in tiers.values() if tier not in self._config.tiers}):
            raise ConfigurationError(f"there is no tier {', '.join(strange)}: correct it, or configure it first")
        for slug in slugs.values():
            try:
                check_slug(slug)
            except InvalidSlugError as exc:
                raise ConfigurationError(str(exc)) from exc
        present = {one: row.slug for one, row in rows.items() if row.status is not Status.PURGED}
        async with self._control.connect() as connection:
            formers = {row.slug: row.tenant_id for row in await connection.execute(select(former_slugs))}
        wanted = {one: slugs.get(one, _default(one)) for one in ids | slugs.keys() if one not in present}
        uses = Counter([*present.values(), *wanted.values()])
        if doubled := sorted(slug for slug in wanted.values() if uses[slug] > 1 or slug in formers):
            raise ConfigurationError(f"slug {doubled[0]!r} is given twice, or is another tenant's")

    async def _describe(
        self, one: MarkedDatabase, live: int, rows: Mapping[UUID, Tenant], slugs: Mapping[UUID, str]
    ) -> FoundDatabase:
        row = rows.get(one.tenant_id)
        found = FoundDatabase(
            server=one.server,
            database=one.name,
            tenant_id=one.tenant_id,
            state="found",
            slug=slugs.get(one.tenant_id, _default(one.tenant_id)) if row is None else row.slug,
            size_bytes=one.size_bytes,
        )
        if row is not None and row.status is Status.PURGED:
            return replace(found, state="refused", reason="its tenant was purged, and remains purged")
        if one.role is None and live == 1 and one.ours:
            return replace(found, state="beside", slug=None, reason=one.reason)
        if one.role is None or live > 1:
            reason = one.reason or "another database of the tenant is open to its role as well"
            return replace(found, state="refused", reason=reason)
        try:
            if (purged_at := await self._tombstones.purged_at(one.tenant_id, one.installation)) is not None:
                reason = f"its tenant was purged ({purged_at}), as the store of backups says, and remains purged"
                return replace(found, state="refused", reason=reason)
            revision, mark = await self._marked.revision(one), await self._marked.clone_mark(one)
        except FAILURES as exc:
            return replace(found, state="refused", reason=describe(exc))
        if mark is None:
            return replace(found, revision=revision)
        return replace(found, revision=revision, clone_of=mark.of, expires_at=mark.expires_at)

    # --- the installation's id --------------------------------------------------------------------------------------

    async def take_installation(self, to: UUID, *, actor: Actor = SYSTEM) -> bool:
        """Give a new control database the id of the lost one, which ``look`` has found.

        Afterwards nothing else works before this ``Tenancy`` is closed, and opened by ``open(initialise=True)``.

        Returns:
            Whether it has to be opened so: False where it has that id, and all that goes with it, already.

        Raises:
            ConfigurationError: the control database was used already, or another process has it open.
            SecretProviderError: a data key cannot be wrapped for that id.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("rebuilding the registry")
        async with self._control.connect() as connection:
            own, viewer = await installation.read(connection)
        if own == to:
            return viewer is None or own != self._control.installation
        wrapped = {} if self._data_keys is None else await self._data_keys.wrapped_for(to)
        await run_to_completion(self._take_installation(to, wrapped, actor))
        return True

    async def _take_installation(self, to: UUID, wrapped: Mapping[str, bytes], actor: Actor) -> None:
        async with self._control.transaction() as connection:
            former = await installation.take(connection, to, processes=self._leases.processes, wrapped=wrapped)
            detail = {"former": str(former), "installation": str(to)}
            await self._audit.append(connection, action="installation.take", actor=actor, detail=detail)

    # --- taking -----------------------------------------------------------------------------------------------------

    async def run(
        self,
        *,
        slugs: Mapping[UUID, str] = MappingProxyType({}),
        tiers: Mapping[UUID, str] = MappingProxyType({}),
        actor: Actor = SYSTEM,
    ) -> RebuildReport:
        """Register the tenants that ``look`` has found: with the same ids, databases and roles, and new passwords.

        A tenant that has a row keeps it, and the row gets the database in use. What it has replaced is kept as after a
        restore.

        One tenant's failure does not stop the others. To go on after an interruption, repeat it. It issues no API keys.

        Args:
            slugs: As for ``look``.
            tiers: As for ``look``.
            actor: Who does this, for the audit log.

        Raises:
            ConfigurationError: as ``look``; or the control database has another id than the databases' installation,
                or was opened with another one: see ``take_installation``.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("rebuilding the registry")
        found = await self._look(slugs, tiers, None)
        if await self._take_needed(found.report.installation):
            raise ConfigurationError(
                f"the control database is not yet that of installation {found.report.installation}: take its id over "
                "(tenancy rebuild does), and open it again"
            )
        slots = asyncio.Semaphore(self._config.provisioning.concurrency)

        async def take(one: FoundDatabase, marked: MarkedDatabase) -> FoundDatabase:
            if one.state != "found":
                return one
            async with slots:
                return await self._take(found, one, marked, tiers.get(one.tenant_id), actor)

        taken = await asyncio.gather(*map(take, found.report.databases, found.marked))
        return replace(found.report, databases=tuple(taken))

    async def _take_needed(self, wanted: UUID) -> bool:
        async with self._control.connect() as connection:
            own, viewer = await installation.read(connection)
        return viewer is None or not own == wanted == self._control.installation

    async def _take(
        self, all_found: _Found, one: FoundDatabase, marked: MarkedDatabase, tier: str | None, actor: Actor
    ) -> FoundDatabase:
        try:
            mark = await self._marked.clone_mark(marked)
            switched = one.tenant_id in all_found.stale
            if switched:
                kept_until = datetime.now(UTC) + timedelta(seconds=self._config.backup.keep_replaced)
                await self._marked.switch(marked, kept_until=kept_until, actor=actor)
                await self._registry.end_creation_for_rebuilding(one.tenant_id, reason=REASON, actor=actor)
            elif one.tenant_id not in all_found.registered:
                await self._marked.register(
                    marked,
                    slug=str(one.slug),
                    tier=tier or self._config.default_tier,
                    metadata={} if mark is None else {METADATA: mark.metadata},
                    reason=REASON,
                    actor=actor,
                )
            if mark is not None:  # before anybody can use it: no clone is ever without its end
                await self._operations.record_again(
                    "clone", one.tenant_id, step="rebuilt", detail=mark.detail, actor=actor
                )
            await self._secrets.rotate_password(one.tenant_id, actor=actor)
            beside = all_found.beside(one)
            tenant, differences = await self._marked.finish(marked, beside=beside, switched=switched, actor=actor)
        except FAILURES as exc:
            logger.error("tenant %s cannot be registered again: %s", one.tenant_id, describe(exc))
            return replace(one, state="refused", reason=describe(exc))
        for difference in differences:
            logger.warning("tenant %s: %s", tenant.slug, difference.detail)
        return replace(one, state="taken", slug=tenant.slug, revision=tenant.schema_revision)


def _default(tenant_id: UUID) -> str:
    return f"tenant-{tenant_id.hex[-12:]}"


def _choose(own: UUID, has_tenants: bool, counted: Mapping[UUID, int], chosen: UUID | None) -> UUID:
    """Return the installation that is rebuilt."""
    if has_tenants or own in counted:
        if chosen not in (None, own):
            raise ConfigurationError(
                f"the control database is that of installation {own}, and cannot register "
                "databases of another installation"
            )
        return own
    if chosen is not None:
        if chosen not in counted:
            raise ConfigurationError(f"no database has the marker of installation {chosen}: {_listed(counted)}")
        return chosen
    if len(counted) > 1:
        raise ConfigurationError(f"there are databases of several installations, name one: {_listed(counted)}")
    return next(iter(counted), own)


def _listed(counted: Mapping[UUID, int]) -> str:
    return ", ".join(f"{which} ({number})" for which, number in counted.items()) or "there are none"


__all__ = ["FoundDatabase", "FoundState", "RebuildReport", "RegistryRebuilding"]
