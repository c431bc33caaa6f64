"""The control plane alone: a registry with tenants that have no databases, for tests of what needs none."""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy_orm.audit.log import AuditLog
from tenancy_orm.authentication.batch import BatchLoader
from tenancy_orm.authentication.directory import Directory
from tenancy_orm.authentication.invitation_text import InvitationSigner
from tenancy_orm.authentication.keys import IssuedKey, KeyManager
from tenancy_orm.authentication.members import MemberManager
from tenancy_orm.authentication.revocations import RevocationManager
from tenancy_orm.config import TenancyConfig
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.control.grants import application_policy
from tenancy_orm.control.models import SCHEMA
from tenancy_orm.control.viewer import viewer_of
from tenancy_orm.events import Event, EventBus
from tenancy_orm.keys.format import KeyDigester, generate_key
from tenancy_orm.postgres.quoting import quote_identifier
from tenancy_orm.registry.registry import Registry
from tenancy_orm.registry.rows import TenantDraft, uuid7
from tenancy_orm.tenant import Status, Tenant
from tests.support.registry import synchronise
from tests.support.waiting import until


@dataclass
class ControlPlane:
    """A process's view of one control database.

    ``seen`` holds every event since it was opened, ``received`` every tenant whose change the directory was told of.
    """

    config: TenancyConfig
    control: ControlDatabase
    audit: AuditLog
    registry: Registry
    events: EventBus
    directory: Directory
    keys: KeyManager
    seen: list[Event] = field(default_factory=list)
    received: list[UUID | None] = field(default_factory=list)

    @cached_property
    def members(self) -> MemberManager:
        """Members, with invitations that are signed under one key."""
        signer = InvitationSigner(self.control.installation, {"1": b"k" * 32})
        return MemberManager(self.control, self.config.members, self.directory, self.audit, self.events, signer)

    @cached_property
    def revocations(self) -> RevocationManager:
        """Revocations of tokens and sessions."""
        return RevocationManager(self.control, self.directory, self.audit, self.events)

    async def tenant(
        self, slug: str, *, status: Status = Status.ACTIVE, scopes: Sequence[str] = ()
    ) -> tuple[Tenant, str]:
        """Register a tenant as if it had been provisioned; returns it and its first API key."""
        tenant_id = uuid7()
        draft = TenantDraft(
            id=tenant_id,
            slug=slug,
            tier=self.config.default_tier,
            server="default",
            database=f"db_{tenant_id.hex}",
            role=f"role_{tenant_id.hex}",
            sealed_password=b"sealed",
            target_status=status,
        )
        await self.registry.register(draft)
        key = generate_key(
            self.config.keys.prefix, KeyDigester(self.config.keys.decoded_peppers, self.config.keys.pepper_current)
        )
        tenant = await self.registry.complete(tenant_id, revision=None, key=key, scopes=scopes)
        if self.directory.statistics.listening:
            # or the notification of this very change would make it forget what a test is about to look up
            await until(lambda: tenant_id in self.received)
        return tenant, key.text

    async def key(self, tenant: str | UUID | Tenant, **options: Any) -> IssuedKey:
        """Issue a key."""
        return await self.keys.issue(tenant, **options)

    def of(self, kind: type[Event]) -> list[Event]:
        """The events of one class, in order."""
        return [event for event in self.seen if isinstance(event, kind)]


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


def follow(monkeypatch: pytest.MonkeyPatch, batch: BatchLoader[Any, Any], then: Callable[[], object]) -> None:
    """Call ``then``, a function or a coroutine function, between a look-up's query and its answer."""
    load = batch._load

    async def load_and_follow(wanted: list[Any]) -> Mapping[Any, Any]:
        found = await load(wanted)
        outcome = then()
        if inspect.isawaitable(outcome):
            await outcome
        return found

    monkeypatch.setattr(batch, "_load", load_and_follow)


@asynccontextmanager
async def control_plane(
    url: str,
    *,
    initialise: bool = True,
    opened: bool = True,
    through: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> AsyncIterator[ControlPlane]:
    """Open a control plane.

    Args:
        url: The control database.
        initialise: Whether to migrate it first.
        opened: Whether the directory listens for invalidations.
        through: Another URL of the same database, for the directory alone.
        clock: The directory's.
        options: Changes of a ``TenancyConfig``.
    """
    config = TenancyConfig(control_url=url).replace(**options)
    events = EventBus()
    control = ControlDatabase(url)
    looked_up = ControlDatabase(through or url)
    audit = AuditLog(control)
    directory = Directory(looked_up, config, events, audit=audit, clock=clock)
    keys = KeyManager(control, config, directory, audit, events)
    plane = ControlPlane(config, control, audit, Registry(control, audit), events, directory, keys)
    events.subscribe(Event, plane.seen.append)
    directory.on_invalidate(plane.received.append)
    look_again = directory.look_again

    def receive(tenant_id: UUID) -> None:
        look_again(tenant_id)
        plane.received.append(tenant_id)

    # a creation calls back nobody
    directory.look_again = receive  # type: ignore[method-assign]
    try:
        if initialise:
            await control.upgrade()
            await synchronise(control, config.tiers, {"default": ("127.0.0.1", 5432)})
        await control.open()
        if opened:
            await directory.open()
        yield plane
    finally:
        await directory.close()
        await looked_up.close()
        await control.close()
        await events.drain()


async def revoke_application(connection: AsyncConnection, role: str) -> None:
    """Take back all that ``grant_application`` gives to ``role``, but for its right to connect; as the owner."""
    grantee, policy = quote_identifier(role), application_policy(role)
    for kind in ("TABLES", "SEQUENCES", "FUNCTIONS"):
        await connection.exec_driver_sql(f"REVOKE ALL ON ALL {kind} IN SCHEMA {SCHEMA} FROM {grantee}")
    await connection.exec_driver_sql(f"REVOKE ALL ON SCHEMA {SCHEMA} FROM {grantee}")
    tables = await connection.scalars(text("SELECT tablename FROM pg_policies WHERE policyname = :p"), {"p": policy})
    for table in tables.all():
        await connection.exec_driver_sql(f"DROP POLICY {policy} ON {SCHEMA}.{quote_identifier(table)}")
    await connection.exec_driver_sql(f"REVOKE {quote_identifier(await viewer_of(connection))} FROM {grantee}")
