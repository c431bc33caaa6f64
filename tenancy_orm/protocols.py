"""What an application may give the package: protocols, and what travels through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol
from uuid import UUID


class Admission(Protocol):
    """What a request was let in with: an API key, for example. It is asked before anything is done with the tenant."""

    def check(self) -> None:
        """Refuse where it does not hold any more.

        Raises:
            AdmissionEndedError: it was revoked, has expired, or may do less by now.
            TenantUnavailableError, TenantNotFoundError: the tenant's status admits nobody.
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
    """Encrypts keys under a key that never leaves its place: Vault's transit engine, AWS KMS, or your own."""

    @property
    def name(self) -> str:
        """What and which key this is, to be recorded beside what it wrapped."""

    async def wrap(self, key: bytes, *, context: Mapping[str, str]) -> bytes:
        """Encrypt ``key``, so that it is unwrapped with the same ``context`` alone.

        Raises:
            SecretProviderError: the provider does not answer, or refuses.
        """

    async def unwrap(self, wrapped: bytes, *, context: Mapping[str, str]) -> bytes:
        """Decrypt what ``wrap`` made.

        Raises:
            SecretProviderError: the provider does not answer, or refuses: another context or key, say.
        """

    async def close(self) -> None:
        """End connections."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """How much of one resource one tenant used in one period.

    Args:
        id: The record's number.
        tenant_id: Who used it.
        slug: ... and what it is called now.
        metadata: ... and the metadata it has now, or had when it was purged: the receiver's own id of it may be there.
        resource: What was used.
        period: "day" or "month".
        period_start: Its first instant, UTC.
        period_end: The first instant after it, UTC.
        quantity: How much, above 0.
        idempotency_key: 64 hexadecimal digits; the same whenever this record is made.
        attempts: How often it was tried to send it, this time included.
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
    """Takes one record to wherever usage is billed."""

    async def send(self, record: UsageRecord) -> bool:
        """Send it; False where it is not to be billed at all.

        Raises:
            UsageExportError: it could not be sent; ``permanent`` where trying again is of no use.
        """
