"""The order in which tenants are migrated: as they were created, or the busiest first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from ..errors import ConfigurationError, TenancyError
from ..migrations.services import FleetServices
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import reason_of
from ..servers.activity import Activity, read_activity
from ..tenant import Tenant, placement_of

logger = logging.getLogger("tenancy_orm.migrations")

Order: TypeAlias = Literal["created", "busiest"]
"""In the order of their creation; or first those with connections, then by their number of transactions."""

_QUIET: Activity = (False, 0)


def check_order(order: str) -> None:
    """Refuse an order that there is not.

    Raises:
        ConfigurationError: there is no such order.
    """
    if order not in ("created", "busiest"):
        raise ConfigurationError(f"there is no order {order!r}: say 'created' or 'busiest'")


async def busiest_first(tenants: Sequence[Tenant], services: FleetServices) -> list[Tenant]:
    """Return tenants in the order of how busy their databases are, as their servers say; the others as they come."""
    names = {placement_of(tenant).server for tenant in tenants}
    found = await asyncio.gather(*(_activity(name, services) for name in names))
    activity = dict(zip(names, found, strict=True))

    def rank(tenant: Tenant) -> Activity:
        placement = placement_of(tenant)
        return activity[placement.server].get(placement.database, _QUIET)

    return sorted(tenants, key=rank, reverse=True)


async def _activity(name: str, services: FleetServices) -> Mapping[str, Activity]:
    try:
        return await read_activity(services.servers[name], services.names.tenant_stem)
    except (TenancyError, *SERVER_FAILURES) as exc:
        # the run itself reports a server that does not answer
        logger.warning("how busy the tenants of server %s are is not known: %s", name, reason_of(exc))
        return {}


__all__ = ["Order", "busiest_first", "check_order"]
