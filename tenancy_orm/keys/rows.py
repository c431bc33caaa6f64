"""Rows of API keys as values, and their INSERT."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import ARRAY, Row, Text, cast, insert, literal
from sqlalchemy.dialects.postgresql import CIDR
from sqlalchemy.ext.asyncio import AsyncConnection

from ..config.values import SCOPE
from ..control.models import api_keys
from ..errors import ConfigurationError
from .format import NewKey
from .networks import Network, parse_networks

_MAX_SCOPES = 100
_MAX_NETWORKS = 100
_NAME_LENGTH = 200

KeyState = Literal["active", "expired", "revoked"]


@dataclass(frozen=True, slots=True)
class ApiKeyInfo:
    """A key without its secret, which is not stored anywhere. Times are aware datetimes in UTC.

    ``last_used_at`` lags by up to ``TenancyConfig.keys.usage_interval``.
    """

    key_id: str
    tenant_id: UUID
    prefix: str
    name: str
    scopes: frozenset[str]
    networks: tuple[Network, ...]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    revoked_reason: str | None = None
    last_used_at: datetime | None = None
    rotated_from: str | None = None

    @property
    def state(self) -> KeyState:
        """The key's state now: "active", "expired" or "revoked"."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= datetime.now(UTC):
            return "expired"
        return "active"


NETWORKS = cast(api_keys.c.networks, ARRAY(Text)).label("networks")
"""A key's networks as ``text[]``, a type that asyncpg knows: on each connection it would ask the server for ``cidr[]``,
which takes 10 ms, of the first request of a process for example."""

KEY_COLUMNS = (
    api_keys.c.id,
    api_keys.c.tenant_id,
    api_keys.c.prefix,
    api_keys.c.name,
    api_keys.c.scopes,
    NETWORKS,
    api_keys.c.created_at,
    api_keys.c.expires_at,
    api_keys.c.revoked_at,
    api_keys.c.revoked_reason,
    api_keys.c.last_used_at,
    api_keys.c.rotated_from,
)


def key_from_row(row: Row[*tuple[Any, ...]]) -> ApiKeyInfo:
    """Build the value object from a row of ``KEY_COLUMNS``."""
    return ApiKeyInfo(
        key_id=row.id,
        tenant_id=row.tenant_id,
        prefix=row.prefix,
        name=row.name,
        scopes=frozenset(row.scopes),
        networks=parse_networks(row.networks),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        revoked_reason=row.revoked_reason,
        last_used_at=row.last_used_at,
        rotated_from=row.rotated_from,
    )


def check_scopes(scopes: Iterable[str]) -> list[str]:
    """Return the scopes, sorted and without duplicates.

    Raises:
        ConfigurationError: one is malformed, or there are too many.
    """
    if isinstance(scopes, str):
        raise ConfigurationError("scopes must be a sequence of scopes, not one string")
    found = sorted(set(scopes))
    if len(found) > _MAX_SCOPES:
        raise ConfigurationError(f"a key has at most {_MAX_SCOPES} scopes, not {len(found)}")
    for scope in found:
        if not SCOPE.fullmatch(scope):
            raise ConfigurationError(
                f"scope {scope!r} must be *, or 1 to 64 letters, digits and . _ : / - that begin with a letter or digit"
            )
    return found


async def insert_key(
    connection: AsyncConnection,
    tenant_id: UUID,
    key: NewKey,
    *,
    name: str = "",
    scopes: Iterable[str] = (),
    expires_at: datetime | None = None,
    networks: Iterable[str | Network] = (),
    rotated_from: str | None = None,
) -> ApiKeyInfo:
    """Insert the row of a new key in the caller's transaction; the caller writes the audit entry.

    Raises:
        ConfigurationError: an argument is malformed.
    """
    values = key_values(
        tenant_id, key, name=name, scopes=scopes, expires_at=expires_at, networks=networks, rotated_from=rotated_from
    )
    values["networks"] = cast(literal(values["networks"], ARRAY(Text)), ARRAY(CIDR))
    row = (await connection.execute(insert(api_keys).values(values).returning(*KEY_COLUMNS))).one()
    return key_from_row(row)


def key_values(
    tenant_id: UUID,
    key: NewKey,
    *,
    name: str = "",
    scopes: Iterable[str] = (),
    expires_at: datetime | None = None,
    networks: Iterable[str | Network] = (),
    rotated_from: str | None = None,
) -> dict[str, Any]:
    """Return the columns of a new key's row.

    Raises:
        ConfigurationError: an argument is malformed.
    """
    allowed = parse_networks(networks)
    if len(allowed) > _MAX_NETWORKS:
        raise ConfigurationError(f"a key has at most {_MAX_NETWORKS} networks, not {len(allowed)}")
    if len(name) > _NAME_LENGTH or not name.isprintable():
        raise ConfigurationError(f"the name of a key must be at most {_NAME_LENGTH} printable characters")
    return {
        "id": key.key_id,
        "tenant_id": tenant_id,
        "prefix": key.prefix,
        "name": name,
        "digest": key.digest,
        "digest_version": key.digest_version,
        "scopes": check_scopes(scopes),
        "networks": [str(network) for network in allowed],
        "expires_at": expires_at,
        "rotated_from": rotated_from,
    }
