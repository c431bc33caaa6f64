"""Tenants' own domains: claimed with a token, and used once the domain's owner has published it.

A claim alone gives nothing. The owner publishes the token as a TXT record, and ``verify`` looks it up; only then does a
request to that host name the tenant. A verified domain belongs to one tenant. Before that any number of tenants may
claim it, each with its own token, so that nobody can block a domain that is not theirs. Claims expire, and verified
domains are looked up again: see ``domain_upkeep``.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

import idna
from sqlalchemy import ColumnElement, Row, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..config.sections import DomainConfig, parse_nameserver
from ..control.database import ControlDatabase
from ..control.lookup import resolve_tenant_id
from ..control.models import domains
from ..errors import DomainError, MissingExtraError, TenantDeletedError
from ..registry.lifecycle import lock_tenant_for_share
from ..registry.registry import Registry
from ..tenant import Status, Tenant

_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(\.{_LABEL})+")
CHALLENGE = "_tenancy-challenge"


@dataclass(frozen=True, slots=True)
class Domain:
    """A tenant's domain. Publish ``token`` as a TXT record named ``challenge``, then verify."""

    domain: str
    tenant_id: UUID
    token: str = field(repr=False)
    created_at: datetime
    verified_at: datetime | None
    expires_at: datetime | None = None
    """Until when a claim can be verified; None for a verified domain, and where claims do not expire."""
    failing_since: datetime | None = None
    """Since when the TXT record of a verified domain is missing; None while it is published."""

    @property
    def challenge(self) -> str:
        """The name of the TXT record that proves ownership."""
        return f"{CHALLENGE}.{self.domain}"


class TextRecords(Protocol):
    """Looks up TXT records."""

    async def lookup(self, name: str) -> list[str]:
        """Return the texts published under ``name``; an empty list where there are none."""


class DnsTextRecords:
    """Looks up TXT records in the DNS, with dnspython (extra ``domains``).

    Args:
        nameservers: Addresses to use instead of the system's resolvers, with a port (``"127.0.0.1:5353"``) or without.
        timeout: Seconds for the whole look-up.

    Raises:
        DomainError: the system has no resolvers, as in some containers.
        MissingExtraError: dnspython is not installed.
    """

    def __init__(self, *, nameservers: Sequence[str] | None = None, timeout: float = 5.0) -> None:
        try:
            import dns.asyncresolver
            import dns.resolver
            from dns.nameserver import Do53Nameserver
        except ModuleNotFoundError as exc:
            raise MissingExtraError("dnspython", "domains") from exc
        try:
            self._resolver = dns.asyncresolver.Resolver(configure=nameservers is None)
        except dns.resolver.NoResolverConfiguration as exc:
            raise DomainError(f"the system has no name servers ({exc}); set domains.nameservers") from exc
        if nameservers is not None:
            self._resolver.nameservers = [Do53Nameserver(*parse_nameserver(text)) for text in nameservers]
        self._resolver.lifetime = timeout

    async def lookup(self, name: str) -> list[str]:
        """Return the texts published under ``name``.

        Raises:
            DomainError: no name server answered.
        """
        import dns.exception
        import dns.resolver

        try:
            answer = await self._resolver.resolve(name, "TXT")
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return []
        except dns.exception.DNSException as exc:
            raise DomainError(f"the TXT record of {name!r} cannot be looked up: {exc}") from exc
        return [b"".join(record.strings).decode("utf-8", "replace") for record in answer]


class ConfiguredTextRecords:
    """Looks up TXT records as ``domains.nameservers`` says; dnspython is needed at the first look-up.

    Args:
        config: The section ``domains`` of the configuration.
    """

    def __init__(self, config: DomainConfig) -> None:
        self._nameservers = config.nameservers
        self._records: DnsTextRecords | None = None

    async def lookup(self, name: str) -> list[str]:
        """Return the texts published under ``name``.

        Raises:
            DomainError: no name server answered, or there is none.
            MissingExtraError: dnspython is not installed.
        """
        if self._records is None:
            self._records = DnsTextRecords(nameservers=self._nameservers or None)
        return await self._records.lookup(name)


def is_published(token: str, texts: Iterable[str]) -> bool:
    """Whether one of the TXT records is the token."""
    return any(secrets.compare_digest(text.strip().encode(), token.encode()) for text in texts)


def check_domain(domain: str) -> str:
    """Return ``domain`` in lower case and ASCII (IDNA 2008), without a final dot.

    Raises:
        DomainError: it is not a domain name of two labels or more.
    """
    try:
        # as browsers do (UTS 46, non-transitional): Python's own codec implements IDNA 2003 only
        ascii_name = idna.encode(domain.removesuffix("."), uts46=True).decode("ascii")
    except idna.IDNAError:
        ascii_name = ""
    if len(ascii_name) > 253 or not _DOMAIN.fullmatch(ascii_name) or re.fullmatch(r"[0-9.]+", ascii_name):
        raise DomainError(f"{domain!r} is not a domain name of two labels or more")
    return ascii_name


class DomainManager:
    """Claim, verify and release tenants' domains; ``tenancy.domains``."""

    def __init__(
        self,
        control: ControlDatabase,
        audit: AuditLog,
        records: TextRecords | None = None,
        config: DomainConfig | None = None,
    ) -> None:
        config = config or DomainConfig()
        self._control = control
        self._audit = audit
        self._records = records or ConfiguredTextRecords(config)
        self._claim_seconds = config.claim_seconds
        self._registry = Registry(control, audit)

    async def claim(self, tenant: str | UUID | Tenant, domain: str, *, actor: Actor = SYSTEM) -> Domain:
        """Claim ``domain`` for ``tenant``; verify it to make it the tenant's.

        Claiming twice changes nothing; a claim that has expired gets another token.

        Raises:
            DomainError: it is not a domain name, or is verified for another tenant.
            TenantNotFoundError, TenantDeletedError: the tenant does not exist, or is deleted.
        """
        tenant = await self._registry.find(tenant)
        name = check_domain(domain)
        values = {"domain": name, "tenant_id": tenant.id, "token": secrets.token_urlsafe(24)}
        verified = domains.c.verified_at.is_not(None)
        owner = select(domains.c.tenant_id).where(domains.c.domain == name, verified)
        statement = insert(domains).values(values)
        if self._claim_seconds:
            again = {"token": statement.excluded.token, "created_at": func.now(), "lapsed_at": None}
            claim = statement.on_conflict_do_update(
                index_elements=["domain", "tenant_id"], set_=again, where=has_expired(self._claim_seconds)
            )
        else:
            claim = statement.on_conflict_do_nothing()
        async with self._control.transaction() as connection:
            await _lock_undeleted(connection, tenant)
            if await connection.scalar(owner) not in (None, tenant.id):
                raise _taken(name)
            row = (await connection.execute(claim.returning(domains))).one_or_none()
            if row is not None:
                await self._audit.append(
                    connection,
                    action="domain.claim",
                    tenant_id=tenant.id,
                    slug=tenant.slug,
                    actor=actor,
                    after={"domain": name},
                )
        return await self._claimed(tenant, name) if row is None else self._domain_from_row(row)

    async def verify(self, tenant: str | UUID | Tenant, domain: str, *, actor: Actor = SYSTEM) -> Domain:
        """Look up the token that the owner of ``domain`` published, and make the domain the tenant's.

        Raises:
            DomainError: the domain is not claimed by this tenant, its claim has expired, the token is not published,
                no name server answers, or another tenant verified the domain first.
        """
        tenant = await self._registry.find(tenant)
        found = await self._claimed(tenant, domain)
        if found.verified_at is not None and found.failing_since is None:
            return found
        if found.expires_at is not None and found.expires_at <= datetime.now(UTC):
            raise DomainError(f"the claim of domain {found.domain!r} has expired: claim it again")
        if not is_published(found.token, await self._records.lookup(found.challenge)):
            raise DomainError(
                f"no TXT record of {found.challenge!r} has the token of tenant {tenant.slug!r}: publish it, and verify "
                "again"
            )
        condition = (
            (domains.c.domain == found.domain) & (domains.c.tenant_id == tenant.id) & (domains.c.token == found.token)
        )
        values = {"verified_at": func.now(), "checked_at": func.now(), "failing_since": None, "failures": 0}
        statement = update(domains).where(condition).values(**values, lapsed_at=None).returning(domains)
        try:
            async with self._control.transaction() as connection:
                await _lock_undeleted(connection, tenant)
                row = (await connection.execute(statement)).one_or_none()
                if row is None:
                    raise DomainError(f"domain {found.domain!r} was released while it was verified")
                await self._audit.append(
                    connection,
                    action="domain.verify",
                    tenant_id=tenant.id,
                    slug=tenant.slug,
                    actor=actor,
                    after={"domain": found.domain},
                )
        except IntegrityError as exc:
            raise _taken(found.domain) from exc
        return self._domain_from_row(row)

    async def release(self, tenant: str | UUID | Tenant, domain: str, *, actor: Actor = SYSTEM) -> None:
        """Release ``domain``: it no longer names the tenant.

        Raises:
            DomainError: the tenant has not claimed it.
        """
        tenant = await self._registry.find(tenant)
        found = await self._claimed(tenant, domain)
        async with self._control.transaction() as connection:
            statement = delete(domains).where(domains.c.domain == found.domain, domains.c.tenant_id == tenant.id)
            if (await connection.execute(statement)).rowcount == 0:
                return  # another call has just released it
            await self._audit.append(
                connection,
                action="domain.release",
                tenant_id=tenant.id,
                slug=tenant.slug,
                actor=actor,
                before={"domain": found.domain},
            )

    async def list(self, tenant: str | UUID | Tenant) -> list[Domain]:
        """Return the tenant's domains, claimed and verified, by name."""
        tenant_id = await resolve_tenant_id(self._control, tenant)
        query = select(domains).where(domains.c.tenant_id == tenant_id).order_by(domains.c.domain)
        async with self._control.viewing(tenant_id) as connection:
            return [self._domain_from_row(row) for row in await connection.execute(query)]

    async def _claimed(self, tenant: Tenant, domain: str) -> Domain:
        name = check_domain(domain)
        query = select(domains).where(domains.c.domain == name, domains.c.tenant_id == tenant.id)
        async with self._control.connect() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise DomainError(f"domain {name!r} is not claimed by tenant {tenant.slug!r}")
        return self._domain_from_row(row)

    def _domain_from_row(self, row: Row[*tuple[Any, ...]]) -> Domain:
        expires_at = None
        if self._claim_seconds and row.verified_at is None:
            expires_at = max(row.created_at, row.lapsed_at or row.created_at) + timedelta(seconds=self._claim_seconds)
        return Domain(
            row.domain, row.tenant_id, row.token, row.created_at, row.verified_at, expires_at, row.failing_since
        )


def has_expired(claim_seconds: float) -> ColumnElement[bool]:
    """Return the condition of claims that can no longer be verified."""
    claimed_at = func.greatest(domains.c.created_at, domains.c.lapsed_at)
    return domains.c.verified_at.is_(None) & (claimed_at <= func.now() - timedelta(seconds=claim_seconds))


async def _lock_undeleted(connection: AsyncConnection, tenant: Tenant) -> None:
    """Lock the tenant against a purge until the commit, and refuse a deleted one: nobody else could have the domain."""
    _, status = await lock_tenant_for_share(connection, tenant.id)
    if status is Status.DELETED:
        raise TenantDeletedError(tenant.slug)


def _taken(domain: str) -> DomainError:
    return DomainError(f"domain {domain!r} belongs to another tenant")
