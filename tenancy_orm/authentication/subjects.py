"""Subjects: which tenants the holder of a token or session may act for, without a query on the hot path.

Two things are cached, each for at most ``directory.ttl`` seconds and dropped at once when PostgreSQL notifies a change:
what the control database says about a person (memberships, revocations), and what a credential was admitted with, by
the tenant that the request named.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

from ..config import TenancyConfig
from ..context import as_reference
from ..errors import ControlUnavailableError, InvalidCredentialError, TenantNotFoundError
from ..tenant import Status, Tenant
from .admission import Admission, CredentialState
from .admissions import Admissions
from .cache import SecondChance
from .credential import ALL_SCOPES, Credential, Membership, is_name
from .lookups import EVERYTHING, DirectoryLookups, SubjectRow
from .tenant_directory import TenantDirectory

_MAX_TENANTS = 1_000  # that one credential may name
# tenants looked up at one time: those of somebody who is a member everywhere must not fill the queue for everybody else
_PAGE = 200
_MAX_TAGGED = 200  # tenants that one cached credential is found by
_GONE = frozenset({Status.DELETED, Status.PURGED})

Named = tuple[str | None, ...]
"""The tenants that a request names, one for each resolver."""


def issuer_tag(issuer: object) -> Hashable:
    """Return the tag under which everything that an issuer's tokens have opened is verified."""
    return ("issuer", issuer)


def subject_tag(subject: str) -> Hashable:
    """Return the tag under which everything about a person is invalidated."""
    return ("subject", subject)


def token_tag(token_id: str) -> Hashable:
    """Return the tag under which everything about one token or session is invalidated."""
    return ("token", token_id)


class _Row:
    """A ``SubjectRow`` in the cache."""

    __slots__ = ("fresh_until", "memberships", "placed_at", "row", "stale_until", "tags", "used")

    def __init__(self, row: SubjectRow, config: TenancyConfig, tags: tuple[Hashable, ...]) -> None:
        self.row = row
        self.fresh_until = row.read_at + config.directory.ttl
        self.stale_until = self.fresh_until + config.directory.grace
        self.tags = tags
        self.used = self.placed_at = row.read_at
        # the last that were found by it: what is admitted with the same ones shares them
        self.memberships: tuple[Membership, ...] = ()


@dataclass(frozen=True, slots=True)
class AllowedTenants:
    """The tenants that a credential allows, and the row that says so; None for a visitor."""

    memberships: tuple[Membership, ...]
    row: _Row | None = None


class _Admitted:
    """A credential with its tenant; valid without a query until ``good_until``."""

    __slots__ = ("credential", "good_until", "placed_at", "tags", "used")

    def __init__(self, credential: Credential, good_until: float, now: float, tags: tuple[Hashable, ...]) -> None:
        self.credential = credential
        self.good_until = good_until
        self.tags = tags
        self.used = self.placed_at = now


class SubjectDirectory:
    """Finds the tenants of credentials that are no keys, and admits them; ``Directory.subjects``.

    Args:
        tenants: The directory's tenants.
        lookups: Queries the control database.
        admissions: Where what is admitted is registered.
        config: Sizes and times, and the scopes of roles.
        clock: The directory's.
    """

    def __init__(
        self,
        tenants: TenantDirectory,
        lookups: DirectoryLookups,
        admissions: Admissions,
        config: TenancyConfig,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._tenants = tenants
        self._lookups = lookups
        self._admissions = admissions
        self._config = config
        self._clock = clock
        size = config.directory.size
        self._rows: SecondChance[Hashable, _Row] = SecondChance(
            size, lambda key, entry: self._unlink(self._rows, key, entry)
        )
        self._admitted: SecondChance[Hashable, _Admitted] = SecondChance(
            size, lambda key, entry: self._unlink(self._admitted, key, entry)
        )
        # bound here: peek reads nothing through more than one attribute
        self._find = self._admitted.entries.get
        self._by_tag: dict[Hashable, set[tuple[SecondChance[Any, Any], Hashable]]] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """How many credentials are cached, each with a tenant."""
        return len(self._admitted)

    # --- admitting --------------------------------------------------------------------------------------------------

    def peek(self, credential: Credential, named: Named) -> Credential | None:
        """Return the credential with its tenant if that is cached and fresh; on None ask ``allowed``. No I/O.

        Args:
            credential: As it was authenticated.
            named: What the request names.
        """
        entry = self._find(_key(credential, named))
        if entry is None:
            return None
        now = self._clock()
        if now >= entry.good_until:
            return None
        entry.used = now
        found = entry.credential
        return found if found.claims is credential.claims else replace(found, claims=credential.claims)

    async def allowed(self, credential: Credential) -> AllowedTenants:
        """Return the tenants that a credential allows, in the order of their slugs; deleted ones are not among them.

        Raises:
            InvalidCredentialError: it has expired, was revoked, or is malformed.
            ControlUnavailableError: it is not cached, and the control database does not answer.
        """
        for what, given in (("subject", credential.subject), ("id", credential.id or credential.subject)):
            # what PostgreSQL cannot take would fail the look-ups of others in the same query
            if not is_name(given):
                raise InvalidCredentialError(what, kind=credential.kind)
        if credential.expires_at is not None and credential.expires_at <= datetime.now(UTC):
            raise InvalidCredentialError("expired", kind=credential.kind, credential_id=credential.public_id)
        cached = await self._row(credential)
        row = cached.row
        if _is_revoked(credential, row):
            raise InvalidCredentialError("revoked", kind=credential.kind, credential_id=credential.public_id)
        if credential.tenants is None:
            wanted: dict[UUID | str, frozenset[str]] = {key: row.roles[key] for key in row.roles}
        else:
            if len(credential.tenants) > _MAX_TENANTS:
                raise InvalidCredentialError(
                    "too many tenants", kind=credential.kind, credential_id=credential.public_id
                )
            wanted = dict.fromkeys((as_reference(name) for name in credential.tenants), frozenset())
        tenants = {reference: self._tenants.peek(reference) for reference in wanted}
        # a task for each: of the many tenants of one person few are missing
        missing = [reference for reference, tenant in tenants.items() if tenant is None]
        for start in range(0, len(missing), _PAGE):
            page = missing[start : start + _PAGE]
            tenants.update(zip(page, await asyncio.gather(*map(self._tenant, page)), strict=True))
        found = {
            tenant.id: Membership(tenant, wanted[reference])
            for reference, tenant in tenants.items()
            if tenant is not None and tenant.status not in _GONE
        }
        memberships = tuple(sorted(found.values(), key=lambda one: one.tenant.slug))
        if not _are_same(memberships, cached.memberships):
            cached.memberships = memberships
        return AllowedTenants(cached.memberships, cached)

    def admit(
        self, credential: Credential, allowed: AllowedTenants, chosen: Membership | None, named: Named
    ) -> Credential:
        """Return the credential with its tenant, cached for the next request that names the same. Does not wait.

        Args:
            credential: As it was authenticated.
            allowed: What ``allowed`` returned, at once before this.
            chosen: One of those; None leaves the credential without a tenant, and is not cached.
            named: What the request names.
        """
        if chosen is None:
            # roles give scopes in a tenant, and nowhere else
            scopes = frozenset() if credential.tenants is None else credential.scopes
            return replace(credential, scopes=scopes, memberships=allowed.memberships)
        now = self._clock()
        scopes, expires = self._scopes(credential, chosen.roles), _expiry(credential, now)
        tags = _tags(credential)
        state = CredentialState(
            credential_id=f"{credential.kind} {next(self._numbers)}",
            tenant=chosen.tenant,
            read_at=now if allowed.row is None else allowed.row.row.read_at,
            scopes=scopes,
            expires=expires,
            credential=credential,
            tags=_state_tags(credential),
        )
        admitted = replace(
            credential,
            scopes=scopes,
            roles=chosen.roles,
            memberships=allowed.memberships,
            bound=replace(chosen.tenant, admission=self._admissions.admit(state)),
        )
        fresh_until = self._fresh_until(credential, allowed, chosen)
        if not fresh_until:
            # a change came while it was looked up, or may have (0), of which nobody has told this admission
            self._admissions.verify(state.credential_id)
        else:
            # with more, a change of another tenant than the chosen one shows in the memberships after the TTL
            shown = allowed.memberships if len(allowed.memberships) <= _MAX_TAGGED else (chosen,)
            tags = (*tags, *(membership.tenant.id for membership in shown))
            entry = _Admitted(admitted, fresh_until if expires is None else min(fresh_until, expires), now, tags)
            self._store(self._admitted, _key(credential, named), entry, tags)
        return admitted

    def admit_without_tenant(self, credential: Credential) -> Admission:
        """Return an admission for what a credential has open where no tenant is bound; it is verified at once.

        A key's is that of its tenant, although that is not bound.
        """
        if credential.kind == "key":
            admission = credential.memberships[0].tenant.admission
            return cast("Admission", admission)
        state = CredentialState(
            credential_id=f"{credential.kind} {next(self._numbers)}",
            tenant=None,
            read_at=0.0,  # the request may have been authenticated a while ago
            expires=_expiry(credential, self._clock()),
            credential=credential,
            tags=_state_tags(credential),
        )
        admitted = self._admissions.admit(state)
        self._admissions.verify(state.credential_id)
        return admitted

    async def anonymous(self, name: str) -> Credential:
        """Return the credential of a visitor of the tenant with this slug, id or domain; it has no scopes.

        Raises:
            TenantNotFoundError: there is no such tenant.
            ControlUnavailableError: it is not cached, and the control database does not answer.
        """
        tenant = self._tenants.peek(name) or await self._tenants.get(name)
        credential = Credential("anonymous", "", tenants=(tenant.id,))
        found = self.peek(credential, ())
        if found is not None:
            return found
        return self.admit(credential, AllowedTenants((Membership(tenant),)), Membership(tenant), ())

    async def state(self, granted: CredentialState) -> CredentialState | None:
        """Return the current state of a credential that was admitted, for its admissions.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        credential = cast("Credential", granted.credential)  # the state of a key is read elsewhere
        if granted.tenant is None:
            row, _ = await self._lookups.subject(credential.subject, credential.id)
            return replace(granted, read_at=row.read_at, revoked=_is_revoked(credential, row) or not _holds(credential))
        found, _ = await self._lookups.tenant(granted.tenant.id)
        if found is None:
            return None
        tenant, read_at = found
        if credential.kind == "anonymous":
            return replace(granted, tenant=tenant, read_at=read_at)
        row, _ = await self._lookups.subject(credential.subject, credential.id)
        roles = frozenset() if credential.tenants is not None else row.roles.get(tenant.id)
        return replace(
            granted,
            tenant=tenant,
            read_at=min(read_at, row.read_at),
            scopes=self._scopes(credential, roles or frozenset()),
            revoked=roles is None or _is_revoked(credential, row) or not _holds(credential),
        )

    def _scopes(self, credential: Credential, roles: frozenset[str]) -> frozenset[str]:
        if credential.tenants is not None:
            return credential.scopes
        given = self._config.members.scopes_of(roles)
        if ALL_SCOPES in credential.scopes:
            return given
        return credential.scopes if ALL_SCOPES in given else credential.scopes & given

    def _fresh_until(self, credential: Credential, allowed: AllowedTenants, chosen: Membership) -> float | None:
        """Until when what was looked up is fresh; None where it changed since."""
        until = self._tenants.fresh_until(chosen.tenant)
        row = allowed.row
        if row is None or until is None:
            return until
        # as long as it is cached, it was not invalidated
        current = self._rows.entries.get((credential.subject, credential.id)) is row
        return min(until, row.fresh_until) if current else None

    async def _row(self, credential: Credential) -> _Row:
        """Return the row of a credential; it is in the cache unless it was invalidated while it was looked up."""
        key = (credential.subject, credential.id)
        cached = self._rows.entries.get(key)
        now = self._clock()
        if cached is not None:
            cached.used = now
            if now < cached.fresh_until:
                return cached
        try:
            row, invalidated = await self._lookups.subject(*key)
        except ControlUnavailableError:
            cached = self._rows.entries.get(key)  # it may have been invalidated in between
            if cached is None or now >= cached.stale_until:
                raise
            return cached
        tags = _tags(credential)
        found = _Row(row, self._config, tags)
        if invalidated.isdisjoint((EVERYTHING, *tags)):
            self._store(self._rows, key, found, tags)
        return found

    async def _tenant(self, reference: UUID | str) -> Tenant | None:
        try:
            return await self._tenants.get(reference)
        except TenantNotFoundError:
            return None

    # --- invalidation -----------------------------------------------------------------------------------------------

    def invalidate(self, tag: Hashable) -> None:
        """Remove what concerns a tenant's id, a person (``subject_tag``) or a token (``token_tag``)."""
        for store, key in tuple(self._by_tag.get(tag, ())):
            entry = store.entries.pop(key, None)
            if entry is not None:
                self._unlink(store, key, entry)

    def clear(self) -> None:
        """Remove everything."""
        self._rows.entries.clear()
        self._admitted.entries.clear()
        self._by_tag.clear()

    def mark_stale(self) -> None:
        """Mark everything as stale: it is looked up again before use, and rows are kept for an outage."""
        for entry in self._admitted.entries.values():
            entry.good_until = 0.0
        for cached in self._rows.entries.values():
            cached.fresh_until = 0.0

    def _store(
        self, store: SecondChance[Any, Any], key: Hashable, entry: _Row | _Admitted, tags: Iterable[Hashable]
    ) -> None:
        former = store.entries.pop(key, None)
        if former is not None:
            self._unlink(store, key, former)
        store.put(key, entry)
        link = (store, key)
        for tag in tags:
            self._by_tag.setdefault(tag, set()).add(link)

    def _unlink(self, store: SecondChance[Any, Any], key: Hashable, entry: _Row | _Admitted) -> None:
        link = (store, key)
        for tag in entry.tags:
            linked = self._by_tag.get(tag)
            if linked is not None:
                linked.discard(link)
                if not linked:
                    del self._by_tag[tag]


def _are_same(some: Sequence[Membership], others: Sequence[Membership]) -> bool:
    """Whether both have the same roles in the same tenants, none of which was looked up again in between."""
    return len(some) == len(others) and all(
        one.tenant is other.tenant and one.roles == other.roles for one, other in zip(some, others, strict=True)
    )


def _tags(credential: Credential) -> tuple[Hashable, ...]:
    subject = subject_tag(credential.subject)
    return (subject, token_tag(credential.id)) if credential.id else (subject,)


def _state_tags(credential: Credential) -> tuple[Hashable, ...]:
    tags = _tags(credential)
    return tags if credential.holds is None else (*tags, issuer_tag(credential.claims.get("iss")))


def _holds(credential: Credential) -> bool:
    return credential.holds is None or credential.holds()


def _expiry(credential: Credential, now: float) -> float | None:
    """When it ends, by the directory's clock, on which it is ``now``."""
    if credential.expires_at is None:
        return None
    return now + (credential.expires_at - datetime.now(UTC)).total_seconds()


def _key(credential: Credential, named: Named) -> Hashable:
    """Everything of a credential that decides about its tenant and rights; written out, since hashing all is slow."""
    return (
        credential.kind,
        credential.subject,
        credential.id,
        credential.tenants,
        credential.scopes,
        credential.expires_at,
        credential.issued_at,
        credential.sent_by_browser,
        named,
    )


def _is_revoked(credential: Credential, row: SubjectRow) -> bool:
    if row.revoked:
        return True
    # of what does not say when it was issued nobody knows that it was issued later
    return row.revoked_at is not None and (credential.issued_at is None or credential.issued_at <= row.revoked_at)
