"""What no adoption takes, whatever it copies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from ..errors import AdoptionError, TenantNotFoundError
from ..migrations.services import FleetServices
from ..routing.marker import marker_text
from .source import OpenSource, Source, open_source


@asynccontextmanager
async def open_adoptable(services: FleetServices, source: Source) -> AsyncIterator[OpenSource]:
    """Open what is to be adopted; as ``open_source``, but not the database of a tenant of this installation.

    Raises:
        AdoptionError: it is one; or as ``open_source``.
    """
    async with open_source(source, timeout=services.config.pool.connect_timeout) as opened:
        await _refuse_own(services, opened)
        yield opened


async def _refuse_own(services: FleetServices, opened: OpenSource) -> None:
    """Refuse the database of a tenant of this installation: nobody has two tenants of one database.

    One that the registry does not know, since an older backup of the control database was restored, may be copied.

    Raises:
        AdoptionError: it is one.
    """
    stem = marker_text(services.names.installation, UUID(int=0)).removesuffix(str(UUID(int=0)))
    given = opened.marker or ""
    if not given.startswith(stem):
        return
    try:
        found = await services.registry.get(UUID(given.removeprefix(stem).partition(":")[0]))
    except TenantNotFoundError:
        return
    raise AdoptionError(f"{opened.source.dsn} is the database of tenant {found.slug!r} already: clone or move that one")


__all__ = ["open_adoptable"]
