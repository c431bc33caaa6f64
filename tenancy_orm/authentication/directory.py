"""The directory: which tenant a key belongs to, and what is known of a tenant, without a query on the hot path.

What was looked up is remembered for ``directory_ttl`` seconds at most, and forgotten at once when PostgreSQL notifies a
change. Once that time is over it is looked up again; where the control database does not answer, what was known keeps
working for ``grace`` seconds more, and nothing else is let in. Keys are remembered under a salted hash, never as text.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
from sqlalchemy import ARRAY, Executable, Row, Text, Uuid, any_, bindparam, func, select, union_all
from sqlalchemy.exc import SQLAlchemyError

from ..audit.log import AuditLog
from ..config import TenancyConfig, plain_url
from ..context import _current, as_reference, refuse_other_tenant, refuse_while_bound
from ..control.database import ControlDatabase
from ..control.lookup import NAME_LENGTH, check_name
from ..control.models import api_keys, domains, former_slugs, tenants
from ..control.notifications import Change, Listener
from ..errors import (
    ControlUnavailableError,
    InvalidApiKeyError,
    TenantNotFoundError,
    TooManyAttemptsError,
)
from ..events import (
    CrossTenantRequest,
    DirectoryMissed,
    DirectoryUnavailable,
    EventBus,
    IntrusionSuspected,
    KeyLockedOut,
    KeyRejected,
)
from ..keys.format import MAX_KEY_LENGTH, KeyDigester, ParsedKey, parse_key
from ..keys.networks import is_admitted, parse_networks, source_group
from ..registry.rows import TENANT_COLUMNS, tenant_from_row
from ..tenant import Status, Tenant
from .admission import Standing, for_source
from .admissions import Admissions
from .batch import Batch
from .cache import SecondChance
from .credential import _EVERYTHING, Credential
from .journal import KeyJournal
from .throttle import Attempts, Throttle

logger = logging.getLogger("tenancy_orm.directory")

_NEGATIVE_SIZE = 10_000
T = TypeVar("T")

_ADMITTED_SIZE = 64  # sources remembered per key that is bound to networks
_POOL_SIZE = 2
_PROBE_SECONDS = 1.0
_LOCKED_DELAY = 1.0  # how long at most the refusal of a locked key id is held back
_MAX_DELAYED = 256  # refusals held back at one time
_INTRUSION_NAMES = frozenset({3, 6, 12, 24, 48, 96})  # other tenants that one key names: told at these numbers
_INTRUSION_WINDOW = 3_600.0
_INTRUSION_KEYS = 1_000
_INTRUSION_REMEMBERED = 100

_INACTIVE = frozenset({Status.DELETED, Status.PURGED})


class _KeyEntry:
    """A key whose secret was right when it was looked up; ``refusal`` says why it does not work nevertheless.

    Times are of the directory's clock, and count from when the control database was ``asked``: until ``good_until`` it
    is answered without a further look, until ``fresh_until`` without a query, until ``stale_until`` if the control
    database is away; never after ``expires``.
    """

    __slots__ = (
        "admitted",
        "credential",
        "expires",
        "fresh_until",
        "good_until",
        "noted",
        "placed",
        "refusal",
        "stale_until",
        "used",
    )

    def __init__(self, credential: Credential, refusal: str | None, asked: float, config: TenancyConfig) -> None:
        self.credential = credential
        self.refusal = refusal
        self.fresh_until = asked + config.directory_ttl
        self.stale_until = self.fresh_until + config.grace
        self.expires = float("inf")
        self.good_until = 0.0
        # of a key that is bound to networks: a credential for each source
        self.admitted: dict[str | None, Credential] | None = {} if credential.networks else None
        self.noted = False
        self.used = self.placed = asked


class _TenantEntry:
    """A tenant; times as in ``_KeyEntry``."""

    __slots__ = ("fresh_until", "placed", "stale_until", "tenant", "used")

    def __init__(self, tenant: Tenant, asked: float, config: TenancyConfig) -> None:
        self.tenant = tenant
        self.fresh_until = asked + config.directory_ttl
        self.stale_until = self.fresh_until + config.grace
        self.used = self.placed = asked


@dataclass(frozen=True, slots=True)
class DirectoryStatistics:
    """How full the directory is. ``listening`` tells whether invalidations arrive now."""

    keys: int
    tenants: int
    negative: int
    locked: int
    listening: bool
    control_available: bool


class Directory:
    """Looks up keys and tenants; ``tenancy.directory``.

    Args:
        control: The control database.
        config: Sizes and times, see ``TenancyConfig``.
        events: Where refusals, lock-outs and the listener's loss are reported.
        audit: Where refused keys and cross-tenant requests are recorded, gathered and in the background.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        control: ControlDatabase,
        config: TenancyConfig,
        events: EventBus,
        *,
        audit: AuditLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # connections of its own: provisioning must not make look-ups wait for one
        self._control = ControlDatabase(
            control.listen_dsn, pool_size=_POOL_SIZE, connect_timeout=config.directory_timeout
        )
        self._config = config
        self._events = events
        self._clock = clock
        self._home = control.home
        self._salt = os.urandom(32)
        self._digester = KeyDigester(config.peppers, config.key_pepper_current)
        self._prefixes = frozenset((config.key_prefix, *config.key_prefixes))
        self._callbacks: list[Callable[[UUID | None], None]] = []
        self._keys: SecondChance[bytes, _KeyEntry] = SecondChance(config.directory_size, self._unlink_key)
        self._tenants: SecondChance[UUID, _TenantEntry] = SecondChance(config.directory_size, self._unlink_tenant)
        # bound here: peek reads nothing through more than one attribute
        self._find = self._keys.entries.get
        self._by_key_id: dict[str, bytes] = {}
        self._by_tenant: dict[UUID, set[bytes]] = {}
        self._by_name: dict[str, UUID] = {}
        self._unknown_keys: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        self._unknown_tenants: OrderedDict[UUID | str, float] = OrderedDict()
        timeout = config.directory_timeout
        # each with the time when it was asked for
        self._key_batch: Batch[str, tuple[Row[Any], float]] = Batch(self._load_keys, timeout=timeout)
        self._tenant_batch: Batch[UUID | str, tuple[Tenant, float]] = Batch(self._load_tenants, timeout=timeout)
        # fingerprints of keys that worked when they were last looked up. Nothing is admitted by it, and invalidations
        # leave it as it is: it tells whom the lock-out of a source must not keep from being looked up
        self._proven: OrderedDict[bytes, None] = OrderedDict()
        self._sources = Throttle(limit=config.lockout_failures, window=config.lockout_seconds)
        self._attempts = Attempts(self._sources, patience=2 * timeout, clock=clock)
        self._key_ids = Throttle(limit=config.lockout_failures, window=config.lockout_seconds)
        self._delayed = 0
        self._named: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._journal = KeyJournal(control, audit, self._digester, interval=config.key_usage_interval, clock=clock)
        listen_dsn = control.listen_dsn
        if config.listen_url is not None:
            listen_dsn = plain_url(config.listen_url).render_as_string(hide_password=False)
        self._listener = Listener(listen_dsn, on_change=self._changed, on_connected=self.revalidate, events=events)
        self.admissions = Admissions(
            self._standing_of,
            hears=lambda: self._listener.connected,
            ttl=config.directory_ttl,
            grace=config.grace,
            clock=clock,
        )
        self._probe: asyncio.Task[None] | None = None  # set while the control database is away
        self._closed = False

    async def open(self) -> None:
        """Begin to listen for invalidations and to write down what is used."""
        self._journal.open()
        self.admissions.open()
        await self._listener.open()

    async def close(self) -> None:
        """Stop listening, and write down what was used last."""
        # first: the look-ups that closing ends must not be taken for the control database's absence
        self._closed = True
        await self._listener.close()
        await self.admissions.close()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        await self._key_batch.close()
        await self._tenant_batch.close()
        await self._journal.close()
        await self._control.close()

    async def flush(self) -> None:
        """Write down now what is otherwise written every ``key_usage_interval``.

        Raises:
            ControlUnavailableError: the control database does not answer; it is kept for the next time.
        """
        refuse_while_bound("writing down the use of all keys")
        self._home.check()
        await self._journal.flush()

    @property
    def statistics(self) -> DirectoryStatistics:
        """How full it is, and whether it hears from the control database."""
        return DirectoryStatistics(
            keys=len(self._keys),
            tenants=len(self._tenants),
            negative=len(self._unknown_keys) + len(self._unknown_tenants),
            locked=len(self._sources) + len(self._key_ids),
            listening=self._listener.connected,
            control_available=self._probe is None,
        )

    # --- keys -------------------------------------------------------------------------------------------------------

    def peek(self, key: str, source: str | None = None) -> Credential | None:
        """Return what ``key`` stands for if that is known and fresh; None means: ask ``authenticate``.

        One hash and one dictionary look-up; no I/O.

        Args:
            key: The key's text.
            source: The peer's address; a key that is bound to networks is answered for an address alone.
        """
        if len(key) > MAX_KEY_LENGTH:
            return None
        if get_ident() != self._home.thread:
            self._home.check()
        entry = self._find(hashlib.blake2b(self._salt + key.encode("utf-8", "surrogatepass")).digest())
        if entry is None:
            return None
        now = self._clock()
        if now >= entry.good_until:
            return None
        credential = entry.credential if entry.admitted is None else entry.admitted.get(source)
        if credential is None:
            return None
        if (bound := _current.get()) is not None and bound.id != entry.credential.tenant.id:
            return None
        entry.used = now
        if not entry.noted:
            self._journal.note_use(entry)
        return credential

    async def authenticate(self, key: str, *, source: str | None = None) -> Credential:
        """Return what ``key`` stands for.

        The tenant's status is the caller's to check, except that a deleted tenant's keys are refused here.

        Args:
            key: The key's text.
            source: The peer's address, for networks and lock-out.

        Raises:
            InvalidApiKeyError: malformed, unknown, revoked, expired, or used from elsewhere; never told apart.
            TooManyAttemptsError: ``source`` presented too many invalid keys, and has not used this one before.
            ControlUnavailableError: the key is not known, and the control database does not answer.
            CrossTenantError: it is another tenant's than the bound one.
        """
        self._home.check()
        found = self.peek(key, source)
        if found is not None:
            return found
        entry: _KeyEntry | None = None
        try:
            entry = await self._entry(key, source)
            credential = self._admit(entry, source)
            refuse_other_tenant(credential.tenant)
            return credential
        except InvalidApiKeyError as exc:
            await self._refused(exc, source, entry.credential.tenant if entry else None)
            raise

    async def _entry(self, key: str, source: str | None) -> _KeyEntry:
        """The entry of a key whose secret is right; from memory where that is fresh."""
        digest = self._fingerprint(key)
        now = self._clock()
        entry = self._find(digest)
        if entry is not None:
            entry.used = now
            if now < entry.fresh_until:
                return entry
            return await self._look_up_again(digest, ParsedKey(entry.credential.prefix, entry.credential.key_id, key))
        # keys that worked pass the lock-out: an attacker behind the same proxy must not shut their owners out
        group = None if source is None or digest in self._proven else source_group(source)
        if group is not None and (pause := self._sources.pause(group, now)):
            raise TooManyAttemptsError(pause)
        parsed = parse_key(key, self._prefixes)
        unknown = self._unknown_keys.get(digest)
        if unknown is not None and now < unknown[0]:
            raise InvalidApiKeyError(unknown[1], key_id=parsed.key_id)
        if group is None:
            return await self._look_up(digest, parsed)
        await self._attempts.begin(group, digest)
        try:
            return await self._look_up(digest, parsed)
        finally:
            # nothing awaits from here until a failure is counted
            self._attempts.end(group, digest)

    async def _look_up_again(self, digest: bytes, parsed: ParsedKey) -> _KeyEntry:
        try:
            return await self._look_up(digest, parsed)
        except ControlUnavailableError:
            # found anew: it may have been invalidated while we waited
            entry = self._find(digest)
            if entry is None or self._clock() >= entry.stale_until:
                raise
            return entry

    async def _look_up(self, digest: bytes, parsed: ParsedKey) -> _KeyEntry:
        if self._probe is not None:
            raise ControlUnavailableError("the control database is not available")
        found, touched = await self._guarded(self._key_batch.get(parsed.key_id))
        row, asked = found or (None, 0.0)
        matches = self._digester.matches(parsed.text, row and row.digest, row and row.digest_version)
        if row is None or not matches:
            reason = "unknown" if row is None else "secret"
            if row is not None and not self._digester.knows(row.digest_version):
                reason = "pepper"
                logger.error(
                    "key %s has a digest of version %r, which key_peppers lacks", row.key_id, row.digest_version
                )
            self._forget_key(digest)
            self._proven.pop(digest, None)
            if touched.isdisjoint((_EVERYTHING, parsed.key_id)):
                self._remember(self._unknown_keys, digest, (self._clock() + self._config.negative_ttl, reason))
            raise InvalidApiKeyError(reason, key_id=parsed.key_id)
        entry = self._build(row, asked)
        if entry.refusal is None:
            self._remember(self._proven, digest, None, self._config.directory_size)
        else:
            self._proven.pop(digest, None)
        if touched.isdisjoint((_EVERYTHING, row.key_id, row.id)):
            self._store(digest, entry)
        else:
            # a change has overtaken this look-up: whoever it lets in is verified
            self.admissions.ask(row.key_id)
        if self._digester.is_older(row.digest_version):
            self._journal.note_digest(parsed, row.digest_version)
        return entry

    async def _standing_of(self, key_id: str) -> Standing | None:
        """What the control database says of a key now, for those it let in before."""
        if self._probe is not None:
            raise ControlUnavailableError("the control database is not available")
        found, _ = await self._guarded(self._key_batch.get(key_id))
        return found and _standing(*found)

    def _build(self, row: Row[Any], asked: float) -> _KeyEntry:
        standing = _standing(row, asked)
        credential = Credential(
            tenant=replace(standing.tenant, admission=self.admissions.admit(standing)),
            key_id=row.key_id,
            scopes=standing.scopes,
            networks=standing.networks,
            name=row.name,
            prefix=row.prefix,
            expires_at=row.expires_at,
        )
        refusal = "revoked" if standing.revoked else None
        if credential.tenant.status in _INACTIVE:
            refusal = refusal or f"tenant {credential.tenant.status}"
        entry = _KeyEntry(credential, refusal, asked, self._config)
        if standing.expires is not None:
            entry.expires = standing.expires
        if refusal is None:
            entry.good_until = min(entry.fresh_until, entry.expires)
        return entry

    def _admit(self, entry: _KeyEntry, source: str | None) -> Credential:
        credential = entry.credential
        if entry.refusal is not None:
            raise InvalidApiKeyError(entry.refusal, key_id=credential.key_id)
        if self._clock() >= entry.expires:
            raise InvalidApiKeyError("expired", key_id=credential.key_id)
        if entry.admitted is not None:
            if source not in entry.admitted:
                if not is_admitted(source, credential.networks):
                    raise InvalidApiKeyError("network", key_id=credential.key_id)
                if len(entry.admitted) >= _ADMITTED_SIZE:
                    entry.admitted.clear()
                entry.admitted[source] = replace(credential, tenant=for_source(credential.tenant, source))
            credential = entry.admitted[source]
        if not entry.noted:
            self._journal.note_use(entry)
        return credential

    async def _refused(self, error: InvalidApiKeyError, source: str | None, tenant: Tenant | None) -> None:
        """Report a refusal, count it, and hold the answer back where its key id was tried too often."""
        self._events.emit(KeyRejected(reason=error.reason, key_id=error.key_id, source=source))
        self._journal.note_refusal(error.reason, error.key_id, source, tenant)
        now = self._clock()
        if source is not None:
            group = source_group(source)
            self._report_lock(self._sources.fail(group, now), source=group)
        if error.key_id is None:
            return
        self._report_lock(self._key_ids.fail(error.key_id, now), key_id=error.key_id)
        delay = min(self._key_ids.pause(error.key_id, now), _LOCKED_DELAY)
        # the refusal alone is slow: whoever has the right key must not suffer from others' guesses at its public id
        if delay and self._delayed < _MAX_DELAYED:
            self._delayed += 1
            try:
                await asyncio.sleep(delay)
            finally:
                self._delayed -= 1

    def _report_lock(self, failures: int | None, *, source: str | None = None, key_id: str | None = None) -> None:
        if failures is None:
            return
        seconds = self._config.lockout_seconds
        logger.warning("%d invalid keys from %s: slowed down", failures, source or f"key id {key_id}")
        self._events.emit(KeyLockedOut(failures=failures, seconds=seconds, source=source, key_id=key_id))

    def report_cross_tenant(self, credential: Credential, named: str, resolver: str, source: str | None = None) -> None:
        """Report a request whose key is one tenant's while it named another.

        Three others within an hour raise an intrusion event, and each doubling of their number another one.

        Args:
            credential: What the request's key stands for.
            named: The other tenant, as the request named it.
            resolver: Where it named it: "subdomain", "header", "path".
            source: The peer's address.
        """
        tenant, named = credential.tenant, named[:NAME_LENGTH]
        self._events.emit(
            CrossTenantRequest(
                tenant_id=tenant.id,
                slug=tenant.slug,
                named=named,
                resolver=resolver,
                key_id=credential.key_id,
                source=source,
            )
        )
        self._journal.note_cross_tenant(credential, named, resolver, source)
        now = self._clock()
        seen = self._named.pop(credential.key_id, {})
        recent = {name: at for name, at in seen.items() if now - at < _INTRUSION_WINDOW}
        before = len(recent)
        if before < _INTRUSION_REMEMBERED:
            recent[named] = now
        self._remember(self._named, credential.key_id, recent, _INTRUSION_KEYS)
        if len(recent) > before and len(recent) in _INTRUSION_NAMES:
            logger.error("key %s of tenant %s named %d other tenants", credential.key_id, tenant.slug, len(recent))
            self._events.emit(
                IntrusionSuspected(
                    tenant_id=tenant.id,
                    slug=tenant.slug,
                    key_id=credential.key_id,
                    named=tuple(recent),
                    source=source,
                )
            )

    # --- tenants ----------------------------------------------------------------------------------------------------

    def peek_tenant(self, ref: str | UUID | Tenant) -> Tenant | None:
        """Return the tenant if it is known and fresh; None means: ask ``tenant``. No I/O.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        if get_ident() != self._home.thread:
            self._home.check()
        refuse_other_tenant(ref)
        entry = self._tenant_entry(as_reference(ref))
        if entry is None:
            return None
        now = self._clock()
        if now >= entry.fresh_until:
            return None
        entry.used = now
        # the name may have become another tenant's since the tenant was bound
        refuse_other_tenant(entry.tenant)
        return entry.tenant

    async def tenant(self, ref: str | UUID | Tenant) -> Tenant:
        """Return a tenant by slug, id, or an older ``Tenant``, whatever its status; but not a purged one.

        A former slug that still leads to it, and a verified domain of its own, name it as well.

        Raises:
            TenantNotFoundError: there is none.
            ControlUnavailableError: it is not known, and the control database does not answer.
            CrossTenantError: another tenant is bound.
        """
        self._home.check()
        found = self.peek_tenant(ref)
        if found is not None:
            return found
        wanted = as_reference(ref)
        if isinstance(wanted, str):
            check_name(wanted)
        if self._clock() < self._unknown_tenants.get(wanted, 0.0):
            raise TenantNotFoundError(wanted)
        try:
            found = await self._look_up_tenant(wanted)
        except ControlUnavailableError:
            entry = self._tenant_entry(wanted)
            if entry is None or self._clock() >= entry.stale_until:
                raise
            entry.used = self._clock()
            found = entry.tenant
        refuse_other_tenant(found)
        return found

    async def _look_up_tenant(self, wanted: UUID | str) -> Tenant:
        if self._probe is not None:
            raise ControlUnavailableError("the control database is not available")
        found, touched = await self._guarded(self._tenant_batch.get(wanted))
        tenant, asked = found or (None, 0.0)
        if tenant is None or tenant.status is Status.PURGED:
            entry = self._tenant_entry(wanted)
            if entry is not None:
                self._forget_tenant(entry.tenant.id)
            if not touched:
                self._remember(self._unknown_tenants, wanted, self._clock() + self._config.negative_ttl)
            raise TenantNotFoundError(wanted)
        if touched.isdisjoint((_EVERYTHING, tenant.id)):
            self._store_tenant(tenant, asked)
        return tenant

    def _tenant_entry(self, wanted: UUID | str) -> _TenantEntry | None:
        tenant_id = self._by_name.get(wanted) if isinstance(wanted, str) else wanted
        return None if tenant_id is None else self._tenants.entries.get(tenant_id)

    # --- invalidation -----------------------------------------------------------------------------------------------

    def on_invalidate(self, callback: Callable[[UUID | None], None]) -> None:
        """Call ``callback`` with the id of each tenant that changed, and with None when any may have."""
        self._callbacks.append(callback)

    def invalidate(self, tenant_id: UUID | None = None, key_id: str | None = None) -> None:
        """Forget a key, or a tenant and its keys, or everything where neither is given."""
        self._home.check()
        if key_id is not None:
            self._touch(key_id)
            digest = self._by_key_id.get(key_id)
            if digest is not None:
                self._forget_key(digest)
            self.admissions.ask(key_id)
        elif tenant_id is not None:
            self._touch(tenant_id)
            self._unknown_tenants.clear()
            self._forget_tenant(tenant_id)
            for digest in tuple(self._by_tenant.get(tenant_id, ())):
                self._forget_key(digest)
            self.admissions.ask(tenant_id)
            self._call_back(tenant_id)
        else:
            self._touch(_EVERYTHING)
            for memory in (self._keys.entries, self._tenants.entries, self._unknown_keys, self._unknown_tenants):
                memory.clear()
            for index in (self._by_key_id, self._by_tenant, self._by_name):
                index.clear()
            self.admissions.doubt()
            self._call_back(None)

    def revalidate(self) -> None:
        """Look everything up again before it is trusted: invalidations may have been missed.

        Unlike ``invalidate`` this keeps what was known for the case that the control database is gone again: the grace
        time counts from when it was looked up.
        """
        self._touch(_EVERYTHING)
        for key in self._keys.entries.values():
            key.fresh_until = key.good_until = 0.0
        for tenant in self._tenants.entries.values():
            tenant.fresh_until = 0.0
        self._unknown_keys.clear()
        self._unknown_tenants.clear()
        self.admissions.doubt()
        self._call_back(None)

    def _changed(self, change: Change) -> None:
        if change.tenant_id is None and change.key_id is None:
            self.revalidate()
        else:
            self.invalidate(change.tenant_id, change.key_id)

    def _touch(self, tag: Hashable) -> None:
        self._key_batch.touch(tag)
        self._tenant_batch.touch(tag)

    def _call_back(self, tenant_id: UUID | None) -> None:
        for callback in self._callbacks:
            try:
                callback(tenant_id)
            except Exception:
                logger.exception("a callback for invalidations failed")

    # --- memory -----------------------------------------------------------------------------------------------------

    def _fingerprint(self, key: str) -> bytes:
        return hashlib.blake2b(self._salt + key.encode("utf-8", "surrogatepass")).digest()

    def _store(self, digest: bytes, entry: _KeyEntry) -> None:
        self._forget_key(digest)
        self._unknown_keys.pop(digest, None)
        self._keys.put(digest, entry)
        self._by_key_id[entry.credential.key_id] = digest
        self._by_tenant.setdefault(entry.credential.tenant.id, set()).add(digest)
        # without the key's admission: this is the tenant for whoever asks by its name
        self._store_tenant(replace(entry.credential.tenant, admission=None), entry.placed)

    def _forget_key(self, digest: bytes) -> None:
        entry = self._keys.entries.pop(digest, None)
        if entry is not None:
            self._unlink_key(digest, entry)

    def _unlink_key(self, digest: bytes, entry: _KeyEntry) -> None:
        self._by_key_id.pop(entry.credential.key_id, None)
        siblings = self._by_tenant.get(entry.credential.tenant.id)
        if siblings is not None:
            siblings.discard(digest)
            if not siblings:
                del self._by_tenant[entry.credential.tenant.id]

    def _store_tenant(self, tenant: Tenant, asked: float) -> None:
        self._forget_tenant(tenant.id)
        if tenant.status is Status.PURGED:
            return
        self._tenants.put(tenant.id, _TenantEntry(tenant, asked, self._config))
        for name in (tenant.slug, *tenant.aliases):
            self._by_name[name] = tenant.id

    def _forget_tenant(self, tenant_id: UUID) -> None:
        entry = self._tenants.entries.pop(tenant_id, None)
        if entry is not None:
            self._unlink_tenant(tenant_id, entry)

    def _unlink_tenant(self, tenant_id: UUID, entry: _TenantEntry) -> None:
        for name in (entry.tenant.slug, *entry.tenant.aliases):
            # what it gave up may be another tenant's by now
            if self._by_name.get(name) == tenant_id:
                del self._by_name[name]

    @staticmethod
    def _remember(memory: OrderedDict[Any, Any], key: Any, value: Any, capacity: int = _NEGATIVE_SIZE) -> None:
        memory[key] = value
        memory.move_to_end(key)
        while len(memory) > capacity:
            memory.popitem(last=False)

    # --- the control database ---------------------------------------------------------------------------------------

    async def _guarded(self, look_up: Awaitable[T]) -> T:
        try:
            return await look_up
        except ControlUnavailableError as exc:
            self._begin_probing()
            raise ControlUnavailableError(*exc.args) from exc

    def _begin_probing(self) -> None:
        """Answer from memory, without waiting, until the control database answers again."""
        if self._probe is not None or self._closed:
            return
        logger.warning("the control database does not answer; what is known keeps working for %g s", self._config.grace)
        self._events.emit(DirectoryUnavailable())
        self._probe = asyncio.get_running_loop().create_task(self._probe_until_back(), context=Context())

    async def _probe_until_back(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_SECONDS * random.uniform(0.5, 1.0))
            try:
                async with asyncio.timeout(self._config.directory_timeout), self._control.connect() as connection:
                    await connection.execute(select(1))
            except Exception as exc:  # noqa: BLE001 - whatever it is, ending here would leave it away for ever
                logger.debug("the control database still does not answer: %s", type(exc).__name__)
                continue
            self._probe = None
            logger.info("the control database answers again")
            return

    async def _query(self, statement: Executable, parameters: dict[str, Any]) -> tuple[Sequence[Row[Any]], float]:
        """Run one reading statement; twice where the first try met a connection that a restart had left dead.

        Returns its rows, and when they were asked for: what they say may change from then on.

        Raises:
            ControlUnavailableError: there is no answer, or a refusal: a password that is being changed, a database that
                is being restored. To those who ask it is the same: what is known keeps working.
        """
        for attempt in range(2):
            try:
                async with self._control.connect() as connection:
                    asked = self._clock()
                    return (await connection.execute(statement, parameters)).all(), asked
            except ControlUnavailableError:
                if attempt:
                    raise
            except (SQLAlchemyError, asyncpg.PostgresError) as exc:
                logger.error("the control database refused a look-up: %s", type(getattr(exc, "orig", exc)).__name__)
                raise ControlUnavailableError("the control database refused a look-up") from exc
        raise AssertionError("unreachable")

    async def _load_keys(self, key_ids: list[str]) -> Mapping[str, tuple[Row[Any], float]]:
        started = time.perf_counter()
        rows, asked = await self._query(_KEYS, {"ids": key_ids})
        seconds = time.perf_counter() - started
        self._events.emit(DirectoryMissed(keys=len(key_ids), tenants=0, seconds=seconds))
        return {row.key_id: (row, asked) for row in rows}

    async def _load_tenants(self, wanted: list[UUID | str]) -> Mapping[UUID | str, tuple[Tenant, float]]:
        started = time.perf_counter()
        ids = [x for x in wanted if isinstance(x, UUID)]
        names = [x for x in wanted if isinstance(x, str)]
        rows, asked = await self._query(_TENANTS, {"ids": ids, "names": names})
        seconds = time.perf_counter() - started
        self._events.emit(DirectoryMissed(keys=0, tenants=len(wanted), seconds=seconds))
        found: dict[UUID | str, Tenant] = {}
        for row in rows:
            tenant = tenant_from_row(row)
            found[tenant.id] = tenant
            if tenant.status is not Status.PURGED:
                for name in tenant.aliases:
                    found.setdefault(name, tenant)
                found[tenant.slug] = tenant
        return {key: (tenant, asked) for key, tenant in found.items()}


_KEYS = (
    select(
        api_keys.c.id.label("key_id"),
        api_keys.c.digest,
        api_keys.c.digest_version,
        api_keys.c.scopes,
        api_keys.c.networks,
        api_keys.c.name,
        api_keys.c.prefix,
        api_keys.c.expires_at,
        api_keys.c.revoked_at,
        func.now().label("now"),
        *TENANT_COLUMNS,
    )
    .join(tenants, tenants.c.id == api_keys.c.tenant_id)
    .where(api_keys.c.id == any_(bindparam("ids", type_=ARRAY(Text))))
)

_TENANTS = union_all(
    select(*TENANT_COLUMNS).where(tenants.c.id == any_(bindparam("ids", type_=ARRAY(Uuid)))),
    select(*TENANT_COLUMNS).where(
        tenants.c.slug == any_(bindparam("names", type_=ARRAY(Text))), tenants.c.status != Status.PURGED
    ),
    select(*TENANT_COLUMNS)
    .join(former_slugs, former_slugs.c.tenant_id == tenants.c.id)
    .where(
        former_slugs.c.slug == any_(bindparam("names", type_=ARRAY(Text))),
        former_slugs.c.redirects_until > func.now(),
    ),
    select(*TENANT_COLUMNS)
    .join(domains, domains.c.tenant_id == tenants.c.id)
    .where(domains.c.domain == any_(bindparam("names", type_=ARRAY(Text))), domains.c.verified_at.is_not(None)),
)


def _standing(row: Row[Any], asked: float) -> Standing:
    return Standing(
        credential_id=row.key_id,
        tenant=tenant_from_row(row),
        asked=asked,
        scopes=frozenset(row.scopes),
        networks=parse_networks(row.networks),
        secret=(row.digest_version, row.digest),
        revoked=row.revoked_at is not None,
        # by the database's clock, so that clocks that differ do not matter
        expires=None if row.expires_at is None else asked + (row.expires_at - row.now).total_seconds(),
    )


__all__ = ["Directory", "DirectoryStatistics"]
