"""Protocols that an application can implement, and the values that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol, TypeAlias
from uuid import UUID


class Admission(Protocol):
    """What a request was let in with, such as an API key. It is checked before each use of the tenant."""

    def check(self) -> None:
        """Raise if the credential is no longer valid.

        Raises:
            AdmissionEndedError: it was revoked, has expired, or has lost rights.
            TenantUnavailableError, TenantNotFoundError: the tenant's status admits no session.
        """


class SecretProvider(Protocol):
    """Where secrets are kept: the environment, files, HashiCorp Vault, AWS Secrets Manager, or your own."""

    async def read(self, name: str) -> str:
        """Return the secret of this name.

        Raises:
            SecretNotFoundError: there is none.
            SecretProviderError: the provider does not answer, or refuses.
        """

    async def close(self) -> None:
        """End connections."""


class KeyWrapper(Protocol):
    """Encrypts keys under a key that never leaves its store: Vault's transit engine, AWS KMS, or your own."""

    @property
    def name(self) -> str:
        """The kind and name of the wrapping key, which is recorded beside every key that it wrapped."""

    async def wrap(self, key: bytes, *, context: Mapping[str, str]) -> bytes:
        """Encrypt ``key`` so that it can only be decrypted with the same ``context``.

        Raises:
            SecretProviderError: the provider does not answer, or refuses.
        """

    async def unwrap(self, wrapped: bytes, *, context: Mapping[str, str]) -> bytes:
        """Decrypt what ``wrap`` made.

        Raises:
            SecretProviderError: the provider does not answer, or refuses, for example because the context is another.
        """

    async def close(self) -> None:
        """End connections."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """How much of one resource one tenant used in one period.

    Args:
        id: The record's number.
        tenant_id: The tenant that used it.
        slug: The tenant's slug now.
        metadata: The tenant's metadata now, or when it was purged; it may hold the receiver's own id of the tenant.
        resource: What was used.
        period: "day" or "month".
        period_start: Its first instant, UTC.
        period_end: The first instant after it, UTC.
        quantity: How much, above 0.
        idempotency_key: 64 hexadecimal digits; the same however often this record is made.
        attempts: How many attempts to send it there were, including this one.
    """

    id: int
    tenant_id: UUID
    slug: str
    metadata: Mapping[str, Any] = field(repr=False)
    resource: str
    period: Literal["day", "month"]
    period_start: datetime
    period_end: datetime
    quantity: int
    idempotency_key: str
    attempts: int


class UsageSender(Protocol):
    """Sends usage records to wherever usage is billed."""

    async def send(self, record: UsageRecord) -> bool:
        """Send ``record``; returns False if it is not to be billed at all.

        Raises:
            UsageExportError: it could not be sent; ``permanent`` if another attempt cannot succeed.
        """


@dataclass(frozen=True, slots=True)
class GrantTarget:
    """What a grant hook writes its statements for. The names are quoted: they can be put into SQL as they are.

    Args:
        database: The tenant's database.
        role: The tenant's role.
        owner: The role that owns the database and its tables; the statements run as this role.
        server_version: PostgreSQL's major version, 18 for example.
    """

    database: str
    role: str
    owner: str
    server_version: int


GrantHook: TypeAlias = Callable[[GrantTarget], Iterable[str]]
"""Returns SQL statements, such as ``GRANT`` and ``REVOKE``, for one tenant's database. They must be repeatable."""
