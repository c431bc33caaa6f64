"""API keys: issue, rotate, revoke and list them. Their format is in ``keys.format``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import and_, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor, clean_text
from ..audit.log import AuditLog
from ..config import TenancyConfig
from ..context import refuse_other_tenant
from ..control.database import ControlDatabase
from ..control.models import api_keys, tenants
from ..errors import ApiKeyInactiveError, ApiKeyNotFoundError, ConfigurationError
from ..events import EventBus, KeyIssued, KeyRevoked
from ..keys.format import ID_LENGTH, KeyDigester, generate_key
from ..keys.networks import Network
from ..keys.rows import KEY_COLUMNS, ApiKeyInfo, insert_key, key_from_row
from ..registry.lifecycle import lock_tenant_for_share
from ..tenant import Tenant

if TYPE_CHECKING:
    from .directory import Directory

_KEY_ID = re.compile(rf"[0-9A-Za-z]{{{ID_LENGTH}}}")
_LONGEST_OVERLAP = timedelta(days=3_660)

# The lifetime that a key was issued with. After a rotation the old key's expires_at is the end of the overlap; its
# successors inherited the lifetime.
_LIFE = text(
    """
    WITH RECURSIVE line AS (
        SELECT id, created_at, expires_at, 0 AS generation FROM tenancy.api_keys WHERE id = :id
        UNION ALL
        SELECT next.id, next.created_at, next.expires_at, line.generation + 1
        FROM line CROSS JOIN LATERAL (
            SELECT k.id, k.created_at, k.expires_at FROM tenancy.api_keys k
            WHERE k.tenant_id = :tenant_id AND k.rotated_from = line.id ORDER BY k.created_at DESC LIMIT 1
        ) next
    )
    SELECT expires_at - created_at FROM line ORDER BY generation DESC LIMIT 1
    """
)


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key that was just issued. ``text`` is the key itself, available here only."""

    text: str = field(repr=False)
    info: ApiKeyInfo

    @property
    def key_id(self) -> str:
        """The public id, used to list, rotate and revoke the key."""
        return self.info.key_id

    def __str__(self) -> str:
        """Name the key by its id; use ``text`` to show it."""
        return f"API key {self.key_id}"


class KeyManager:
    """Issues, rotates, revokes and lists API keys; ``tenancy.keys``.

    Every change is audited in the same transaction, under ``actor``, and reaches every process through PostgreSQL's
    NOTIFY. A ``tenant`` is a slug, an id or a ``Tenant``.
    """

    def __init__(
        self,
        control: ControlDatabase,
        config: TenancyConfig,
        directory: Directory,
        audit: AuditLog,
        events: EventBus,
    ) -> None:
        self._control = control
        self._config = config
        self._directory = directory
        self._audit = audit
        self._events = events
        self._digester = KeyDigester(config.keys.decoded_peppers, config.keys.pepper_current)

    async def issue(
        self,
        tenant: str | UUID | Tenant,
        *,
        name: str = "",
        scopes: Sequence[str] = (),
        expires_at: datetime | None = None,
        networks: Sequence[str | Network] = (),
        prefix: str | None = None,
        actor: Actor = SYSTEM,
    ) -> IssuedKey:
        """Issue a key. A tenant can have any number of them.

        Args:
            tenant: The tenant that gets the key.
            name: What people call it.
            scopes: What it may do, in the words of the application's routes; ``*`` is everything.
            expires_at: When it expires, an aware datetime; never where None.
            networks: The networks it may be used from, in CIDR notation; any where empty.
            prefix: One of the configured prefixes; ``TenancyConfig.keys.prefix`` where None.
            actor: Who does this, for the audit log.

        Raises:
            TenantNotFoundError: no such tenant.
            ConfigurationError: an argument is malformed.
            ControlUnavailableError: the control database does not answer.
        """
        owner = await self._directory.tenant(tenant)
        key = generate_key(self._check_prefix(prefix), self._digester)
        _check_expiry(expires_at)
        async with self._control.transaction() as connection:
            slug, _ = await lock_tenant_for_share(connection, owner.id)
            info = await insert_key(
                connection, owner.id, key, name=name, scopes=scopes, expires_at=expires_at, networks=networks
            )
            await self._audit.append(
                connection, action="key.issue", tenant_id=owner.id, slug=slug, actor=actor, after=_snapshot(info)
            )
        self._events.emit(KeyIssued(tenant_id=owner.id, slug=slug, key_id=key.key_id))
        return IssuedKey(key.text, info)

    async def rotate(
        self,
        key_id: str,
        *,
        overlap: timedelta | float = timedelta(days=1),
        expires_at: datetime | None = None,
        actor: Actor = SYSTEM,
    ) -> IssuedKey:
        """Replace a key by a new one of the same name, scopes and networks; both work until the overlap ends.

        Args:
            key_id: The key to replace.
            overlap: How long the old key keeps working: a timedelta or seconds, at most ten years; 0 ends it now.
            expires_at: When the new key expires. Where None and the old key was issued with an expiry, the new key gets
                the same lifetime.
            actor: Who does this, for the audit log.

        Raises:
            ApiKeyNotFoundError: no such key.
            CrossTenantError: it is another tenant's than the bound one.
            ApiKeyInactiveError: it is already revoked, expired or rotated.
            ConfigurationError: an argument is malformed.
        """
        window = _check_overlap(overlap)
        _check_expiry(expires_at)
        _check_id(key_id)
        async with self._control.transaction() as connection:
            # the tenant first, as purge does: no key may survive a purge that runs at the same time
            tenant_id = await connection.scalar(select(api_keys.c.tenant_id).where(api_keys.c.id == key_id))
            if tenant_id is None:
                raise ApiKeyNotFoundError(key_id)
            refuse_other_tenant(tenant_id)
            await lock_tenant_for_share(connection, tenant_id)
            old, slug = await self._locked(connection, key_id)
            await _check_rotatable(connection, old)
            if expires_at is None:
                life = await connection.scalar(_LIFE, {"id": key_id, "tenant_id": tenant_id})
                expires_at = None if life is None else datetime.now(UTC) + life
            key = generate_key(old.prefix or self._config.keys.prefix, self._digester)
            info = await insert_key(
                connection,
                old.tenant_id,
                key,
                name=old.name,
                scopes=old.scopes,
                networks=old.networks,
                expires_at=expires_at,
                rotated_from=old.key_id,
            )
            end = func.least(api_keys.c.expires_at, func.now() + window)
            ending = await self._change(connection, key_id, expires_at=end)
            await self._audit.append(
                connection,
                action="key.rotate",
                tenant_id=tenant_id,
                slug=slug,
                actor=actor,
                before=_snapshot(ending),
                after=_snapshot(info),
            )
        self._directory.invalidate(key_id=key_id)
        self._events.emit(KeyIssued(tenant_id=info.tenant_id, slug=slug, key_id=info.key_id, rotated_from=key_id))
        return IssuedKey(key.text, info)

    async def revoke(self, key_id: str, reason: str | None = None, *, actor: Actor = SYSTEM) -> ApiKeyInfo:
        """Revoke a key: every process refuses it from now on. Revoking a revoked key changes nothing.

        Args:
            key_id: The key.
            reason: Why, for operators; the first 256 characters are kept.
            actor: Who does this, for the audit log.

        Raises:
            ApiKeyNotFoundError: no such key.
            CrossTenantError: it is another tenant's than the bound one.
        """
        _check_id(key_id)
        async with self._control.transaction() as connection:
            before, slug = await self._locked(connection, key_id)
            refuse_other_tenant(before.tenant_id)
            if before.revoked_at is not None:
                return before
            info = await self._change(connection, key_id, revoked_at=func.now(), revoked_reason=clean_text(reason))
            await self._audit.append(
                connection,
                action="key.revoke",
                tenant_id=info.tenant_id,
                slug=slug,
                actor=actor,
                before=_snapshot(before),
                after=_snapshot(info),
            )
        self._directory.invalidate(key_id=key_id)
        self._events.emit(KeyRevoked(tenant_id=info.tenant_id, slug=slug, key_id=key_id))
        return info

    async def get(self, key_id: str) -> ApiKeyInfo:
        """Return one key, without its secret.

        Raises:
            ApiKeyNotFoundError: no such key.
            CrossTenantError: it is another tenant's than the bound one.
        """
        _check_id(key_id)
        async with self._control.connect() as connection:
            row = (await connection.execute(select(*KEY_COLUMNS).where(api_keys.c.id == key_id))).one_or_none()
        if row is None:
            raise ApiKeyNotFoundError(key_id)
        refuse_other_tenant(row.tenant_id)
        return key_from_row(row)

    async def list(self, tenant: str | UUID | Tenant) -> list[ApiKeyInfo]:
        """Return all keys of a tenant, oldest first, revoked and expired ones included.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        owner = await self._directory.tenant(tenant)
        query = (
            select(*KEY_COLUMNS).where(api_keys.c.tenant_id == owner.id).order_by(api_keys.c.created_at, api_keys.c.id)
        )
        async with self._control.viewing(owner.id) as connection:
            return [key_from_row(row) for row in await connection.execute(query)]

    # --- internals --------------------------------------------------------------------------------------------------

    def _check_prefix(self, prefix: str | None) -> str:
        if prefix is None:
            return self._config.keys.prefix
        if prefix not in (self._config.keys.prefix, *self._config.keys.prefixes):
            raise ConfigurationError(f"prefix {prefix!r} is neither keys.prefix nor among keys.prefixes")
        return prefix

    async def _locked(self, connection: AsyncConnection, key_id: str) -> tuple[ApiKeyInfo, str]:
        query = (
            select(*KEY_COLUMNS, tenants.c.slug)
            .join(tenants, tenants.c.id == api_keys.c.tenant_id)
            .where(api_keys.c.id == key_id)
            .with_for_update(of=api_keys)
        )
        row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise ApiKeyNotFoundError(key_id)
        return key_from_row(row), row.slug

    async def _change(self, connection: AsyncConnection, key_id: str, **values: Any) -> ApiKeyInfo:
        statement = update(api_keys).where(api_keys.c.id == key_id).values(**values).returning(*KEY_COLUMNS)
        return key_from_row((await connection.execute(statement)).one())


def _snapshot(key: ApiKeyInfo) -> dict[str, Any]:
    """Return a key's fields for the audit log, without its secret."""
    return {
        "key_id": key.key_id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "networks": [str(network) for network in key.networks],
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "revoked_reason": key.revoked_reason,
        "rotated_from": key.rotated_from,
    }


def _check_id(key_id: str) -> None:
    """Refuse what cannot be a key's id; PostgreSQL would not accept some of it as text."""
    if not _KEY_ID.fullmatch(key_id):
        raise ApiKeyNotFoundError(key_id)


def _check_overlap(overlap: timedelta | float) -> timedelta:
    try:
        window = overlap if isinstance(overlap, timedelta) else timedelta(seconds=overlap)
    except (OverflowError, ValueError):  # infinite, too large, not a number
        window = None
    if window is None or not timedelta(0) <= window <= _LONGEST_OVERLAP:
        raise ConfigurationError(f"overlap must be from 0 to {_LONGEST_OVERLAP.days} days")
    return window


def _check_expiry(moment: datetime | None) -> None:
    if moment is None:
        return
    if moment.tzinfo is None:
        raise ConfigurationError("expires_at must be an aware datetime, such as datetime.now(UTC)")
    if moment <= datetime.now(UTC):
        raise ConfigurationError("expires_at is in the past")


async def _check_rotatable(connection: AsyncConnection, key: ApiKeyInfo) -> None:
    if key.state != "active":
        raise ApiKeyInactiveError(key.key_id, key.state)
    successor = select(api_keys.c.id).where(
        and_(
            api_keys.c.tenant_id == key.tenant_id,
            api_keys.c.rotated_from == key.key_id,
            api_keys.c.revoked_at.is_(None),
        )
    )
    if (await connection.execute(successor.limit(1))).first() is not None:
        raise ApiKeyInactiveError(key.key_id, "rotated")


__all__ = ["IssuedKey", "KeyManager"]
