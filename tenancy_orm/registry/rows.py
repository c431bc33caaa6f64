"""Rows of the registry as values."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Label,
    Row,
    Text,
    case,
    func,
    literal_column,
    text,
)

from ..control.direct import ControlRow
from ..control.models import tenants
from ..tenant import Placement, Status, Tenant

TENANT_COLUMNS: tuple[ColumnElement[Any], ...] = (
    tenants.c.id,
    tenants.c.slug,
    tenants.c.status,
    tenants.c.tier,
    tenants.c.server,
    tenants.c.database_name,
    tenants.c.role_name,
    tenants.c.sealed_password,
    tenants.c.schema_revision,
    # a migration that was killed says no more that it has ended
    case((tenants.c.migrating_until > func.now(), tenants.c.migrating_to)).label("migrating_to"),
    # a switch that was killed pauses nobody for longer than it has said
    func.coalesce(tenants.c.paused_until > func.now(), text("false")).label("paused"),
    tenants.c.metadata,
    tenants.c.quotas,
    tenants.c.reason,
    tenants.c.timezone,
    tenants.c.region,
    tenants.c.trial_ends_at,
    tenants.c.suspend_at,
    tenants.c.purge_at,
    tenants.c.created_at,
    tenants.c.updated_at,
    tenants.c.deleted_at,
    # the tenant's other names: former slugs that still redirect to it, and its verified domains
    literal_column(
        "ARRAY(SELECT f.slug FROM tenancy.former_slugs f "
        "WHERE f.tenant_id = tenancy.tenants.id AND f.redirects_until > now() "
        "UNION ALL SELECT d.domain FROM tenancy.domains d "
        "WHERE d.tenant_id = tenancy.tenants.id AND d.verified_at IS NOT NULL)",
        ARRAY(Text),
    ).label("aliases"),
)


RETURNED = ", ".join(
    f"tenancy.tenants.{column.name}" if isinstance(column, Column) else f"{column.element} AS {column.name}"
    for column in TENANT_COLUMNS
    if isinstance(column, (Column, Label))
)
"""The same columns as text, for RETURNING in a statement of asyncpg's own."""


def uuid7() -> UUID:
    """Return a time-ordered UUID (RFC 9562, version 7): 48 bits of milliseconds, then random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


def _json_object(value: Mapping[str, Any] | str) -> Mapping[str, Any]:
    # SQLAlchemy's rows have it as a dictionary, those of ``ControlDatabase.fetch`` as text
    return MappingProxyType(json.loads(value) if isinstance(value, str) else value)


def tenant_from_row(row: Row[*tuple[Any, ...]] | ControlRow) -> Tenant:
    """Build the value object from a row of ``TENANT_COLUMNS``."""
    # by key, since attributes of a ``ControlRow`` take ten times as long
    column: Any = row._mapping if isinstance(row, Row) else row
    placement = None
    if column["sealed_password"] is not None:
        placement = Placement(column["server"], column["database_name"], column["role_name"], column["sealed_password"])
    return Tenant(
        id=column["id"],
        slug=column["slug"],
        status=Status(column["status"]),
        tier=column["tier"],
        placement=placement,
        schema_revision=column["schema_revision"],
        migrating_to=column["migrating_to"],
        paused=column["paused"],
        metadata=_json_object(column["metadata"]),
        quotas=_json_object(column["quotas"]),
        reason=column["reason"],
        created_at=column["created_at"],
        updated_at=column["updated_at"],
        deleted_at=column["deleted_at"],
        trial_ends_at=column["trial_ends_at"],
        suspend_at=column["suspend_at"],
        purge_at=column["purge_at"],
        timezone=column["timezone"],
        region=column["region"],
        aliases=frozenset(column["aliases"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantDraft:
    """A tenant that is about to be created.

    ``target_status`` is its status once it is usable, ``copied_from`` the tenant that its contents are a copy of.
    """

    id: UUID
    slug: str
    tier: str
    server: str
    database: str
    role: str
    sealed_password: bytes = field(repr=False)
    target_status: Status = Status.ACTIVE
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    quotas: Mapping[str, Any] = field(default_factory=dict, repr=False)
    timezone: str = "UTC"
    region: str | None = None
    trial_ends_at: datetime | None = None
    copied_from: UUID | None = None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An unfinished creation or purge; ``step`` is the last one that was started."""

    tenant: Tenant
    kind: Literal["provisioning", "purging"]
    step: str | None


@dataclass(frozen=True, slots=True)
class TenantPage:
    """A page of tenants in order of creation; ``next`` is the id to continue after, None on the last page."""

    items: tuple[Tenant, ...]
    next: UUID | None
