"""What a type checker sees of the public surface: mypy reads this file; pytest only defines its functions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, assert_type

from sqlalchemy.ext.asyncio import AsyncSession

from tenancy_orm import Limit, Tenancy, Tenant, Tier, current_tenant

if TYPE_CHECKING:

    async def sessions(tenancy: Tenancy) -> None:
        """Sessions are ordinary ones."""
        async with tenancy.session() as session:
            assert_type(session, AsyncSession)
        async with tenancy.transaction("acme") as session:
            assert_type(session, AsyncSession)
        async with tenancy.scope("acme") as tenant:
            assert_type(tenant, Tenant)
        async for tenant in tenancy.each():
            assert_type(tenant, Tenant)

    async def double(number: int) -> int:
        """A coroutine function."""
        return number * 2

    def triple(number: int) -> int:
        """A plain function."""
        return number * 3

    async def running(tenancy: Tenancy) -> None:
        """``run`` has the function's own result, and checks its arguments."""
        assert_type(await tenancy.run("acme", double, 1), int)
        assert_type(await tenancy.run("acme", triple, 1), int)
        await tenancy.run("acme", triple, "one")  # type: ignore[call-overload]

    async def managing(tenancy: Tenancy) -> AsyncIterator[Tenant]:
        """Managers return values."""
        created = await tenancy.tenants.create("acme", tier="pro")
        assert_type(created.tenant, Tenant)
        assert_type(created.api_key, str)
        assert_type(await tenancy.fetch_value("SELECT 1"), Any)
        yield current_tenant()


def test_numbers_are_limits() -> None:
    """A number is short for a limit; what is read is always a ``Limit``."""
    tier = Tier("small", {"users": 3, "calls": Limit(5, "day"), "free": None})
    assert_type(tier.limits["users"], Limit)
    assert tier.limits["users"] == Limit(3)
