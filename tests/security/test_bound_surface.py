"""While a tenant is bound, no part of the public surface acts on another, whichever way it is named (CWE-639).

The methods are enumerated by themselves: one that is added and takes a tenant, or a key's id, is tried as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any

import pytest

from tenancy_orm import Tenancy
from tenancy_orm.control.audit import AuditLog
from tenancy_orm.control.domains import DomainManager
from tenancy_orm.control.keys import KeyManager
from tenancy_orm.control.metrics import TenantMetrics
from tenancy_orm.control.quotas import QuotaManager
from tenancy_orm.control.tenants import TenantManager
from tenancy_orm.errors import ApiKeyNotFoundError, CrossTenantError, TenancyError

PARTS = {
    "audit": AuditLog,
    "domains": DomainManager,
    "keys": KeyManager,
    "metrics": TenantMetrics,
    "quotas": QuotaManager,
    "tenants": TenantManager,
}
# what a method needs besides a tenant, by parameter
ARGUMENTS: dict[str, Any] = {
    "resource": "users",
    "overrides": {"users": 9},
    "value": 1,
    "slug": "taken-over",
    "domain": "taken.example",
    "at": datetime(2099, 1, 1, tzinfo=UTC),
    "ends_at": datetime(2099, 1, 1, tzinfo=UTC),
}


def surface() -> Iterator[Any]:
    """Every public method that names a tenant, or one of its keys."""
    for part, kind in PARTS.items():
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            named = {"tenant", "key_id"} & inspect.signature(method).parameters.keys()
            if not name.startswith("_") and named and (part, name) != ("audit", "append"):
                yield pytest.param(part, name, named.pop(), id=f"{part}.{name}")


async def call(tenancy: Tenancy, part: str, name: str, named: str, value: Any) -> Any:
    """Call a method with the tenant or key, and with whatever else it requires."""
    method = getattr(getattr(tenancy, part), name)
    arguments = {
        parameter.name: ARGUMENTS[parameter.name]
        for parameter in inspect.signature(method).parameters.values()
        if parameter.default is parameter.empty and parameter.name != named
    }
    outcome = method(**{named: value}, **arguments)
    if isinstance(outcome, AbstractAsyncContextManager):
        async with outcome:
            return None
    return await outcome if inspect.isawaitable(outcome) else outcome


@pytest.mark.parametrize(("part", "name", "named"), list(surface()))
async def test_a_bound_tenant_reaches_no_other(tenancy: Tenancy, part: str, name: str, named: str) -> None:
    """By slug, id, or ``Tenant``, or by the id of its key; unbound, the same calls are an operator's to make."""
    await tenancy.tenants.create("acme")
    globex = await tenancy.tenants.create("globex")
    names: tuple[Any, ...] = (globex.key_id,)
    if named == "tenant":
        names = (globex.tenant, globex.id, str(globex.id), "globex")
    entries = await tenancy.audit.events()
    async with tenancy.scope("acme"):
        for value in names:
            with pytest.raises(CrossTenantError):
                await call(tenancy, part, name, named, value)
    assert await tenancy.audit.events() == entries
    assert (await tenancy.tenants.get("globex")).status == "active"
    try:
        await call(tenancy, part, name, named, names[0])
    except CrossTenantError:
        pytest.fail("nobody was bound")
    except TenancyError:
        pass  # its status does not admit it, or the quota is of another kind: it was reached


async def test_a_bound_tenant_reaches_itself(tenancy: Tenancy) -> None:
    """By all of its names, its former slug too."""
    created = await tenancy.tenants.create("acme")
    await tenancy.tenants.rename("acme", "acme-corp")
    async with tenancy.scope("acme-corp") as tenant:
        for ref in (tenant, tenant.id, str(tenant.id), "acme", "acme-corp"):
            assert [key.key_id for key in await tenancy.keys.list(ref)] == [created.key_id]
            assert (await tenancy.tenants.get(ref)).id == tenant.id
            assert await tenancy.metrics.history(ref) == []
        assert (await tenancy.keys.revoke(created.key_id)).state == "revoked"
        with pytest.raises(ApiKeyNotFoundError):
            await tenancy.keys.get("0" * 16)


async def test_a_slug_that_became_anothers_is_not_the_bound_tenants_any_more(tenancy: Tenancy) -> None:
    """The name was its own when it was bound; what it leads to now decides."""
    await tenancy.tenants.create("acme")
    other = await tenancy.tenants.create("globex")
    bound = tenancy.scope("acme")
    await bound.__aenter__()
    try:
        async with tenancy.control.transaction() as connection:
            for statement in (
                "UPDATE tenancy.tenants SET slug = 'acme-corp' WHERE slug = 'acme'",
                "UPDATE tenancy.tenants SET slug = 'acme' WHERE slug = 'globex'",
            ):
                await connection.exec_driver_sql(statement)
        for part, name in (("tenants", "get"), ("quotas", "usage"), ("quotas", "set"), ("metrics", "history")):
            with pytest.raises(CrossTenantError):
                await call(tenancy, part, name, "tenant", "acme")
    finally:
        await bound.__aexit__(None, None, None)
    assert (await tenancy.tenants.get("acme")).id == other.id
