"""What is dumped: a tenant's database by a login of its own, and the control database by its role."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..drift.catalogue import Catalogue, Key, read
from ..errors import ConfigurationError
from ..postgres import login
from ..postgres.connections import Connection
from ..postgres.dsn import Dsn
from ..provisioning.rights import event_trigger
from .dump import Scope

TENANT_SCOPE = Scope(left_out=(event_trigger.NAME,))
CONTROL_SCOPE = Scope(
    schemas=("tenancy",),
    # the identities that decrypt tenants' backups: destroying one must destroy it everywhere
    without_rows=("tenancy.backup_keys",),
    # its tables have it, and let their owner and the application's role read all rows
    row_security=True,
)

# what only an administrator can make, and what says who may do what: a restore has its own
_NOT_STRUCTURE = frozenset(
    {
        "privilege",
        "default privileges",
        "extension",
        "event trigger",
        "publication",
        "foreign server",
        "foreign table",
        "policy",
    }
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the manifest says of a tenant's schema."""

    fingerprint: str | None
    structure: str | None
    tenant_owned: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ControlSource:
    """The control database, by the role of ``control_url``."""

    dsn: Dsn

    def environment(self) -> dict[str, str]:
        """Return libpq's variables, the password included."""
        dsn = self.dsn.without_service()
        login.check(dsn, user=dsn.user, database=dsn.database)
        if dsn.user is None or dsn.database is None:
            raise ConfigurationError("control_url names no user or no database, which pg_dump needs")
        found = dsn.environment(user=dsn.user, database=dsn.database, purpose="tenancy-backup")
        return found if dsn.password is None else {**found, "PGPASSWORD": dsn.password}

    async def connect(
        self, *, timeout: float, settings: Mapping[str, str] = MappingProxyType({}), purpose: str = "tenancy-backup"
    ) -> Connection:
        """Open a connection."""
        return await login.connect(self.dsn, purpose=purpose, timeout=timeout, settings=settings)

    async def see_all_rows(self) -> None:
        """Do nothing: its policies let this role read all rows."""


async def facts_of(connection: Connection, *, owner: str, role: str | None) -> Facts:
    """Read the schema in the connection's snapshot."""
    found = await read(connection, owner=owner, role=role)
    return Facts(found.fingerprint, structure(found), found.tenant_owned)


def structure(catalogue: Catalogue) -> str:
    """Return a fingerprint of a schema without owners, privileges and what only an administrator can make."""
    lines = []
    for key, fields in catalogue.objects.items():
        if key.kind in _NOT_STRUCTURE or _is_left_out(key):
            continue
        kept: list[Any] = sorted((name, value) for name, value in fields.items() if name != "owner")
        lines.append(json.dumps([key.kind, key.parent, key.name, kept]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


def _is_left_out(key: Key) -> bool:
    """Whether an object is the guard's, which an administrator makes in every database, or one of other servers."""
    parent = key.parent or ""
    if parent.startswith(("foreign table ", "event trigger ")):
        return True
    name = key.name if key.parent is None else parent.partition(" ")[2]
    return name == event_trigger.NAME or name.startswith(f"{event_trigger.NAME}.")


__all__ = ["CONTROL_SCOPE", "TENANT_SCOPE", "ControlSource", "Facts", "facts_of", "structure"]
