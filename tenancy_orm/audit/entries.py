"""The entries of the log: the values, the query for them, and their INSERT."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, get_args
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..context import refuse_other_tenant
from .actor import SYSTEM, Actor, ActorKind, clean_text


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One entry of the log. ``before``, ``after`` and ``detail`` are JSON objects or None."""

    sequence: int
    occurred_at: datetime
    action: str
    tenant_id: UUID | None
    slug: str | None
    actor: Actor
    before: Mapping[str, Any] | None = field(repr=False)
    after: Mapping[str, Any] | None = field(repr=False)
    detail: Mapping[str, Any] | None = field(repr=False)
    database_role: str = field(repr=False)
    hash: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AuditSummary:
    """The number of entries of one action, by one kind of actor, on one day (UTC), and of tenants in them."""

    day: date
    action: str
    actor_kind: ActorKind
    entries: int
    tenants: int


_APPEND = text(
    "SELECT tenancy.audit_append(:action, CAST(:tenant_id AS uuid), :slug, :actor_kind, :actor_id, "
    "CAST(:before AS jsonb), CAST(:after AS jsonb), CAST(:detail AS jsonb), :request_id, :source)"
)

_COLUMNS = (
    "sequence, occurred_at, action, tenant_id, slug, actor_kind, actor_id, before, after, detail, request_id, "
    "source, database_role, hash"
)


async def insert_entry(
    connection: AsyncConnection,
    *,
    action: str,
    tenant_id: UUID | None = None,
    slug: str | None = None,
    actor: Actor = SYSTEM,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    detail: Mapping[str, Any] | None = None,
) -> int:
    """Append one entry to the chain and return its sequence number; see ``AuditLog.append``."""
    parameters = entry_parameters(
        action=action, tenant_id=tenant_id, slug=slug, actor=actor, before=before, after=after, detail=detail
    )
    return int(await connection.scalar(_APPEND, parameters))


def entry_parameters(
    *,
    action: str,
    tenant_id: UUID | None = None,
    slug: str | None = None,
    actor: Actor = SYSTEM,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    detail: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the arguments of ``tenancy.audit_append``, in order.

    Raises:
        TypeError, CrossTenantError: as ``AuditLog.append``.
    """
    if (named := tenant_id or slug) is not None:
        refuse_other_tenant(named)
    return {
        "action": action,
        "tenant_id": tenant_id,
        "slug": slug,
        "actor_kind": actor.kind,
        "actor_id": clean_text(actor.id),
        "before": _encode(before),
        "after": _encode(after),
        "detail": _encode(detail),
        "request_id": clean_text(actor.request_id),
        "source": clean_text(actor.source),
    }


def events_query(
    tenant: str | UUID | None,
    actor: Actor | str | None,
    action: str | Sequence[str] | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    after: int | AuditEvent | None,
) -> tuple[str, dict[str, Any]]:
    """Return the query for entries and its parameters; the arguments are those of ``AuditLog.events``."""
    conditions: list[str] = []
    parameters: dict[str, Any] = {"limit": limit}

    def where(condition: str, **values: Any) -> None:
        conditions.append(condition)
        parameters.update(values)

    if isinstance(tenant, UUID):
        where("tenant_id = :tenant_id", tenant_id=tenant)
    elif tenant is not None:
        where("slug = :slug", slug=tenant)
    if actor is not None:
        # all kinds where none is given, since the index begins with the kind
        kinds = [actor.kind] if isinstance(actor, Actor) else list(get_args(ActorKind))
        where("actor_kind = ANY(:actor_kinds)", actor_kinds=kinds)
    actor_id = actor.id if isinstance(actor, Actor) else actor
    if actor_id is not None:
        where("actor_id = :actor_id", actor_id=actor_id)
    if action is not None:
        actions = [action] if isinstance(action, str) else list(action)
        prefixes = [name for name in actions if name.endswith(".")]
        where(
            "(action = ANY(:actions) OR EXISTS (SELECT 1 FROM unnest(CAST(:prefixes AS text[])) AS p "
            "WHERE starts_with(action, p)))"
            if prefixes
            else "action = ANY(:actions)",
            actions=actions,
            **({"prefixes": prefixes} if prefixes else {}),
        )
    if since is not None:
        where("occurred_at >= :since", since=since)
    if until is not None:
        where("occurred_at < :until", until=until)
    if after is not None:
        where("sequence < :after", after=after.sequence if isinstance(after, AuditEvent) else after)
    filters = f"WHERE {' AND '.join(conditions)} " if conditions else ""
    query = f"SELECT {_COLUMNS} FROM tenancy.audit_log {filters}ORDER BY occurred_at DESC, sequence DESC LIMIT :limit"  # noqa: S608 - every part is a constant above, every value a parameter
    return query, parameters


def event_from_row(row: Any) -> AuditEvent:
    """Build the value object from a row of ``events_query``."""
    return AuditEvent(
        sequence=row.sequence,
        occurred_at=row.occurred_at,
        action=row.action,
        tenant_id=row.tenant_id,
        slug=row.slug,
        actor=Actor(row.actor_kind, row.actor_id, row.request_id, row.source),
        before=row.before,
        after=row.after,
        detail=row.detail,
        database_role=row.database_role,
        hash=row.hash,
    )


def _plain(value: Any) -> Any:
    """Return ``value`` with JSON types only, and with text that jsonb can store."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, str):
        return value.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_plain(item) for item in items]
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    # bytes in particular: they are likely a secret
    raise TypeError(f"the audit log takes JSON values, not {type(value).__name__}")


def _encode(value: Mapping[str, Any] | None) -> str | None:
    if value is None:
        return None
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)
