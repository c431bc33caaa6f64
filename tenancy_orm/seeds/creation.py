"""``NewTenantSeeds``: what runs in a new tenant's database before the tenant becomes active."""

from __future__ import annotations

from uuid import UUID

from ..routing import Router
from ..tenant import Tenant
from .loading import SeedSet
from .running import run_for_tenant


class NewTenantSeeds:
    """The last step of a creation, for ``Provisioner``.

    Args:
        seeds: All seeds; those for the template have run there.
        router: Gives sessions of the tenant.
        timeout: Seconds that each seed may take.
    """

    def __init__(self, seeds: SeedSet, router: Router, *, timeout: float) -> None:
        self._seeds = seeds
        self._router = router
        self._timeout = timeout

    def wanted(self) -> bool:
        """Whether there is a seed to run."""
        return bool(self._seeds.for_tenants())

    async def run(self, tenant: Tenant) -> None:
        """Run the seeds, in order.

        Raises:
            SeedError: one failed, or took too long. What earlier ones have done stays until the database is dropped.
        """
        for seed in self._seeds.for_tenants():
            await run_for_tenant(self._router, tenant, seed, timeout=self._timeout)

    def forget(self, tenant_id: UUID) -> None:
        """Close this process's connections to a database that will be dropped."""
        self._router.retire(tenant_id)
