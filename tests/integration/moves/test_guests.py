"""Roles of the grant hook, while the database that they use is exchanged by a move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy
from tenancy_orm.config import ProvisioningConfig
from tenancy_orm.errors import OperationError
from tenancy_orm.operations import Switch
from tenancy_orm.operations.switch import Paused
from tenancy_orm.tenant import Tenant
from tests.support.guests import BOTH, Guests, log_in
from tests.support.moving import Pair, moving_config

pytestmark = pytest.mark.new_installation

INSERT = "INSERT INTO notes (body) VALUES (%s)"


@pytest.fixture
def guests(pair: Pair, name_prefix: str) -> Guests:
    """The roles, on both servers."""
    made = Guests.named(name_prefix)
    for server in (pair.one, pair.two):
        server.query(made.statements)
    return made


@pytest.fixture
async def hooked(pair: Pair, control_url: str, name_prefix: str, guests: Guests) -> AsyncIterator[Tenancy]:
    """An open ``Tenancy`` with the grant hook."""
    config = moving_config(pair, control_url, name_prefix, provisioning=ProvisioningConfig(grants=guests.hook))
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    try:
        yield tenancy
    finally:
        await tenancy.close()


def urls(pair: Pair, prefix: str) -> dict[str, str]:
    """The superuser's URL of the tenant's database on each server that has one."""
    found = dict(name.split(":") for name in pair.databases(prefix))
    return {server: pair.on(server).url(database) for server, database in found.items()}


def comment(pair: Pair, tenant: Tenant, server: str = "one") -> object:
    """The comment of the tenant's role on a server."""
    assert tenant.placement is not None
    query = "SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = %s"
    return pair.on(server).query(query, (tenant.placement.role,))


async def test_roles_of_the_grant_hook_write_to_no_database_that_is_not_in_use(
    hooked: Tenancy, pair: Pair, guests: Guests, name_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they wrote to the old one would be lost, and its numbers be used again in the new one."""
    acme = (await hooked.tenants.create("acme")).tenant
    pair.one.query(f"COMMENT ON ROLE {acme.placement.role} IS 'of an operator'")  # type: ignore[union-attr]
    original = Switch._close
    seen: list[object] = []
    old = urls(pair, name_prefix)["one"]
    with log_in(old, guests.writer) as open_since:
        open_since.execute(INSERT, ("before",))

        async def close(switch: Switch, paused: Paused, *arguments: object) -> None:
            both = urls(pair, name_prefix)
            seen.append(guests.let_in(both["one"]))
            seen.append(guests.let_in(both["two"]))
            await original(switch, paused, *arguments)  # type: ignore[arg-type]
            seen.append([*guests.let_in(both["one"]), *guests.let_in(both["two"])])
            with pytest.raises(psycopg.OperationalError):
                open_since.execute(INSERT, ("in the pause",))

        monkeypatch.setattr(Switch, "_close", close)
        moved = await hooked.moves.move("acme", to="two")
    assert seen == [BOTH, [], []]
    assert moved.detail["reverse"] == "following"
    monkeypatch.undo()
    both = urls(pair, name_prefix)
    assert (guests.let_in(both["one"]), guests.let_in(both["two"])) == ([], BOTH)
    with log_in(both["two"], guests.writer) as there:
        there.execute(INSERT, ("after",))
        await hooked.moves.rollback("acme")
        with pytest.raises(psycopg.OperationalError):
            there.execute(INSERT, ("late",))
    assert list(urls(pair, name_prefix)) == ["one"]
    assert guests.let_in(old) == BOTH
    async with hooked.session("acme") as session:
        found = list(await session.execute(text("SELECT id, body FROM notes ORDER BY id")))
        await session.execute(text("INSERT INTO notes (body) VALUES ('next')"))
    assert [tuple(row) for row in found] == [(1, "before"), (2, "after")]
    assert comment(pair, acme) == "of an operator"
    assert (await hooked.internals.provisioner.reconcile()).clean


@pytest.mark.parametrize(("killed", "suspended"), [(False, True), (True, False)])
async def test_a_pause_that_is_given_up_lets_guests_in_again(
    hooked: Tenancy,
    pair: Pair,
    guests: Guests,
    name_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    killed: bool,
    suspended: bool,
) -> None:
    """Also where the process ends in the pause; and those of a suspended tenant, who were never shut out."""
    acme = (await hooked.tenants.create("acme")).tenant
    by_hand = f"{name_prefix}_by_hand"
    old = urls(pair, name_prefix)["one"]
    pair.one.query(f"CREATE ROLE {by_hand} LOGIN")
    pair.one.query(f"GRANT CONNECT ON DATABASE {acme.placement.database} TO {by_hand} WITH GRANT OPTION")  # type: ignore[union-attr]
    privileges = "SELECT array_agg(a::text ORDER BY a::text) FROM pg_database, unnest(datacl) a WHERE datname = %s"
    before = pair.one.query(privileges, (acme.placement.database,))  # type: ignore[union-attr]
    if suspended:
        await hooked.tenants.suspend("acme", reason="unpaid")
        before = pair.one.query(privileges, (acme.placement.database,))  # type: ignore[union-attr]
    original = Switch._close

    async def close(switch: Switch, *arguments: object) -> None:
        await original(switch, *arguments)  # type: ignore[arg-type]
        assert guests.let_in(old) == []
        assert by_hand in str(comment(pair, acme))
        raise OperationError("given up")

    async def die(*_: object) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(Switch, "_close", close)
    if killed:
        monkeypatch.setattr(Switch, "_resume", die)
    with pytest.raises(OperationError, match="given up"):
        await hooked.moves.move("acme", to="two")
    assert guests.let_in(old) == BOTH
    assert comment(pair, acme) is None
    assert pair.one.query(privileges, (acme.placement.database,)) == before  # type: ignore[union-attr]
    assert pair.writable(acme) == ([] if suspended else ["one"])
