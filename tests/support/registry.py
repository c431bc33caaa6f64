"""What a ``Tenancy`` writes into the registry when it opens, for tests of its parts."""

from __future__ import annotations

from collections.abc import Mapping

from tenancy_orm.config import Tier
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.tenants.tiers import write_tiers


async def synchronise(
    control: ControlDatabase, tiers: Mapping[str, Tier], addresses: Mapping[str, tuple[str, int]]
) -> None:
    """Write tiers and servers into the registry, where foreign keys and functions need them."""
    async with control.transaction() as connection:
        await write_tiers(connection, tiers)
    await control.save_servers(addresses)
