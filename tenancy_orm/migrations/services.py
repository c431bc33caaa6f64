"""What the fleet needs from the rest of the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

import asyncpg

from ..config import TenancyConfig
from ..control.database import ControlDatabase
from ..control.names import Names
from ..events import EventBus
from ..registry.rows import TenantPage, Unfinished
from ..tenant import Tenant


class FleetRegistry(Protocol):
    """The part of ``registry.registry.Registry`` that is used here."""

    async def get(self, tenant_id: UUID) -> Tenant:
        """Return the tenant with this id."""

    async def find(self, ref: str | UUID | Tenant) -> Tenant:
        """Return the tenant that ``ref`` names."""

    async def page(self, *, limit: int = 100, after: UUID | None = None) -> TenantPage:
        """Return tenants in order of creation."""

    async def unfinished(self) -> list[Unfinished]:
        """Return creations and purges under way."""

    async def is_unfinished(self, tenant_id: UUID) -> Unfinished | None:
        """Return this tenant's creation or purge under way."""

    async def set_revision(self, tenant_id: UUID, revision: str | None) -> None:
        """Record a tenant's schema revision."""


class FleetServer(Protocol):
    """The part of ``routing.servers.Server`` that is used here."""

    @property
    def host(self) -> str:
        """Where it is."""

    @property
    def port(self) -> int:
        """Its TCP port."""


class FleetServers(Protocol):
    """The part of ``routing.servers.Servers`` that is used here."""

    def __getitem__(self, name: str) -> FleetServer:
        """Return a server."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""


class FleetTemplates(Protocol):
    """The part of ``provisioning.Provisioner`` that is used here."""

    async def template(self, server: str) -> object:
        """Make sure that the template of the current schema exists."""

    def scratch(self, server: str) -> AbstractAsyncContextManager[str]:
        """Yield the name of a short-lived clone of the template."""

    async def connect_admin(
        self,
        server: str,
        database: str | None = None,
        *,
        role: str | None = None,
        settings: Mapping[str, str] = ...,
        timeout: float | None = None,
    ) -> asyncpg.Connection[Any]:
        """Connect to a server as the administrator, acting as ``role`` from the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetServices:
    """The parts of an open ``Tenancy`` that migrations work with."""

    config: TenancyConfig
    control: ControlDatabase
    registry: FleetRegistry
    servers: FleetServers
    names: Names
    provisioner: FleetTemplates
    events: EventBus


__all__ = [
    "FleetRegistry",
    "FleetServer",
    "FleetServers",
    "FleetServices",
    "FleetTemplates",
]
