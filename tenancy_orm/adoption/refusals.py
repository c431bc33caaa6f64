"""What no adoption takes, whatever it copies."""

from __future__ import annotations

from uuid import UUID

from ..errors import AdoptionError
from ..migrations.services import FleetServices
from ..routing.marker import marker_text
from .source import OpenSource


def refuse_own(services: FleetServices, opened: OpenSource) -> None:
    """Refuse the database of a tenant of this installation: nobody has two tenants of one database.

    Raises:
        AdoptionError: it is one.
    """
    nobody = UUID(int=0)
    stem = marker_text(services.names.installation, nobody).removesuffix(str(nobody))
    if (opened.marker or "").startswith(stem):
        raise AdoptionError(f"{opened.source.dsn} is the database of a tenant already: clone or move that one")


__all__ = ["refuse_own"]
