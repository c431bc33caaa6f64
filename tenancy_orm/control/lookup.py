"""The look-up of a tenant's id by any of its names. The binding is enforced here.

A tenant is named by its slug, by a former slug that still redirects to it, by a verified domain of its own, by its id
(also as text), or by a ``Tenant``. The directory, which caches whole tenants, looks up many names at once, by
``named``.
"""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, and_, func, literal_column, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ..context import as_reference, refuse_other_tenant
from ..errors import TenantNotFoundError
from ..tenant import Status, Tenant
from .database import ControlDatabase
from .models import domains, former_slugs, tenants

# a slug or a domain; PostgreSQL would not even accept some other strings as a text
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
NAME_LENGTH = 253

# as the index of slugs has it, and no parameter: a generic plan could not use that index
_UNPURGED = tenants.c.status != literal_column(f"'{Status.PURGED}'")


def check_name(name: str) -> str:
    """Return ``name`` if a tenant can have it.

    Raises:
        TenantNotFoundError: it is neither a slug nor a domain.
    """
    if len(name) > NAME_LENGTH or not _NAME.fullmatch(name):
        raise TenantNotFoundError(name[:64])
    return name


def _redirects(name: str | ColumnElement[Any]) -> ColumnElement[bool]:
    return and_(former_slugs.c.slug == name, former_slugs.c.redirects_until > func.now())


def _is_verified(name: str | ColumnElement[Any]) -> ColumnElement[bool]:
    return and_(domains.c.domain == name, domains.c.verified_at.is_not(None))


def has_name(name: str, *, purged: bool = False) -> ColumnElement[bool]:
    """The condition on ``tenants`` for the tenant with this name now; a purged one has none.

    Args:
        name: The name.
        purged: Also for all purged tenants with this as their last slug.
    """
    former = select(former_slugs.c.tenant_id).where(_redirects(name))
    domain = select(domains.c.tenant_id).where(_is_verified(name))
    has = or_(
        tenants.c.slug == name,
        tenants.c.id == former.scalar_subquery(),
        tenants.c.id == domain.scalar_subquery(),
    )
    return and_(has, or_(_UNPURGED, tenants.c.slug == name) if purged else _UNPURGED)


def named(name: ColumnElement[Any], *columns: ColumnElement[Any]) -> tuple[Select[Any], ...]:
    """The queries for the tenants with one of several names: by slug, by former slug, by domain.

    Their rows are those of ``has_name``; each query reads one index, also for many names. A purged tenant has no former
    slug and no domain.

    Args:
        name: ``ANY`` of an array of names.
        columns: What is selected.
    """
    return (
        select(*columns).where(tenants.c.slug == name, _UNPURGED),
        select(*columns).join(former_slugs, former_slugs.c.tenant_id == tenants.c.id).where(_redirects(name)),
        select(*columns).join(domains, domains.c.tenant_id == tenants.c.id).where(_is_verified(name)),
    )


async def find_tenant_id(connection: AsyncConnection, ref: str | UUID | Tenant) -> UUID:
    """Return the id of the tenant that ``ref`` names. An id is returned without a look-up.

    Raises:
        TenantNotFoundError: no tenant has this name.
        CrossTenantError: another tenant is bound.
    """
    refuse_other_tenant(ref)
    named = as_reference(ref)
    if isinstance(named, UUID):
        return named
    found: UUID | None = await connection.scalar(select(tenants.c.id).where(has_name(check_name(named))))
    if found is None:
        raise TenantNotFoundError(named)
    # the name may be another tenant's since the tenant was bound
    refuse_other_tenant(found)
    return found


async def resolve_tenant_id(control: ControlDatabase, ref: str | UUID | Tenant) -> UUID:
    """As ``find_tenant_id``, on its own connection, which is opened for a name only.

    Raises:
        TenantNotFoundError: no tenant has this name.
        CrossTenantError: another tenant is bound.
        ControlUnavailableError: the control database does not answer.
    """
    refuse_other_tenant(ref)
    named = as_reference(ref)
    if isinstance(named, UUID):
        return named
    async with control.connect() as connection:
        return await find_tenant_id(connection, named)


__all__ = ["NAME_LENGTH", "check_name", "find_tenant_id", "has_name", "named", "resolve_tenant_id"]
