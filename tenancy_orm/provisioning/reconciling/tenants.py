"""Comparing one tenant's database and role with what provisioning makes, and mending what differs.

A database with another tenant's marker, or another installation's, is never changed: it may hold that tenant's data.
Nor is one with a marker that says that another one has replaced it: that one is the tenant's by now. A database without
a marker may be anything, and an existing database is never adopted. Others' rights on it are revoked, which is safe for
any database of such a name; the rest waits until an operator has said that it is this tenant's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

import asyncpg

from ...audit.actor import Actor
from ...control.names import login_stem
from ...events import IsolationIncident
from ...postgres import connections
from ...postgres.connections import Connection
from ...registry.lifecycle import LOGIN_BLOCKED
from ...routing import marker
from ...tenant import Placement, Tenant
from ..checks import server_state
from ..checks.contents_check import ContentsCheck
from ..checks.differences import Deviation, Difference
from ..checks.server_state import ServerState
from ..creation.pipeline import ProvisioningServices
from ..rights import role_settings
from ..rights.tenant_rights import TenantRights
from ..server_objects import roles
from ..server_objects.scram import scram_verifier

logger = logging.getLogger("tenancy_orm.provisioning")

# what is mended in a database without a marker: it takes rights away, and gives none
_RESTRICTIONS = frozenset({"database.public", "database.grant", "database.template"})
_UNUSABLE = frozenset({"database.missing", "database.invalid", "database.replaced", "marker.missing", "marker.other"})
_OTHERS = "SELECT usename::text, pid FROM pg_stat_activity WHERE datname = $1 AND starts_with(usename::text, $2)"


class TenantCheck:
    """The check of tenants of one server, one at a time.

    Args:
        services: Of provisioning.
        server: The server's name.
        mend: Whether to mend what differs.
        spare_others: Whether an operator's own roles keep their rights, see ``ContentsCheck``.
        adopt: Ids or slugs of tenants that get a missing marker.
        actor: Who does this, for the audit log.
    """

    def __init__(
        self,
        services: ProvisioningServices,
        server: str,
        *,
        mend: bool,
        spare_others: bool,
        adopt: Iterable[str],
        actor: Actor,
    ) -> None:
        self._services = services
        self._server = server
        self._blockers = services.blockers(services.servers[server])
        self._rights = TenantRights.of(services.config, services.names.owner)
        self._mend = mend
        self._spare_others = spare_others
        self._adopt = frozenset(adopt)
        self._actor = actor

    async def differs(self, tenant: Tenant, state: ServerState, *, thorough: bool) -> bool:
        """Whether there is a reason for ``settle``. It reads, and takes no lock.

        Args:
            tenant: The tenant.
            state: Of its server.
            thorough: Whether to look into the database even if the shared catalogues give no reason to.
        """
        if tenant.placement is None:
            return False
        if self._deviations(tenant, state):
            return True
        if not thorough:
            return server_state.is_suspicious(state, self._services.names, tenant.placement)
        if self._rights.hook is not None:
            return True
        connection = await self._blockers.connect(tenant.placement.database)
        try:
            return bool(await self._contents(connection, tenant.placement).look())
        finally:
            await connections.close(connection)

    async def settle(self, connection: Connection, tenant: Tenant, told: list[Difference]) -> None:
        """Find what differs, and mend it if that is asked for. Call it under the tenant's lock.

        Args:
            connection: An administrative one to the maintenance database, which holds the lock.
            tenant: The tenant, as it was read under the lock.
            told: What differs is added to it, also if this fails.

        Raises:
            ProvisioningError: the grant hook failed; its database's contents were not changed.
        """
        if tenant.placement is None:
            return
        mended, left = await self._settle_shared(connection, tenant, tenant.placement)
        try:
            if not (_UNUSABLE | {"database.closed"}) & {deviation.kind for deviation in left}:
                await self._settle_contents(tenant.placement, mended, left)
        finally:
            # also if the contents fail: what is mended by then has been committed
            for one in mended:
                logger.warning("reconcile: tenant %s: mended: %s", tenant.slug, one.detail)
            place = tenant.placement
            told += [one.difference(tenant.slug, self._server, place.database, mended=True) for one in mended]
            told += [one.difference(tenant.slug, self._server, place.database) for one in left]
            await self._record(tenant, mended, left)

    def _deviations(self, tenant: Tenant, state: ServerState) -> list[Deviation]:
        assert tenant.placement is not None  # noqa: S101 - for the type checker: the callers have checked
        text = marker.marker_text(self._services.installation, tenant.id)
        return list(server_state.deviations(state, self._services.names, tenant.placement, marker=text))

    # --- shared catalogues ------------------------------------------------------------------------------------------

    async def _settle_shared(
        self, connection: Connection, tenant: Tenant, placement: Placement
    ) -> tuple[list[Deviation], list[Deviation]]:
        names = self._services.names
        found = self._deviations(tenant, await server_state.read(connection, names, only=placement))
        kinds = {deviation.kind for deviation in found}
        if "marker.other" in kinds:
            self._report_incident(tenant, found)
        if not self._mend or not found:
            return [], found
        adopted = bool(self._adopt & {tenant.slug, str(tenant.id)})
        # the owner first: an administrator who is not a superuser gets its rights on the database from the owner role
        for deviation in sorted(found, key=lambda one: one.kind != "database.owner"):
            if deviation.kind == "role.missing" and "database.missing" not in kinds:
                await self._create_role(connection, tenant, placement)
            elif self._may_mend(deviation, kinds, adopted):
                await self._apply(connection, placement, deviation)
        if kinds & {"database.public", "database.grant"} and "marker.other" not in kinds:
            await self._end_others(connection, placement)
        left = self._deviations(tenant, await server_state.read(connection, names, only=placement))
        return [one for one in found if one not in left], left

    @staticmethod
    def _may_mend(deviation: Deviation, kinds: set[str], adopted: bool) -> bool:
        if deviation.kind.startswith("role."):
            return True
        if "marker.other" in kinds:
            return False
        return adopted or "marker.missing" not in kinds or deviation.kind in _RESTRICTIONS

    async def _apply(self, connection: Connection, placement: Placement, deviation: Deviation) -> None:
        for statement in deviation.statements:
            try:
                await self._blockers.run(connection, partial(connection.execute, statement), role=placement.role)
            except (asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedObjectError, asyncpg.ObjectInUseError) as exc:
                logger.warning("reconcile: %s (SQLSTATE %s): %s", deviation.detail, exc.sqlstate, statement)

    async def _create_role(self, connection: Connection, tenant: Tenant, placement: Placement) -> None:
        """Create the role again, with the password that the registry has for it."""
        tier = self._services.config.tiers.get(tenant.tier)
        settings = await role_settings.resolve(connection, self._services.config.provisioning.role_settings)
        await roles.create(
            connection,
            placement.role,
            verifier=scram_verifier(self._services.keyring.open_password(tenant.id, placement.sealed_password)),
            connection_limit=0 if tier is None else tier.connection_limit,
            settings=settings.statements(placement.role),
        )
        if tenant.status in LOGIN_BLOCKED:
            await roles.set_login(connection, placement.role, False)

    async def _end_others(self, connection: Connection, placement: Placement) -> None:
        """End the sessions that other tenants had opened while they could: a REVOKE does not end them."""
        found: dict[str, list[int]] = {}
        for role, pid in await connection.fetch(_OTHERS, placement.database, self._services.names.tenant_stem):
            if not (role == placement.role or role.startswith(login_stem(placement.role))):
                found.setdefault(role, []).append(pid)
        for role, pids in found.items():
            logger.error("role %s was connected to database %s: it is ended", role, placement.database)
            await roles.end_connections(connection, role, pids)

    # --- the database -----------------------------------------------------------------------------------------------

    def _contents(self, connection: Connection, placement: Placement) -> ContentsCheck:
        return ContentsCheck(
            connection,
            self._blockers,
            names=self._services.names,
            database=placement.database,
            role=placement.role,
            rights=self._rights,
            spare_others=self._spare_others,
        )

    async def _settle_contents(self, placement: Placement, mended: list[Deviation], left: list[Deviation]) -> None:
        connection = await self._blockers.connect(placement.database)
        try:
            while True:
                result = await self._contents(connection, placement).settle(mend=self._mend)
                mended += result.mended
                if not (self._mend and result.more and result.mended):
                    left += result.left
                    return
        finally:
            await connections.close(connection)

    # --- telling ----------------------------------------------------------------------------------------------------

    def _report_incident(self, tenant: Tenant, found: Iterable[Deviation]) -> None:
        detail = next(one.detail for one in found if one.kind == "marker.other")
        logger.error("the database of tenant %s on server %s: %s", tenant.slug, self._server, detail)
        self._services.events.emit(
            IsolationIncident(tenant_id=tenant.id, slug=tenant.slug, kind="MarkerMismatchError", detail=detail)
        )

    async def _record(self, tenant: Tenant, mended: list[Deviation], left: list[Deviation]) -> None:
        """Write what was mended to the audit log, and what is dangerous and was not."""
        if not self._mend or not mended:
            return
        detail = {
            "mended": [{"kind": one.kind, "detail": one.detail} for one in mended],
            "left": [{"kind": one.kind, "detail": one.detail} for one in left],
        }
        await self._services.registry.record(tenant.id, "tenant.mend", detail=detail, actor=self._actor)
