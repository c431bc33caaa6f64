"""The revision of a tenant's database, read from the database itself."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRevision:
    """A tenant's revision: in its database (``revision``), and in the registry (``recorded``).

    ``at_head`` is whether the database has every head of the scripts; if it could not be read, None, with the reason in
    ``error``.
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
        """Whether the registry has the database's revision; not so if the database was migrated by other means."""
        return self.error is None and self.revision == self.recorded
