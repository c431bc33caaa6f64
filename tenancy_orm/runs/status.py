"""The revision of every tenant: as the registry has it, or read from the databases, then with the extensions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from ..migrations.concurrency import map_concurrently
from ..migrations.connections import Connections, Health
from ..migrations.database import State, close, read_state
from ..migrations.failures import describe
from ..migrations.plan import format_revision
from ..migrations.scripts import Environment
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..tenant import Tenant, TenantRef, placement_of
from .records import RunRecords


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRevision:
    """A tenant's revision, in its database (``revision``) and in the registry (``recorded``), and its extensions.

    ``at_head`` is whether the database has every head of the scripts; if it could not be read, None, with the reason in
    ``error``. Without migrations, ``revision`` is None and ``at_head`` true.

    If it is not ``verified``, the database was not asked: ``revision`` is the recorded one, and no extension is listed.

    ``missing_extensions`` are those of the setting ``extensions`` that the database lacks; an upgrade installs them.
    ``other_extensions`` are installed, but not in the setting: a revision created them, another extension needs them,
    or they were removed from the setting. They are left alone.

    ``has_unfinished_data`` is whether a data migration of a revision that the database is at has still to be finished;
    an upgrade does. If it is not verified, that is what the records of runs say.
    """

    tenant_id: UUID
    slug: str
    server: str
    revision: str | None
    recorded: str | None
    at_head: bool | None
    verified: bool = True
    error: str | None = None
    missing_extensions: tuple[str, ...] = ()
    other_extensions: tuple[str, ...] = ()
    has_unfinished_data: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether the database is at head, with all extensions of the setting and all data migrations."""
        return self.at_head is True and not self.missing_extensions and not self.has_unfinished_data

    @property
    def is_recorded(self) -> bool:
        """Whether the registry has the database's revision; not so if the database was migrated by other means."""
        return self.error is None and self.revision == self.recorded


class StatusReader:
    """Reads the revisions of tenants.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
        environment: The migrations; None without any.
    """

    def __init__(self, services: FleetServices, connections: Connections, environment: Environment | None) -> None:
        self._services = services
        self._connections = connections
        self._environment = environment
        self._selection = Selection(services.registry)
        self._heads = frozenset(() if environment is None else environment.script.revision_map._real_heads)

    async def recorded(self, tenants: Iterable[TenantRef] | None) -> list[TenantRevision]:
        """Return what the registry has recorded of tenants, or of all, in one query, and one for runs."""
        only = None if tenants is None else [tenant.id for tenant in await self._selection.choose(tenants)]
        head = format_revision(self._heads)
        unfinished = await RunRecords(self._services.control).with_unfinished_data()
        return [
            TenantRevision(
                tenant_id=row.tenant_id,
                slug=row.slug,
                server=row.server,
                revision=row.revision,
                recorded=row.revision,
                at_head=self._environment is None or row.revision == head,
                verified=False,
                has_unfinished_data=row.tenant_id in unfinished
                and unfinished[row.tenant_id] in (None, row.revision),  # what it was brought to since is without
            )
            for row in await self._services.registry.recorded_revisions(only)
        ]

    async def verified(self, tenants: Iterable[TenantRef] | None, concurrency: int) -> list[TenantRevision]:
        """Read tenants, or all, from their databases."""
        health = Health()

        async def read(tenant: Tenant) -> TenantRevision:
            return await self._read(tenant, health)

        return await map_concurrently(read, await self._selection.choose(tenants), concurrency)

    async def _read(self, tenant: Tenant, health: Health) -> TenantRevision:
        found: State | None = None
        error = None
        configured = self._services.config.extensions
        try:
            target = self._connections.target(tenant, health)
            connection = await target.connect()
            try:
                timeout = self._connections.limits.connect
                found = await read_state(connection, self._environment, target, timeout=timeout)
            finally:
                await close(connection)
        except Exception as exc:  # noqa: BLE001 - any error is reported for this tenant
            error = describe(exc)
        return TenantRevision(
            tenant_id=tenant.id,
            slug=tenant.slug,
            server=placement_of(tenant).server,
            revision=None if found is None else format_revision(found.heads),
            recorded=tenant.schema_revision,
            at_head=None if found is None else found.heads == self._heads,
            error=error,
            has_unfinished_data=found is not None and found.has_data,
            missing_extensions=() if found is None else tuple(x for x in configured if x not in found.extensions),
            # every database has plpgsql
            other_extensions=() if found is None else tuple(sorted(found.extensions - {*configured, "plpgsql"})),
        )
