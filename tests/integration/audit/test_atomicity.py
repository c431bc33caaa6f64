"""A change and its audit entry are one transaction: if the entry cannot be written, nothing changes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tenancy_orm.authentication.invitation_rows import Invitation
from tenancy_orm.config import Tier
from tenancy_orm.keys.format import KeyDigester, generate_key
from tenancy_orm.postgres.errors import sqlstate_of
from tenancy_orm.quotas.manager import QuotaManager
from tenancy_orm.registry.rows import TenantDraft, uuid7
from tenancy_orm.tenant import Status, Tenant
from tenancy_orm.tenants.domains import DomainManager
from tenancy_orm.tenants.tiers import TierRegistry
from tests.support.control import ControlPlane, control_plane

REFUSED = "TN099"
TABLES = (
    *("tenants", "former_slugs", "domains", "api_keys", "tiers", "usage", "usage_records", "audit_log"),
    *("members", "invitations", "revocations"),
)


class Published:
    """A DNS resolver with the same text record under every name."""

    def __init__(self) -> None:
        self.token = ""

    async def lookup(self, name: str) -> list[str]:
        return [self.token]


@dataclass
class World:
    """Tenants in the states that changes begin from.

    acme has a key, a domain that it can verify, a member and an invitation.
    """

    plane: ControlPlane
    tenants: dict[str, Tenant]
    key_id: str
    published: Published
    invitation: Invitation | None = None

    async def accept(self) -> None:
        assert self.invitation is not None and self.invitation.text is not None
        await self.plane.members.accept(self.invitation.text, "bob")

    async def withdraw(self) -> None:
        assert self.invitation is not None
        await self.plane.members.withdraw(self.invitation.id)

    @property
    def domains(self) -> DomainManager:
        return DomainManager(self.plane.control, self.plane.audit, self.published)

    def draft(self) -> TenantDraft:
        tenant_id = uuid7()
        return TenantDraft(
            id=tenant_id,
            slug=f"initech-{tenant_id.hex[-8:]}",
            tier="free",
            server="default",
            database=f"db_{tenant_id.hex}",
            role=f"role_{tenant_id.hex}",
            sealed_password=b"sealed",
        )

    async def rows(self) -> dict[str, list[Any]]:
        """The rows of the tables that these changes write to."""
        async with self.plane.control.connect() as connection:
            return {
                table: list(
                    await connection.scalars(text(f"SELECT to_jsonb(t) FROM tenancy.{table} t ORDER BY t::text"))
                )
                for table in TABLES
            }

    async def refuse_entries(self) -> None:
        """From now on no entry can be written."""
        async with self.plane.control.engine.begin() as connection:
            query = text("SELECT pg_get_functiondef('tenancy.audit_append'::regproc)")
            definition = str(await connection.scalar(query))
            refusal = f"BEGIN\n    RAISE EXCEPTION 'refused' USING ERRCODE = '{REFUSED}';\n"
            assert definition.count("BEGIN\n") == 1
            await connection.exec_driver_sql(definition.replace("BEGIN\n", refusal))


@pytest.fixture
async def world(control_url: str) -> AsyncIterator[World]:
    async with control_plane(control_url, opened=False) as plane:
        tenants = {slug: (await plane.tenant(slug))[0] for slug in ("acme", "serviced", "deleted", "leaving")}
        tenants["waiting"] = await plane.registry.register(World(plane, {}, "", Published()).draft())
        await plane.registry.transition(tenants["serviced"].id, Status.MAINTENANCE, action="tenant.maintain")
        for slug in ("deleted", "leaving"):
            await plane.registry.transition(tenants[slug].id, Status.DELETED, action="tenant.delete")
        await plane.registry.begin_purge(tenants["leaving"].id)
        made = World(plane, tenants, (await plane.key("acme")).key_id, Published())
        made.published.token = (await made.domains.claim("acme", "acme.example.com")).token
        await plane.members.add("acme", "alice")
        made.invitation = await plane.members.invite("acme")
        await plane.revocations.add(subject="alice")
        yield made


def transition(slug: str, target: Status | None, **options: Any) -> Callable[[World], Awaitable[Any]]:
    """A change of status, as the verbs of ``TenantManager`` make it."""
    return lambda w: w.plane.registry.transition(w.tenants[slug].id, target, action="tenant.test", **options)


async def _create(world: World) -> None:
    draft = world.draft()
    await world.plane.registry.register(draft)


async def _complete(world: World) -> None:
    key = generate_key("ten_live", KeyDigester(world.plane.config.keys.decoded_peppers, None))
    await world.plane.registry.complete(world.tenants["waiting"].id, revision="1", key=key)


async def _set_quotas(world: World) -> None:
    plane = world.plane
    quotas = QuotaManager(plane.control, plane.config, plane.events, plane.audit)
    try:
        await quotas.set("acme", {"users": 5})
    finally:
        await quotas.close()


async def _apply_tiers(world: World) -> None:
    tiers = {**world.plane.config.tiers, "free": Tier("free", {"users": 1}), "new": Tier("new")}
    await TierRegistry(world.plane.control, world.plane.audit).apply(tiers)


CHANGES: dict[str, Callable[[World], Awaitable[Any]]] = {
    "create": _create,
    "complete": _complete,
    "discard": lambda w: w.plane.registry.discard(w.tenants["waiting"].id, step="database", error="no"),
    "update": lambda w: w.plane.registry.change(w.tenants["acme"].id, action="tenant.update", tier="pro"),
    "suspend": transition("acme", Status.SUSPENDED, reason="unpaid"),
    "start maintenance": transition("acme", Status.MAINTENANCE),
    "end maintenance": transition("serviced", None, leaving=Status.MAINTENANCE),
    "delete": transition("acme", Status.DELETED),
    "restore": transition("deleted", None),
    "rename": lambda w: w.plane.registry.rename(w.tenants["acme"].id, "acme-corp", redirect_seconds=60),
    "schedule suspension": lambda w: w.plane.registry.schedule_suspension(
        w.tenants["acme"].id, w.tenants["acme"].created_at, reason="notice"
    ),
    "schedule purge": lambda w: w.plane.registry.schedule_purge(w.tenants["deleted"].id, w.tenants["acme"].created_at),
    "begin purge": lambda w: w.plane.registry.begin_purge(w.tenants["deleted"].id),
    "finish purge": lambda w: w.plane.registry.finish_purge(w.tenants["leaving"].id),
    "issue a key": lambda w: w.plane.keys.issue("acme"),
    "rotate a key": lambda w: w.plane.keys.rotate(w.key_id),
    "revoke a key": lambda w: w.plane.keys.revoke(w.key_id),
    "claim a domain": lambda w: w.domains.claim("acme", "acme.example.org"),
    "verify a domain": lambda w: w.domains.verify("acme", "acme.example.com"),
    "release a domain": lambda w: w.domains.release("acme", "acme.example.com"),
    "add a member": lambda w: w.plane.members.add("acme", "bob"),
    "change a member": lambda w: w.plane.members.add("acme", "alice", ["owner"]),
    "remove a member": lambda w: w.plane.members.remove("acme", "alice"),
    "invite": lambda w: w.plane.members.invite("acme"),
    "accept an invitation": lambda w: w.accept(),
    "withdraw an invitation": lambda w: w.withdraw(),
    "revoke a token": lambda w: w.plane.revocations.add(token_id="t-1"),
    "take a revocation back": lambda w: w.plane.revocations.remove(subject="alice"),
    "set quotas": _set_quotas,
    "apply tiers": _apply_tiers,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_change_whose_entry_cannot_be_written_is_not_made(world: World, change: Callable[..., Any]) -> None:
    """Every column of every row is as it was, and the error says what the database said."""
    before = await world.rows()
    await world.refuse_entries()
    with pytest.raises((DBAPIError, asyncpg.PostgresError)) as caught:
        await change(world)
    assert sqlstate_of(caught.value) == REFUSED
    assert await world.rows() == before


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_change_leaves_one_entry(world: World, change: Callable[..., Any]) -> None:
    """With the log in order the same calls succeed, and change rows: the test above does not pass by doing nothing."""
    before = await world.rows()
    await change(world)
    after = await world.rows()
    assert len(after.pop("audit_log")) == len(before.pop("audit_log")) + 1
    assert after != before
