"""The revision and the extensions of a tenant's database, read from the database itself."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRevision:
    """A tenant's revision, in its database (``revision``) and in the registry (``recorded``), and its extensions.

    ``at_head`` is whether the database has every head of the scripts; if it could not be read, None, with the reason in
    ``error``. Without migrations, ``revision`` is None and ``at_head`` true.

    ``missing_extensions`` are those of the setting ``extensions`` that the database lacks; an upgrade installs them.
    ``other_extensions`` are installed, but not in the setting: a revision created them, another extension needs them,
    or they were removed from the setting. They are left alone.
    """

    tenant_id: UUID
    slug: str
    server: str
    revision: str | None
    recorded: str | None
    at_head: bool | None
    error: str | None = None
    missing_extensions: tuple[str, ...] = ()
    other_extensions: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the database is at head, and has all extensions of the setting."""
        return self.at_head is True and not self.missing_extensions

    @property
    def is_recorded(self) -> bool:
        """Whether the registry has the database's revision; not so if the database was migrated by other means."""
        return self.error is None and self.revision == self.recorded
