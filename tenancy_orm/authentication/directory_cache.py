"""The directory's cache: keys and tenants, and those that do not exist. State without I/O, bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

from ..config import TenancyConfig
from ..errors import InvalidCredentialError
from ..keys.networks import is_in_networks
from ..tenant import Status, Tenant
from .admission import tenant_for_source
from .cache import SecondChance, put_bounded
from .credential import Credential

_NEGATIVE_SIZE = 10_000
_ADMITTED_SIZE = 64  # sources cached per key that is bound to networks


class KeyEntry:
    """A key with the right secret when it was looked up. ``refusal`` is the reason for refusing it all the same.

    Times are of the directory's clock and count from ``read_at``. Until ``good_until`` the entry answers without
    further checks, until ``fresh_until`` without a query, until ``stale_until`` if the control database does not
    answer, and never after ``expires``.
    """

    __slots__ = (
        "admitted",
        "credential",
        "expires",
        "fresh_until",
        "good_until",
        "placed_at",
        "refusal",
        "stale_until",
        "tenant_id",
        "use_queued",
        "used",
    )

    def __init__(
        self, credential: Credential, refusal: str | None, read_at: float, expires: float | None, config: TenancyConfig
    ) -> None:
        self.credential = credential
        self.tenant_id = credential.tenant.id
        self.refusal = refusal
        self.fresh_until = read_at + config.directory.ttl
        self.stale_until = self.fresh_until + config.directory.grace
        self.expires = float("inf") if expires is None else expires
        self.good_until = min(self.fresh_until, self.expires) if refusal is None else 0.0
        # of a key that is bound to networks: a credential for each source
        self.admitted: dict[str | None, Credential] | None = {} if credential.networks else None
        self.use_queued = False
        self.used = self.placed_at = read_at

    def admit(self, source: str | None, now: float) -> Credential:
        """Return the key's credential for ``source``.

        Raises:
            InvalidCredentialError: the key is refused, has expired, or may not be used from there.
        """
        credential = self.credential
        if self.refusal is not None:
            raise InvalidCredentialError(self.refusal, credential_id=credential.id)
        if now >= self.expires:
            raise InvalidCredentialError("expired", credential_id=credential.id)
        if self.admitted is None:
            return credential
        if source not in self.admitted:
            if not is_in_networks(source, credential.networks):
                raise InvalidCredentialError("network", credential_id=credential.id)
            if len(self.admitted) >= _ADMITTED_SIZE:
                self.admitted.clear()
            self.admitted[source] = replace(credential, bound=tenant_for_source(credential.tenant, source))
        return self.admitted[source]


class TenantEntry:
    """A tenant; times as in ``KeyEntry``."""

    __slots__ = ("fresh_until", "placed_at", "stale_until", "tenant", "used")

    def __init__(self, tenant: Tenant, read_at: float, config: TenancyConfig) -> None:
        self.tenant = tenant
        self.fresh_until = read_at + config.directory.ttl
        self.stale_until = self.fresh_until + config.directory.grace
        self.used = self.placed_at = read_at


class DirectoryCache:
    """Keys by fingerprint and tenants by id, with indexes to find the entries that a change concerns.

    Args:
        config: Sizes and times, see ``TenancyConfig``.
        clock: Seconds, monotonic.
    """

    def __init__(self, config: TenancyConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self.keys: SecondChance[bytes, KeyEntry] = SecondChance(config.directory.size, self._unlink_key)
        self.tenants: SecondChance[UUID, TenantEntry] = SecondChance(config.directory.size, self._unlink_tenant)
        # Fingerprints of keys that were valid when they were last looked up; invalidations do not remove them. Nothing
        # is admitted by them: they only exempt a key from the lock-out of its source.
        self.proven: OrderedDict[bytes, None] = OrderedDict()
        self._by_key_id: dict[str, bytes] = {}
        self._by_tenant: dict[UUID, set[bytes]] = {}
        self._by_name: dict[str, UUID] = {}
        self._unknown_keys: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        self._unknown_tenants: OrderedDict[UUID | str, float] = OrderedDict()

    @property
    def negative(self) -> int:
        """How many keys and tenants are cached as unknown."""
        return len(self._unknown_keys) + len(self._unknown_tenants)

    # --- keys -------------------------------------------------------------------------------------------------------

    def store_key(self, digest: bytes, entry: KeyEntry, tenant: Tenant) -> None:
        """Store a key, and with it its ``tenant``, which answers look-ups by name and so has no admission."""
        self.invalidate_key(digest)
        self._unknown_keys.pop(digest, None)
        self.keys.put(digest, entry)
        self._by_key_id[entry.credential.id] = digest
        self._by_tenant.setdefault(entry.tenant_id, set()).add(digest)
        self.store_tenant(tenant, entry.placed_at)

    def invalidate_key(self, digest: bytes) -> None:
        """Forget a key by its fingerprint."""
        entry = self.keys.entries.pop(digest, None)
        if entry is not None:
            self._unlink_key(digest, entry)

    def invalidate_key_id(self, key_id: str) -> None:
        """Forget a key by its public id."""
        digest = self._by_key_id.get(key_id)
        if digest is not None:
            self.invalidate_key(digest)

    def store_unknown_key(self, digest: bytes, reason: str) -> None:
        """Store for ``negative_ttl`` seconds that there is no such key."""
        put_bounded(
            self._unknown_keys, digest, (self._clock() + self._config.directory.negative_ttl, reason), _NEGATIVE_SIZE
        )

    def unknown_key_reason(self, digest: bytes, now: float) -> str | None:
        """Return why a key is refused without a look-up; None where a look-up is needed."""
        unknown = self._unknown_keys.get(digest)
        return unknown[1] if unknown is not None and now < unknown[0] else None

    def record_proven(self, digest: bytes, works: bool) -> None:
        """Store whether a key was valid when it was last looked up."""
        if works:
            put_bounded(self.proven, digest, None, self._config.directory.size)
        else:
            self.proven.pop(digest, None)

    def _unlink_key(self, digest: bytes, entry: KeyEntry) -> None:
        self._by_key_id.pop(entry.credential.id, None)
        siblings = self._by_tenant.get(entry.tenant_id)
        if siblings is not None:
            siblings.discard(digest)
            if not siblings:
                del self._by_tenant[entry.tenant_id]

    # --- tenants ----------------------------------------------------------------------------------------------------

    def tenant_entry(self, wanted: UUID | str) -> TenantEntry | None:
        """Return the entry of the tenant with this id or name."""
        tenant_id = self._by_name.get(wanted) if isinstance(wanted, str) else wanted
        return None if tenant_id is None else self.tenants.entries.get(tenant_id)

    def store_tenant(self, tenant: Tenant, read_at: float) -> None:
        """Store a tenant under its id and its names; a purged one has no names."""
        self._drop_tenant(tenant.id)
        if tenant.status is Status.PURGED:
            return
        self.tenants.put(tenant.id, TenantEntry(tenant, read_at, self._config))
        for name in (tenant.slug, *tenant.aliases):
            self._by_name[name] = tenant.id

    def invalidate_name(self, wanted: UUID | str) -> None:
        """Remove the tenant with this id or name, but not its keys."""
        entry = self.tenant_entry(wanted)
        if entry is not None:
            self._drop_tenant(entry.tenant.id)

    def invalidate_tenant(self, tenant_id: UUID) -> None:
        """Remove a tenant, its keys, and all names stored as unknown: any of them may be the tenant's from now on."""
        self._unknown_tenants.clear()
        self._drop_tenant(tenant_id)
        for digest in tuple(self._by_tenant.get(tenant_id, ())):
            self.invalidate_key(digest)

    def store_unknown_tenant(self, wanted: UUID | str) -> None:
        """Store for ``negative_ttl`` seconds that there is no such tenant."""
        put_bounded(self._unknown_tenants, wanted, self._clock() + self._config.directory.negative_ttl, _NEGATIVE_SIZE)

    def is_unknown_tenant(self, wanted: UUID | str) -> bool:
        """Whether it is stored that there is no such tenant."""
        return self._clock() < self._unknown_tenants.get(wanted, 0.0)

    def _drop_tenant(self, tenant_id: UUID) -> None:
        entry = self.tenants.entries.pop(tenant_id, None)
        if entry is not None:
            self._unlink_tenant(tenant_id, entry)

    def _unlink_tenant(self, tenant_id: UUID, entry: TenantEntry) -> None:
        for name in (entry.tenant.slug, *entry.tenant.aliases):
            # a former name may belong to another tenant now
            if self._by_name.get(name) == tenant_id:
                del self._by_name[name]

    # --- all of it --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Remove everything, except which keys have been valid."""
        stores: tuple[OrderedDict[Any, Any], ...] = (
            self.keys.entries,
            self.tenants.entries,
            self._unknown_keys,
            self._unknown_tenants,
        )
        for store in stores:
            store.clear()
        for index in (self._by_key_id, self._by_tenant, self._by_name):
            index.clear()

    def mark_stale(self) -> None:
        """Mark every entry as stale: it is looked up again before use, but kept for an outage."""
        for key in self.keys.entries.values():
            key.fresh_until = key.good_until = 0.0
        for tenant in self.tenants.entries.values():
            tenant.fresh_until = 0.0
        self._unknown_keys.clear()
        self._unknown_tenants.clear()
