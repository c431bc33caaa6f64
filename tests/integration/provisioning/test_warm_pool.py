"""The warm pool: databases made ahead of need, each for one creation, and never for a second one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm.errors import ProvisioningError
from tenancy_orm.postgres.connections import version
from tenancy_orm.protocols import GrantTarget
from tenancy_orm.provisioning import ReconcileReport, warm_pool
from tenancy_orm.provisioning.creation.warm_creation import recipe
from tenancy_orm.provisioning.provisioner import settings_of
from tenancy_orm.provisioning.rights import grants
from tenancy_orm.provisioning.warm_pool import WarmReport
from tenancy_orm.registry.rows import uuid7
from tenancy_orm.tenant import Status
from tests.support.postgres import Postgres
from tests.support.provisioning import TABLES, ScriptSchema, Workshop, names_of, open_workshop, placement
from tests.support.waiting import until

# what is left on the server is compared as a whole
pytestmark = pytest.mark.new_installation

POOL: dict[str, Any] = {"warm_pool": 2, "warm_pool_max": 2, "warm_pool_background": False}


@pytest.fixture
async def workshop(postgres: Postgres, control_url: str, name_prefix: str) -> AsyncIterator[Workshop]:
    """A provisioner with an empty pool of two."""
    opened = await open_workshop(
        control_url=control_url, admin_url=postgres.admin_url, name_prefix=name_prefix, provisioning=POOL
    )
    try:
        yield opened
    finally:
        await opened.close()


async def ready(workshop: Workshop) -> list[str]:
    """The warm databases that can be claimed."""
    async with workshop.control.connect() as connection:
        return list(await connection.scalars(text("SELECT name FROM tenancy.warm_databases WHERE state = 'ready'")))


async def fill(workshop: Workshop) -> list[str]:
    """Fill the pool; the names of what is in it."""
    report = await workshop.provisioner.warm_pool.refill()
    assert report.errors == ()
    return await ready(workshop)


async def test_a_creation_claims_a_warm_database(workshop: Workshop) -> None:
    """The tenant is complete, with an id made at the claim; the database keeps its name, and is nobody else's."""
    warm = await fill(workshop)
    assert len(warm) == 2
    before = uuid7()
    tenant, other = await workshop.create("acme", tier="enterprise"), await workshop.create("globex")
    assert {placement(tenant).database, placement(other).database} == set(warm)
    assert placement(tenant).database == placement(tenant).role != workshop.names.tenant(tenant.id)
    assert before.int >> 80 <= tenant.id.int >> 80 <= other.id.int >> 80  # milliseconds
    assert all(name < workshop.names.tenant(before) for name in warm)
    assert (tenant.status, tenant.schema_revision) == (Status.ACTIVE, "0001")
    assert await ready(workshop) == []
    assert await workshop.present() == names_of(tenant) | names_of(other)
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('hello')")
        assert await connection.fetchval("SELECT body FROM bodies") == "hello"
        limit = await connection.fetchval("SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user")
    assert limit == workshop.config.tiers["enterprise"].connection_limit
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with workshop.connect(tenant, placement(other).database):
            pass
    assert await workshop.provisioner.reconcile() == ReconcileReport()
    # empty: a cold one
    cold = await workshop.create("initech")
    assert placement(cold).database == workshop.names.tenant(cold.id)
    assert await workshop.provisioner.reconcile() == ReconcileReport()


async def test_nobody_can_use_a_warm_database(workshop: Workshop) -> None:
    """It is sealed, PUBLIC has no right on it, and its role has neither LOGIN nor a password."""
    tenant = await workshop.create("acme")
    (name, _) = await fill(workshop)
    for _ in range(2):
        with pytest.raises((asyncpg.ObjectNotInPrerequisiteStateError, asyncpg.InsufficientPrivilegeError)):
            async with workshop.connect(tenant, name):
                pass
        # the rights hold without the seal
        async with workshop.admin() as connection:
            await connection.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')
    async with workshop.admin() as connection:
        row = await connection.fetchrow("SELECT rolcanlogin, rolpassword FROM pg_authid WHERE rolname = $1", name)
        assert tuple(row) == (False, None)
        assert not await connection.fetchval("SELECT has_database_privilege($1::text, $1::text, 'CONNECT')", name)
    # what somebody has opened is not given to a tenant
    report = await workshop.provisioner.reconcile()
    assert report == ReconcileReport(orphans=(name,))
    assert name not in await ready(workshop)


async def test_many_creations_get_different_databases(workshop: Workshop) -> None:
    """Two of them are warm; all are whole."""
    warm = await fill(workshop)
    tenants = await asyncio.gather(*(workshop.create(f"t{number}") for number in range(6)))
    names = {placement(tenant).database for tenant in tenants}
    assert len(names) == 6 and names > set(warm)
    assert await workshop.consistent()
    for tenant in tenants:
        async with workshop.connect(tenant) as connection:
            assert await connection.fetchval("SELECT count(*) FROM notes") == 0
    assert await workshop.provisioner.reconcile() == ReconcileReport()


@pytest.mark.parametrize("damage", ["dropped", "opened", "marked", "no role"])
async def test_a_damaged_warm_database_is_replaced(workshop: Workshop, damage: str) -> None:
    """The creation makes a cold one; what is left of the other is removed."""
    for name in await fill(workshop):
        statement = {
            "dropped": f'DROP DATABASE "{name}"',
            "opened": f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true',
            "marked": f"COMMENT ON DATABASE \"{name}\" IS 'another tenant''s'",
            "no role": f'ALTER ROLE "{name}" RENAME TO "{name}x"',
        }[damage]
        async with workshop.admin() as connection:
            await connection.execute(statement)
    tenant = await workshop.create("acme")
    assert placement(tenant).database == workshop.names.tenant(tenant.id)
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('hello')")
    assert len(await ready(workshop)) == 1


async def test_a_damaged_warm_database_that_cannot_be_dropped_fails_no_creation(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's prepared transaction in it, for example: reconcile drops it later."""
    warm = await fill(workshop)
    for name in warm:
        async with workshop.admin() as connection:
            await connection.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')

    async def fail(*_: object) -> None:
        raise ProvisioningError("it is in use")

    with monkeypatch.context() as patch:
        patch.setattr("tenancy_orm.provisioning.server_objects.removal.drop_database", fail)
        tenant = await workshop.create("acme")
    assert placement(tenant).database == workshop.names.tenant(tenant.id)
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('hello')")
    assert set((await workshop.provisioner.reconcile()).orphans) == set(warm)


@pytest.mark.parametrize("by", ["a creation", "a killed creation", "a drain", "a filling", "a reconcile"])
async def test_a_database_that_a_lost_tenant_has_is_kept(workshop: Workshop, by: str) -> None:
    """An older backup of the control database says that it is warm: nobody drops it, or gives it away."""
    warm = await fill(workshop)
    tenants = [await workshop.create("lost"), await workshop.create("lost-too")]
    async with workshop.connect(tenants[0]) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('precious')")
    async with workshop.control.transaction() as connection:
        restored = (
            "INSERT INTO tenancy.warm_databases (name, server, template, recipe, state, wanted_at) "
            "SELECT database_name, server, 't', :recipe, 'ready', '-infinity' FROM tenancy.tenants"
        )
        settings = await settings_of(workshop.provisioner, "default")
        template = await workshop.provisioner.template("default")
        async with workshop.admin() as admin:
            wanted = recipe(workshop.provisioner._services, template, settings, version(admin))
        # other recipes' are dropped by a filling, these are claimed
        await connection.execute(text(restored), {"recipe": "other" if by == "a filling" else wanted})
        await connection.execute(text("ALTER TABLE tenancy.tenants DISABLE TRIGGER tenants_guard"))
        await connection.execute(text("DELETE FROM tenancy.tenants"))
        await connection.execute(text("ALTER TABLE tenancy.tenants ENABLE TRIGGER tenants_guard"))
    match by:
        case "a creation":
            new = [await workshop.create(f"t{number}") for number in range(2)]
            assert not {placement(tenant).database for tenant in new} & set(warm)
        case "a killed creation":
            draft = workshop.draft("killed")
            claimed = await workshop.registry.register(draft, recipe=wanted, claimed_step="proved")
            assert placement(claimed).database in warm
        case "a drain":
            await workshop.provisioner.warm_pool.drain()
        case "a filling":
            await workshop.provisioner.warm_pool.refill()
    report = await workshop.provisioner.reconcile()
    assert set(report.unknown) == set(warm) and report.errors == ()
    assert not set(await ready(workshop)) & set(warm)
    async with workshop.connect(tenants[0]) as connection:
        assert await connection.fetchval("SELECT body FROM notes") == "precious"


async def test_a_refused_creation_takes_nothing_from_the_pool(workshop: Workshop) -> None:
    """The claim and the tenant's row are one transaction."""
    await workshop.create("acme")
    warm = await fill(workshop)
    with pytest.raises(Exception, match="acme"):
        await workshop.create("acme")
    assert await ready(workshop) == warm


async def test_filling_stops_at_the_target(workshop: Workshop) -> None:
    """A second filling makes nothing, and one that runs at the same time does not either."""
    pool = workshop.provisioner.warm_pool
    reports = await asyncio.gather(pool.refill(), pool.refill())
    assert sorted(len(report.made) for report in reports) == [0, 2]
    assert await pool.refill() == WarmReport()
    (status,) = await pool.status()
    assert (status.ready, status.target, status.incomplete, status.others) == (2, 2, 0, 0)
    drained = await pool.drain()
    assert len(drained.dropped) == 2 and await workshop.present() == set()


async def test_the_pool_follows_the_rate_of_creations(workshop: Workshop) -> None:
    """As many as the busiest ten minutes of the last day, within the bounds."""
    provisioner = workshop.provisioner_of(provisioning=POOL | {"warm_pool": 1, "warm_pool_max": 4})
    pool = provisioner.warm_pool
    assert await pool.target("default") == 1
    for number in range(3):
        await provisioner.create(workshop.draft(f"t{number}"), key=None)
    # of one window, or of two if it has just ended
    assert await pool.target("default") in (2, 3)
    for number in range(3, 9):
        await provisioner.create(workshop.draft(f"t{number}"), key=None)
    assert await pool.target("default") == 4
    assert len((await pool.refill()).made) == 4
    # a target that falls to less than half drops the oldest ones
    smaller = workshop.provisioner_of(provisioning=POOL | {"warm_pool": 1, "warm_pool_max": 1})
    assert len((await smaller.warm_pool.refill()).dropped) == 3


def let_truncate(target: GrantTarget) -> list[str]:
    """A grant hook."""
    return [f"GRANT TRUNCATE ON notes TO {target.role}"]


async def test_releases_and_settings_have_pools_of_their_own(workshop: Workshop) -> None:
    """Neither claims the other's, nor drops them while they are asked for; an upgrade's are the newest schema's."""
    old = await fill(workshop)
    newer = ScriptSchema(TABLES + "ALTER TABLE notes ADD COLUMN author text;", fingerprint="newer")
    others = {
        "schema": workshop.provisioner_of(newer),
        "privileges": workshop.provisioner_of(provisioning=POOL | {"tenant_privileges": ("TEMPORARY",)}),
        "settings": workshop.provisioner_of(provisioning=POOL | {"role_settings": {"work_mem": "5MB"}}),
        "hook": workshop.provisioner_of(provisioning=POOL | {"grants": let_truncate}),
    }
    for slug, other in others.items():
        cold = await other.create(workshop.draft(slug), key=None)
        assert placement(cold).database == workshop.names.tenant(cold.id)
        report = await other.warm_pool.refill()
        assert (len(report.made), report.dropped) == (2, ())
        warm = await other.create(workshop.draft(f"{slug}-warm"), key=None)
        assert placement(warm).database in report.made
    tenant = await workshop.registry.find("schema-warm")
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body, author) VALUES ('a', 'b')")
    async with workshop.connect(await workshop.registry.find("hook-warm")) as connection:
        await connection.execute("TRUNCATE notes")
    assert set(old) <= set(await ready(workshop))
    (status,) = await others["hook"].warm_pool.status()
    assert (status.ready, status.others) == (1, 5)
    # nobody has asked for the old ones in a while
    async with workshop.control.transaction() as connection:
        query = "UPDATE tenancy.warm_databases SET wanted_at = now() - interval '16 minutes' WHERE name = ANY(:names)"
        await connection.execute(text(query), {"names": old})
    assert set((await others["hook"].warm_pool.prune()).dropped) == set(old)
    report = await others["hook"].warm_pool.refill(replace=True)
    assert (len(report.made), len(report.dropped)) == (1, 3)


async def test_housekeeping_leaves_the_pool_of_its_own_settings(workshop: Workshop) -> None:
    """An application asks for it only when it creates a tenant, which may be seldom."""
    made = await fill(workshop)
    async with workshop.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.warm_databases SET wanted_at = now() - interval '16 minutes'"))
    assert (await workshop.provisioner.warm_pool.prune()).dropped == ()
    assert set(await ready(workshop)) == set(made)


async def test_a_failed_filling_leaves_nothing(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported, and the next one does it."""
    await workshop.provisioner.template("default")

    async def fail(*_: object, **__: object) -> None:
        raise ProvisioningError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(grants, "grant_and_mark", fail)
        report = await workshop.provisioner.warm_pool.refill()
    assert (report.made, len(report.errors)) == ((), 1) and "injected" in report.errors[0]
    assert (await workshop.present(), await ready(workshop)) == (set(), [])
    assert len(await fill(workshop)) == 2


async def test_filling_gives_way_to_creations(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any process: a row that says provisioning is enough."""
    await workshop.provisioner.template("default")
    monkeypatch.setattr(warm_pool, "_PATIENCE_SECONDS", 0.5)
    draft = workshop.draft("acme")
    await workshop.registry.register(draft)
    async with workshop.control.transaction() as connection:
        # the trigger sets the time of the last change
        await connection.execute(text("UPDATE tenancy.tenants SET step = 'role'"))
    assert await workshop.provisioner.warm_pool.refill() == WarmReport()
    await workshop.registry.discard(draft.id, step="role", error="")
    assert len(await fill(workshop)) == 2


async def test_a_creation_refills_the_pool_in_the_background(workshop: Workshop) -> None:
    """A process that has created a tenant does, and ends it with itself."""
    provisioner = workshop.provisioner_of(provisioning=POOL | {"warm_pool_background": True})
    await provisioner.create(workshop.draft("acme"), key=None)

    async def is_full() -> bool:
        return len(await ready(workshop)) == 2

    await until(is_full)
    await provisioner.create(workshop.draft("globex"), key=None)
    await provisioner.close()
    assert await workshop.provisioner.reconcile() == ReconcileReport()
    assert len(await ready(workshop)) == 1
