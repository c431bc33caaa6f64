"""A tenant as a value: its identity, its status, where its data is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, TypeAlias
from uuid import UUID

from .errors import TenantNotFoundError
from .protocols import Admission

_ID = re.compile(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def parse_id(text: str) -> UUID | None:
    """Return the id that a text is: as ``uuid.UUID`` writes one, or without hyphens. None where it is none.

    ``UUID`` itself also reads braces, ``urn:uuid:`` and hyphens anywhere. No slug and no domain looks like an id.
    """
    return UUID(text) if _ID.fullmatch(text) else None


class Status(StrEnum):
    """Where a tenant is in its life."""

    PROVISIONING = "provisioning"
    TRIAL = "trial"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    MAINTENANCE = "maintenance"
    DELETED = "deleted"
    PURGED = "purged"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tenant's data is: the server's name, its database and login role, and the sealed password.

    ``sealed_password`` is ciphertext (AES-GCM, see ``secrets.keyring``); it is left out of every ``repr``.
    """

    server: str
    database: str
    role: str
    sealed_password: bytes = field(repr=False)


def _frozen(value: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    return MappingProxyType(dict(value or {}))


_OF_THIS_PROCESS = frozenset({"admission", "revision_refusal"})


@dataclass(frozen=True, slots=True, eq=False)
class Tenant:
    """A tenant as it was when it was looked up. Two are equal when their ids are.

    Times are aware datetimes in UTC. ``metadata`` and ``quotas`` (overrides of the tier's limits) are read-only
    mappings of JSON values. ``migrating_to`` is the revision that a migration brings it to now ("base" for none), None
    where none has begun to change it. ``paused`` is whether its sessions wait now, since its database is exchanged for
    another one. ``suspend_at`` and ``purge_at`` are when it is to be suspended or purged.
    ``reason`` is what the operator gave for the suspension. ``aliases`` are its former slugs that still redirect and
    its verified domains. ``region`` is where its data has to stay, None for anywhere. ``operator`` is True where it was
    bound for an operator, who may use a tenant in maintenance; the middleware's ``operators`` decides that.
    ``revision_refusal`` is why this process does not serve its ``schema_revision``, None where it does. ``admission``
    is that of the request it was bound for, else None. These two are not pickled.
    """

    id: UUID
    slug: str
    status: Status
    tier: str
    placement: Placement | None = field(default=None, repr=False)
    schema_revision: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=_frozen, repr=False)
    quotas: Mapping[str, Any] = field(default_factory=_frozen, repr=False)
    reason: str | None = field(default=None, repr=False)
    created_at: datetime | None = field(default=None, repr=False)
    updated_at: datetime | None = field(default=None, repr=False)
    deleted_at: datetime | None = field(default=None, repr=False)
    trial_ends_at: datetime | None = field(default=None, repr=False)
    suspend_at: datetime | None = field(default=None, repr=False)
    purge_at: datetime | None = field(default=None, repr=False)
    timezone: str = field(default="UTC", repr=False)
    region: str | None = field(default=None, repr=False)
    aliases: frozenset[str] = field(default=frozenset(), repr=False)
    operator: bool = field(default=False, repr=False)
    migrating_to: str | None = field(default=None, repr=False)
    paused: bool = field(default=False, repr=False)
    revision_refusal: str | None = field(default=None, repr=False)
    admission: Admission | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        """Compare by id alone: a tenant that was renamed or suspended is the same tenant."""
        return isinstance(other, Tenant) and other.id == self.id

    def __hash__(self) -> int:
        """Hash by id, as ``__eq__`` compares."""
        return hash(self.id)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by field, since a mapping proxy cannot be pickled."""
        values = {name: getattr(self, name) for name in self.__slots__ if name not in _OF_THIS_PROCESS}
        values["metadata"] = dict(self.metadata)
        values["quotas"] = dict(self.quotas)
        return (_restore, (values,))


TenantRef: TypeAlias = str | UUID | Tenant
"""How a caller names a tenant: by slug, former slug or verified domain, by id, or as an older ``Tenant``."""


def placement_of(tenant: Tenant) -> Placement:
    """Return a tenant's placement.

    Raises:
        TenantNotFoundError: the tenant has been purged.
    """
    if tenant.placement is None:
        raise TenantNotFoundError(tenant.slug)
    return tenant.placement


def _restore(values: dict[str, Any]) -> Tenant:
    values["metadata"] = _frozen(values["metadata"])
    values["quotas"] = _frozen(values["quotas"])
    return Tenant(**values)
