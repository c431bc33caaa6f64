"""The tenants that a command is for."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from ..errors import ControlUnavailableError, MarkerMismatchError, TenantNotFoundError, TenantProvisioningError
from ..postgres.errors import INVALID_CATALOG_NAME, sqlstate_of
from ..registry.registry import Registry
from ..tenant import Status, Tenant, TenantRef

NO_TENANTS = "there are no tenants in this installation: tenancy config show says which settings are in force"


class Selection:
    """Looks up tenants.

    Args:
        registry: The control database's tenants.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def choose(self, tenants: Iterable[TenantRef] | None) -> list[Tenant]:
        """Return the given tenants, or all that have a database and are not being created or purged.

        Raises:
            TenantNotFoundError: a given tenant does not exist.
            TenantProvisioningError: a given tenant is still being created.
        """
        if tenants is None:
            return await self._all()
        found = [await self._one(ref) for ref in tenants]
        return list({tenant.id: tenant for tenant in found}.values())

    async def is_gone(self, tenant: Tenant, error: Exception) -> bool:
        """Whether the database does not exist because the tenant has been purged since the list was made."""
        if sqlstate_of(error) != INVALID_CATALOG_NAME:
            return False
        try:
            return await self._is_purged(tenant)
        except ControlUnavailableError:
            return False

    async def is_elsewhere(self, tenant: Tenant, error: Exception) -> bool:
        """Whether the tenant has another database by now, as the marker of the one that it has left says."""
        if not isinstance(error, MarkerMismatchError):
            return False
        try:
            return not await self._registry.is_placed_as(tenant)
        except ControlUnavailableError:
            return False

    async def _is_purged(self, tenant: Tenant) -> bool:
        if (await self._registry.get(tenant.id)).status is Status.PURGED:
            return True
        unfinished = await self._registry.find_unfinished(tenant.id)
        return unfinished is not None and unfinished.kind == "purging"

    async def _all(self) -> list[Tenant]:
        purging = await self._purging()
        return [
            tenant
            async for tenant in self._registry.iterate()
            if tenant.status is not Status.PROVISIONING and tenant.id not in purging and tenant.placement
        ]

    async def _purging(self) -> set[UUID]:
        return {item.tenant.id for item in await self._registry.unfinished() if item.kind == "purging"}

    async def _one(self, ref: TenantRef) -> Tenant:
        tenant = await self._registry.find(ref)
        if tenant.status is Status.PROVISIONING:
            raise TenantProvisioningError(tenant.slug)
        if tenant.placement is None:
            raise TenantNotFoundError(tenant.slug)
        return tenant
