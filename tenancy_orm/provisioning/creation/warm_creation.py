"""The creation of a tenant from the warm pool: its database and role are there, and are opened for it.

The statement that writes the tenant's row claims a warm database. The step "opened", in place of role, database and
grants, gives it the tenant's marker, password and connection limit, all in one transaction. From the claim on, the
database is the tenant's. It is never given back: what undoes the creation, or ``reconcile`` after a kill, drops it.

Without a warm database of the recipe, the creation is a cold one. So it is where the claimed one is not as it was made:
it is removed, and another one is made in its place.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

import asyncpg

from ...cancellation import run_to_completion
from ...errors import TenancyError
from ...postgres.connections import Connection, version
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...postgres.quoting import quote_identifier, quote_literal
from ...registry.rows import TenantDraft
from ...routing import marker
from ...tenant import Tenant
from ..rights.role_settings import RoleSettings
from ..rights.tenant_rights import TenantRights
from ..server_objects import removal
from ..server_objects.scram import scram_verifier
from ..templates.building import TemplateInfo
from .pipeline import Creation, ProvisioningServices, Step

logger = logging.getLogger("tenancy_orm.provisioning")

# Fails with a division by zero (22012), unless the database and its role are as ``WarmPool`` makes them.
_REFUSAL = (
    "SELECT 1 / count(*) FROM pg_database d JOIN pg_roles r ON r.rolname = d.datname "
    "WHERE d.datname = {name} AND NOT d.datallowconn AND NOT r.rolcanlogin "
    "AND shobj_description(d.oid, 'pg_database') = {marker}"
)
_UNUSABLE = (asyncpg.DivisionByZeroError, asyncpg.InvalidCatalogNameError, asyncpg.UndefinedObjectError)

_ANY_DATABASE, _ANY_ROLE = "database", "role"


def recipe(services: ProvisioningServices, template: TemplateInfo, settings: RoleSettings, server_version: int) -> str:
    """Return a digest of all that decides what a new tenant's database is like, except the tenant itself.

    Args:
        services: Of provisioning.
        template: What is cloned, which has the schema.
        settings: Of new roles.
        server_version: PostgreSQL's major version, which the grant hook is given.

    Raises:
        ProvisioningError: the grant hook failed.
    """
    rights = TenantRights.of(services.config, services.names.owner)
    # the hook's statements for names that no tenant has: another release may have another hook
    hook = rights.hook_statements(_ANY_DATABASE, _ANY_ROLE, server_version)
    parts = (
        template.name,
        *rights.privileges,
        str(rights.advisory_locks),
        *sorted(map(str, rights.read_only)),
        *sorted(f"{name}={value}" for name, value in settings.values.items()),
        *hook,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


async def open_for_tenant(
    connection: Connection,
    name: str,
    *,
    installation: UUID,
    tenant_id: UUID,
    verifier: str,
    connection_limit: int,
    further: Sequence[str] = (),
) -> None:
    """Give a warm database to a tenant: its marker, and a login. All in one transaction, or not at all.

    Args:
        connection: An administrative one, to any database of the server.
        name: Of the database and its role.
        installation: The id of this installation.
        tenant_id: The tenant.
        verifier: The result of ``scram_verifier`` for the tenant's password.
        connection_limit: Its tier's.
        further: Statements that are a part of it.

    Raises:
        asyncpg.DivisionByZeroError, asyncpg.InvalidCatalogNameError, asyncpg.UndefinedObjectError: it is not a sealed
            warm database that no tenant has had.
    """
    quoted = quote_identifier(name)
    refusal = _REFUSAL.format(name=quote_literal(name), marker=quote_literal(marker.warm_text(installation)))
    statements = (
        refusal,
        f"COMMENT ON DATABASE {quoted} IS {quote_literal(marker.marker_text(installation, tenant_id))}",
        f"ALTER ROLE {quoted} LOGIN CONNECTION LIMIT {int(connection_limit)} PASSWORD {quote_literal(verifier)}",
        f"GRANT CONNECT ON DATABASE {quoted} TO {quoted}",
        f"ALTER DATABASE {quoted} WITH ALLOW_CONNECTIONS true",
        *further,
    )
    # one message is one transaction
    await connection.execute("; ".join(statements))


class WarmCreation(Creation):
    """The creation of one tenant from the warm pool, or a cold one where the pool has none."""

    _cold: TenantDraft | None = None  # the draft as it was, once a warm database is claimed
    _registered: Tenant | None = None

    async def _register(self) -> None:
        self._step = "registered"
        wanted = recipe(self._services, self._template, self._settings, version(self._admin))
        # of a claimed one the row names the proof at once: it fails unless all before it is done
        registering = self._services.registry.register(
            self._draft, recipe=wanted, claimed_step=self._proof_name, actor=self._actor
        )
        tenant = self._registered = await run_to_completion(registering)
        place = tenant.placement
        if place is not None and place.database != self._draft.database:
            self._cold = self._draft
            self._draft = replace(self._draft, database=place.database, role=place.role)
            self._recorded_step = self._proof_name

    def _making_steps(self) -> tuple[Step, ...]:
        if self._cold is None:
            return super()._making_steps()
        return (Step("opened", self._open, self._drop_opened),)

    async def _open(self) -> None:
        draft = self._draft
        password = self._services.keyring.open_password(draft.id, draft.sealed_password)
        try:
            await open_for_tenant(
                self._admin,
                draft.database,
                installation=self._services.installation,
                tenant_id=draft.id,
                verifier=scram_verifier(password),
                connection_limit=self._services.config.tiers[draft.tier].connection_limit,
                further=self._unfinished,
            )
        except _UNUSABLE as exc:
            logger.warning(
                "warm database %s on server %s is not as it was made (%s): it is removed, and tenant %s gets a new one",
                draft.database,
                draft.server,
                describe(exc),
                draft.slug,
            )
            await self._make_cold()

    async def _make_cold(self) -> None:
        """Make the tenant's own database in place of the claimed one, which is removed."""
        assert self._cold is not None  # noqa: S101 - for the type checker: this is a step of a claimed one
        # first: from now on the claimed one is nobody's, and reconcile drops it if this cannot
        await self._services.registry.rename_database(self._cold.id, self._cold.database)
        try:
            await self._drop_opened()
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.warning("warm database %s stays until reconcile: %s", self._draft.database, describe(exc))
        self._draft = self._cold
        for step in super()._making_steps():
            await step.apply()

    async def _prove(self) -> None:
        kept, tenant = self._services.first_connections, self._registered
        is_claimed = self._cold is not None and self._draft is not self._cold
        # a tenant's first request is likely to be a request to this process, soon
        if kept is None or tenant is None or not is_claimed or not await kept.open(tenant):
            await super()._prove()

    async def _end_connections(self) -> None:
        # after the proof has begun, the database is this tenant's
        if self._services.first_connections is not None:
            self._services.first_connections.forget(self._draft.id)
        await super()._end_connections()

    async def _drop_opened(self) -> None:
        installation = self._services.installation
        own = (marker.warm_text(installation), marker.marker_text(installation, self._draft.id))
        if await removal.is_foreign(self._admin, self._draft.database, *own):
            return
        await self._drop_database()
        await self._drop_role()


__all__ = ["WarmCreation", "open_for_tenant", "recipe"]
