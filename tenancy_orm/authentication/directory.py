"""The directory: finds the tenants of a credential, and a tenant by name, without a query on the hot path.

An entry is cached for at most ``directory.ttl`` seconds, and invalidated at once when PostgreSQL notifies a change.
After that time it is looked up again. While the control database does not answer, cached entries stay valid for
``directory.grace`` seconds more, and nothing else is admitted. Keys are cached under a salted hash, never as text.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Set
from dataclasses import dataclass, replace
from threading import get_ident
from typing import NamedTuple, TypeVarTuple
from uuid import UUID

from ..audit.log import AuditLog
from ..config import TenancyConfig
from ..context import _current, refuse_other_tenant, refuse_while_bound
from ..control.database import ControlDatabase
from ..control.direct import ControlRow
from ..control.notifications import (
    CREATED,
    PAUSED,
    SCHEMA_CHANGED,
    SCHEMA_CHANGING,
    SERVER_CHANGED,
    Change,
    ConnectionRequest,
    LeaseCall,
    Listener,
)
from ..errors import ControlUnavailableError, InvalidCredentialError
from ..events import CredentialRejected, EventBus
from ..keys.format import MAX_KEY_LENGTH, KeyDigester, ParsedKey, parse_key
from ..keys.networks import source_group
from ..tenant import Status, Tenant
from .admission import CredentialState
from .admissions import Admissions
from .credential import Credential, Membership
from .directory_cache import DirectoryCache, KeyEntry
from .intrusions import Intrusions
from .journal import KeyJournal
from .lockout import Lockout
from .lookups import EVERYTHING, DirectoryLookups, credential_state
from .subjects import SubjectDirectory, issuer_tag, subject_tag, token_tag
from .tenant_directory import TenantDirectory

logger = logging.getLogger("tenancy_orm.directory")

_Arguments = TypeVarTuple("_Arguments")

_INACTIVE = frozenset({Status.DELETED, Status.PURGED})
# their signature was right: a browser that wakes up after a night must not lock its neighbours out
_NO_GUESSES = frozenset({"missing", "expired", "not yet valid", "revoked", "unrecognised"})


@dataclass(frozen=True, slots=True)
class DirectoryStatistics:
    """How many entries the directory has. ``listening`` tells whether invalidations arrive now."""

    keys: int
    tenants: int
    negative: int
    locked: int
    listening: bool
    control_available: bool


class _Verified(NamedTuple):
    """A row of a key with the right secret, when it was read, and what was invalidated while it was."""

    row: ControlRow
    read_at: float
    invalidated: Set[Hashable]


class Directory:
    """Looks up keys and tenants; ``tenancy.internals.directory``.

    Args:
        control: The control database.
        config: Sizes and times, see ``TenancyConfig``.
        events: Where refusals, lock-outs and the listener's loss are reported.
        audit: Where refused credentials and cross-tenant requests are recorded, in the background.
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
        self._config = config
        self._events = events
        self._clock = clock
        self._home = control.home
        self._salt = os.urandom(32)
        self._digester = KeyDigester(config.keys.decoded_peppers, config.keys.pepper_current)
        self._prefixes = frozenset((config.keys.prefix, *config.keys.prefixes))
        self._beginnings = tuple(f"{prefix}_" for prefix in self._prefixes)
        self._callbacks: list[Callable[[UUID | None], None]] = []
        self._request_callbacks: list[Callable[[ConnectionRequest], None]] = []
        self._lease_callbacks: list[Callable[[LeaseCall], None]] = []
        self._schema_callbacks: list[Callable[[UUID | None, bool], None]] = []
        self._server_callbacks: list[Callable[[], None]] = []
        self._pause_callbacks: list[Callable[[UUID], None]] = []
        self._cache = DirectoryCache(config, clock)
        # bound here: peek reads nothing through more than one attribute
        self._find = self._cache.keys.entries.get
        self._lookups = DirectoryLookups(control, config, events, clock=clock)
        self._tenants = TenantDirectory(self._home, self._cache, self._lookups, clock=clock)
        self._lockout = Lockout(config, events, clock=clock)
        self._journal = KeyJournal(control, audit, self._digester, interval=config.keys.usage_interval, clock=clock)
        self._intrusions = Intrusions(events, self._journal, clock=clock)
        self._listener = Listener(
            config.listen_dsn or control.dsn,
            on_change=self._changed,
            on_request=self._requested,
            on_call=self._called,
            on_connected=self._connected,
            events=events,
        )
        self.admissions = Admissions(
            self._credential_state,
            is_listening=lambda: self._listener.connected,
            ttl=config.directory.ttl,
            grace=config.directory.grace,
            clock=clock,
        )
        self.subjects = SubjectDirectory(self._tenants, self._lookups, self.admissions, config, clock=clock)

    async def open(self) -> None:
        """Start to listen for invalidations, and to record which keys are used."""
        self._home.check()
        self._journal.open()
        self.admissions.open()
        await self._listener.open()

    async def close(self) -> None:
        """Stop listening, and record the last uses."""
        self._home.check()
        # first: look-ups that fail because of the closing must not count as an outage of the control database
        self._lookups.stop()
        await self._listener.close()
        await self.admissions.close()
        await self._lookups.close()
        await self._journal.close()

    async def flush(self) -> None:
        """Write now what is otherwise written every ``keys.usage_interval`` seconds: uses of keys, refusals.

        Raises:
            ControlUnavailableError: the control database does not answer; nothing is lost, the next flush writes it.
        """
        refuse_while_bound("recording the use of all keys")
        self._home.check()
        await self._journal.flush()

    def forget_failures(self) -> None:
        """Let those in again who have guessed credentials: for tests, which all come from one address.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("forgetting who has guessed credentials")
        self._home.check()
        self._lockout.forget()

    @property
    def listening(self) -> bool:
        """Whether notifications of the control database arrive now."""
        return self._listener.connected

    @property
    def statistics(self) -> DirectoryStatistics:
        """How many entries there are, and whether the control database answers."""
        return DirectoryStatistics(
            keys=len(self._cache.keys),
            tenants=len(self._cache.tenants),
            negative=self._cache.negative,
            locked=len(self._lockout),
            listening=self._listener.connected,
            control_available=self._lookups.available,
        )

    # --- keys -------------------------------------------------------------------------------------------------------

    def peek(self, key: str, source: str | None = None) -> Credential | None:
        """Return the credential of ``key`` if it is cached and fresh; on None call ``authenticate``.

        One hash and one dictionary look-up; no I/O.

        Args:
            key: The key's text.
            source: The peer's address; a key that is bound to networks is found with an address only.
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
        if (bound := _current.get()) is not None and bound.id != entry.tenant_id:
            return None
        entry.used = now
        if not entry.use_queued:
            self._journal.record_use(entry)
        return credential

    async def authenticate(self, key: str, *, source: str | None = None) -> Credential:
        """Return the credential of ``key``.

        The caller checks the tenant's status; only the keys of a deleted tenant are refused here.

        Args:
            key: The key's text.
            source: The peer's address, for networks and lock-out.

        Raises:
            InvalidCredentialError: it is malformed, unknown, revoked, expired, or used from elsewhere; the message is
                the same.
            TooManyAttemptsError: ``source`` presented too many invalid keys, and has not used this one before.
            ControlUnavailableError: the key is not cached, and the control database does not answer.
            CrossTenantError: the key belongs to another tenant than the bound one.
        """
        self._home.check()
        found = self.peek(key, source)
        if found is not None:
            return found
        if not self.is_key(key):
            # another system's token, a JWT for example: it cannot be a guess, so it does not count as one
            error = InvalidCredentialError("malformed")
            self._report_refused(error, source, None)
            raise error
        entry: KeyEntry | None = None
        try:
            entry = await self._entry(key, source)
            credential = entry.admit(source, self._clock())
            if not entry.use_queued:
                self._journal.record_use(entry)
            refuse_other_tenant(credential.tenant)
            return credential
        except InvalidCredentialError as exc:
            await self._refused(exc, source, entry.credential.tenant if entry else None)
            raise

    def is_key(self, text: str) -> bool:
        """Whether a text begins as the API keys of this installation do; what does not is none."""
        return text.startswith(self._beginnings)

    async def _entry(self, key: str, source: str | None) -> KeyEntry:
        """Return the entry of a key with the right secret, from the cache where it is fresh."""
        digest = self._fingerprint(key)
        now = self._clock()
        entry = self._find(digest)
        if entry is not None:
            entry.used = now
            if now < entry.fresh_until:
                return entry
            return await self._look_up_again(digest, ParsedKey(entry.credential.prefix, entry.credential.id, key))
        # keys that have worked pass the lock-out: an attacker behind the same proxy must not lock their owners out
        group = None if source is None or digest in self._cache.proven else source_group(source)
        if group is not None:
            self._lockout.check(group)
        parsed = parse_key(key, self._prefixes)
        if (reason := self._cache.unknown_key_reason(digest, now)) is not None:
            raise InvalidCredentialError(reason, credential_id=parsed.key_id)
        if group is None:
            return await self._look_up(digest, parsed)
        await self._lockout.attempts.begin(group, digest)
        try:
            found = await self._verified(digest, parsed)
        finally:
            # nothing awaits from here until a failure is counted; what has succeeded may wait, and delays no other
            self._lockout.attempts.end(group, digest)
        return await self._enter(digest, parsed, found)

    async def _look_up_again(self, digest: bytes, parsed: ParsedKey) -> KeyEntry:
        try:
            return await self._look_up(digest, parsed)
        except ControlUnavailableError:
            # read again: it may have been invalidated in between
            entry = self._find(digest)
            if entry is None or self._clock() >= entry.stale_until:
                raise
            return entry

    async def _look_up(self, digest: bytes, parsed: ParsedKey) -> KeyEntry:
        return await self._enter(digest, parsed, await self._verified(digest, parsed))

    async def _verified(self, digest: bytes, parsed: ParsedKey) -> _Verified:
        """Look up a key, and check its secret."""
        found, invalidated = await self._lookups.key(parsed.key_id)
        row, read_at = found or (None, 0.0)
        matches = self._digester.matches(parsed.text, row and row["digest"], row and row["digest_version"])
        if row is None or not matches:
            reason = "unknown" if row is None else "secret"
            if row is not None and not self._digester.has_pepper(row.digest_version):
                reason = "pepper"
                logger.error(
                    "key %s has a digest of version %r, which keys.peppers lacks", row.key_id, row.digest_version
                )
            self._cache.invalidate_key(digest)
            self._cache.record_proven(digest, False)
            if invalidated.isdisjoint((EVERYTHING, parsed.key_id)):
                self._cache.store_unknown_key(digest, reason)
            raise InvalidCredentialError(reason, credential_id=parsed.key_id)
        return _Verified(row, read_at, invalidated)

    async def _enter(self, digest: bytes, parsed: ParsedKey, found: _Verified) -> KeyEntry:
        """Cache what was found, once its tenant may be used."""
        state = credential_state(found.row, found.read_at)
        assert state.tenant is not None  # noqa: S101 - a key has one
        if not state.revoked and (waiting := self._tenants.before_use(state.tenant)) is not None:
            await waiting
            # of what was invalidated in between, the key revoked for example, nobody has told this look-up
            found = await self._verified(digest, parsed)
            state = credential_state(found.row, found.read_at)
        row, _, invalidated = found
        assert state.tenant is not None  # noqa: S101 - a key has one
        tenant = self._tenants.judged(state.tenant)
        entry = self._build(row, state, tenant)
        self._cache.record_proven(digest, entry.refusal is None)
        if invalidated.isdisjoint((EVERYTHING, row["key_id"], row["id"])):
            self._cache.store_key(digest, entry, tenant)
        else:
            # a change came while this was looked up: verify whatever is admitted with it
            self.admissions.verify(row["key_id"])
        if self._digester.is_older(row["digest_version"]):
            self._journal.record_digest(parsed, row["digest_version"])
        return entry

    async def _credential_state(self, granted: CredentialState) -> CredentialState | None:
        """Return the current state of a credential, for admissions that are verified."""
        if granted.credential is not None:
            return await self.subjects.state(granted)
        found, _ = await self._lookups.key(granted.credential_id)
        return found and credential_state(*found)

    def _build(self, row: ControlRow, state: CredentialState, tenant: Tenant) -> KeyEntry:
        tenant = replace(tenant, admission=self.admissions.admit(state))
        credential = Credential(
            "key",
            row["key_id"],
            tenants=(tenant.id,),
            scopes=state.scopes,
            networks=state.networks,
            name=row["name"],
            prefix=row["prefix"],
            expires_at=row["expires_at"],
            memberships=(Membership(tenant),),
            bound=tenant,
        )
        refusal = "revoked" if state.revoked else None
        if tenant.status in _INACTIVE:
            refusal = refusal or f"tenant {tenant.status}"
        return KeyEntry(credential, refusal, state.read_at, state.expires, self._config)

    async def report_refused(self, error: InvalidCredentialError, source: str | None) -> None:
        """Record that a credential that is no key was refused, and count it unless it was valid at another time.

        A valid token or session passes whatever else its source has sent: nobody guesses a signature, and a changed
        signing key must not lock an office out.

        Raises:
            TooManyAttemptsError: ``source`` presented too many invalid credentials.
        """
        self._report_refused(error, source, None)
        if error.reason in _NO_GUESSES:
            return
        if source is not None:
            self._lockout.check(source_group(source))
        await self._lockout.count(None, source)

    async def _refused(self, error: InvalidCredentialError, source: str | None, tenant: Tenant | None) -> None:
        """Report and count a refusal, and delay the answer where its key id was tried too often."""
        self._report_refused(error, source, tenant)
        await self._lockout.count(error.credential_id, source)

    def _report_refused(self, error: InvalidCredentialError, source: str | None, tenant: Tenant | None) -> None:
        self._events.emit(
            CredentialRejected(reason=error.reason, kind=error.kind, credential_id=error.credential_id, source=source)
        )
        self._journal.record_refusal(error, source, tenant)

    def report_cross_tenant(self, credential: Credential, named: str, resolver: str, source: str | None = None) -> None:
        """Report a request that named a tenant that its credential does not allow.

        A key or a person that names three other tenants within an hour emits ``IntrusionSuspected``, and again each
        time that the number has doubled.

        Args:
            credential: The request's credential.
            named: The other tenant, as the request named it.
            resolver: Where it was named: "subdomain", "header", "path".
            source: The peer's address.
        """
        self._home.check()
        self._intrusions.report(credential, named, resolver, source)

    # --- tenants ----------------------------------------------------------------------------------------------------

    def peek_tenant(self, ref: str | UUID | Tenant) -> Tenant | None:
        """Return the tenant if it is cached and fresh; on None call ``tenant``. No I/O.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        return self._tenants.peek(ref)

    async def tenant(self, ref: str | UUID | Tenant) -> Tenant:
        """Return a tenant by slug, id or an older ``Tenant``, whatever its status, unless it is purged.

        A former slug that still redirects and a verified domain name it as well.

        Raises:
            TenantNotFoundError: there is none.
            ControlUnavailableError: it is not cached, and the control database does not answer.
            CrossTenantError: another tenant is bound.
        """
        return await self._tenants.get(ref)

    # --- invalidation -----------------------------------------------------------------------------------------------

    def on_invalidate(self, callback: Callable[[UUID | None], None]) -> None:
        """Call ``callback`` with the id of each tenant that changed, and with None when any may have."""
        self._callbacks.append(callback)

    def on_connection_request(self, callback: Callable[[ConnectionRequest], None]) -> None:
        """Call ``callback`` with each request of a process for connections; the process's own are among them."""
        self._request_callbacks.append(callback)

    def on_lease_call(self, callback: Callable[[LeaseCall], None]) -> None:
        """Call ``callback`` with each call to look at the leases of connections."""
        self._lease_callbacks.append(callback)

    def on_schema_change(self, callback: Callable[[UUID | None, bool], None]) -> None:
        """Call ``callback`` with the id of each tenant with a schema that is being migrated, or was, and which it is.

        The id is None after notifications may have been missed.
        """
        self._schema_callbacks.append(callback)

    def on_server_change(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the row of a server has changed, or such a notification may have been missed."""
        self._server_callbacks.append(callback)

    def on_pause(self, callback: Callable[[UUID], None]) -> None:
        """Call ``callback`` with the id of each tenant with sessions that are to wait, since its database changes."""
        self._pause_callbacks.append(callback)

    def before_use(self, callback: Callable[[Tenant], Awaitable[None] | None]) -> None:
        """Call ``callback`` with each tenant that was looked up, before it is cached.

        It returns None where the tenant may be used at once. Otherwise what it returns is awaited, and the tenant is
        looked up again: the credential may have been revoked, or its status changed, in the time that this takes.
        """
        self._tenants.before_use = callback

    def judge_by(self, judge: Callable[[Tenant], str | None]) -> None:
        """Call ``judge`` with each tenant that was looked up; it returns why its revision is not served, or None.

        From then on a tenant is looked up again when its migration begins, too, and not only when it has ended.
        """
        self._tenants.judge = judge

    def invalidate(self, tenant_id: UUID | None = None, key_id: str | None = None) -> None:
        """Remove a key from the cache, or a tenant and its keys, or everything where neither is given."""
        self._home.check()
        if key_id is not None:
            self._lookups.invalidate(key_id)
            self._cache.invalidate_key_id(key_id)
            self.admissions.verify(key_id)
        elif tenant_id is not None:
            self._lookups.invalidate(tenant_id)
            self._cache.invalidate_tenant(tenant_id)
            self.subjects.invalidate(tenant_id)
            self.admissions.verify(tenant_id)
            self._call_back(tenant_id)
        else:
            self._lookups.invalidate(EVERYTHING)
            self._cache.clear()
            self.subjects.clear()
            self.admissions.verify_all()
            self._call_back(None)

    def look_again(self, tenant_id: UUID) -> None:
        """Remove a tenant and its keys from the cache; its engine, its connections and its admissions remain."""
        self._home.check()
        self._lookups.invalidate(tenant_id)
        self._cache.invalidate_tenant(tenant_id)
        self.subjects.invalidate(tenant_id)

    def invalidate_subject(self, subject: str | None = None, token_id: str | None = None) -> None:
        """Remove what is cached of a person, or of one token or session: memberships changed, or it was revoked."""
        self._home.check()
        tags = [subject_tag(subject)] if subject is not None else []
        tags += [token_tag(token_id)] if token_id is not None else []
        for tag in tags:
            self._lookups.invalidate(tag)
            self.subjects.invalidate(tag)
            self.admissions.verify(tag)

    def verify_issuer(self, issuer: str) -> None:
        """Verify what the tokens of an issuer have open: it has withdrawn a key."""
        self.admissions.verify(issuer_tag(issuer))

    def revalidate(self) -> None:
        """Mark everything as stale, so that it is looked up again before use: invalidations may have been missed.

        Unlike ``invalidate`` it keeps the entries, for the case that the control database does not answer: their grace
        time counts from when they were looked up.
        """
        self._home.check()
        self._lookups.invalidate(EVERYTHING)
        self._cache.mark_stale()
        self.subjects.mark_stale()
        self.admissions.verify_all()
        self._call_back(None)

    def _changed(self, change: Change) -> None:
        if change.kind in (SCHEMA_CHANGING, SCHEMA_CHANGED) and change.tenant_id is not None:
            if change.kind == SCHEMA_CHANGED or self._tenants.judge is not None:
                # the cached tenant has the former revision, or target
                self.look_again(change.tenant_id)
            self._call_back_for_schema(change.tenant_id, change.kind == SCHEMA_CHANGING)
        elif change.kind == CREATED and change.tenant_id is not None:
            self.look_again(change.tenant_id)
        elif change.kind == PAUSED and change.tenant_id is not None:
            # its admissions remain: what is open goes on in the other database
            self.look_again(change.tenant_id)
            _call_all(self._pause_callbacks, "a pause", change.tenant_id)
        elif change.kind == SERVER_CHANGED:
            _call_all(self._server_callbacks, "a change of a server")
        elif change.subject is not None or change.token_id is not None:
            self.invalidate_subject(change.subject, change.token_id)
        elif change.tenant_id is None and change.key_id is None:
            self.revalidate()
        else:
            self.invalidate(change.tenant_id, change.key_id)

    def _connected(self) -> None:
        self.revalidate()
        self._call_back_for_schema(None, False)
        _call_all(self._server_callbacks, "a change of a server")

    def _call_back_for_schema(self, tenant_id: UUID | None, changing: bool) -> None:
        _call_all(self._schema_callbacks, "a change of a schema", tenant_id, changing)

    def _requested(self, request: ConnectionRequest) -> None:
        _call_all(self._request_callbacks, "a request for connections", request)

    def _called(self, call: LeaseCall) -> None:
        _call_all(self._lease_callbacks, "a call to look at leases", call)

    def _call_back(self, tenant_id: UUID | None) -> None:
        _call_all(self._callbacks, "invalidations", tenant_id)

    def _fingerprint(self, key: str) -> bytes:
        return hashlib.blake2b(self._salt + key.encode("utf-8", "surrogatepass")).digest()


def _call_all(callbacks: Iterable[Callable[[*_Arguments], None]], what: str, *arguments: *_Arguments) -> None:
    """Call each, whether or not another one fails; ``what`` they are for is logged."""
    for callback in callbacks:
        try:
            callback(*arguments)
        except Exception:
            logger.exception("a callback for %s failed", what)


__all__ = ["Directory", "DirectoryStatistics"]
