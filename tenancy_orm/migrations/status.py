"""Which revision each tenant's database is at, read from the databases themselves."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRevision:
    """A tenant's revision: in its database, and as the registry remembers it.

    ``at_head`` tells whether the database has every head of the scripts; None, and a reason in ``error``, where it
    could not be read.
    """

    tenant_id: UUID
    slug: str
    server: str
    revision: str | None
    recorded: str | None
    at_head: bool | None
    error: str | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether the registry is right about it; it is not where someone migrated the database by other means."""
        return self.error is None and self.revision == self.recorded
