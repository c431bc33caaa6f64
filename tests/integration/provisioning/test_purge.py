"""Purging tenants, and blocking their logins before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm.errors import (
    ControlUnavailableError,
    InvalidTransitionError,
    ProvisioningError,
    TenantExistsError,
    TenantNotFoundError,
)
from tenancy_orm.keys.format import generate_key
from tenancy_orm.postgres import locks
from tenancy_orm.postgres.failures import SERVER_FAILURES
from tenancy_orm.provisioning.creation.pipeline import tenant_key
from tenancy_orm.provisioning.server_objects import removal, roles
from tenancy_orm.provisioning.server_objects.blockers import PreparedTransaction
from tenancy_orm.tenant import Status, Tenant
from tests.support.postgres import ENDED
from tests.support.provisioning import Workshop, names_of, placement

_MEMBER = text("INSERT INTO tenancy.members (tenant_id, subject, roles) VALUES (:id, 'alice', '{owner}')")
_INVITATION = text(
    "INSERT INTO tenancy.invitations (id, tenant_id, roles, email, digest, expires_at) "
    "VALUES (gen_random_uuid(), :id, '{member}', 'bob@example.com', sha256('secret'), now() + interval '1 day')"
)

# --- purge ----------------------------------------------------------------------------------------------------------


async def test_a_purge_leaves_a_tombstone_and_nothing_else(workshop: Workshop) -> None:
    """Database, role, keys and secrets are removed; the row is a tombstone."""
    draft = workshop.draft("acme", metadata={"plan": "annual"})
    await workshop.provisioner.create(draft, key=generate_key("ten_test"))
    async with workshop.control.transaction() as connection:
        await connection.execute(_MEMBER, {"id": draft.id})
        await connection.execute(_INVITATION, {"id": draft.id})
    _, deleted = await workshop.registry.transition(draft.id, Status.DELETED, action="tenant.delete")
    await workshop.provisioner.purge(deleted)
    assert await workshop.present() == set()
    async with workshop.control.connect() as connection:
        row = (await connection.execute(text("SELECT * FROM tenancy.tenants"))).mappings().one()
        for table in ("api_keys", "members", "invitations"):
            assert await connection.scalar(text(f"SELECT count(*) FROM tenancy.{table}")) == 0, table
    assert (row["status"], row["sealed_password"], row["metadata"]) == ("purged", None, {})
    tombstone = await workshop.registry.get(draft.id)
    assert tombstone.placement is None
    with pytest.raises(TenantNotFoundError):
        workshop.provisioner.password(tombstone)


async def test_a_purge_ends_open_connections(workshop: Workshop) -> None:
    """An open connection does not keep the database from being dropped."""
    tenant = await workshop.deleted("acme")
    async with workshop.connect(tenant) as connection:
        await connection.execute("BEGIN; INSERT INTO notes (body) VALUES ('x')")
        await workshop.provisioner.purge(tenant)
    assert await workshop.present() == set()


async def test_a_living_tenant_is_not_purged(workshop: Workshop) -> None:
    """It must be deleted first; its connections are not touched."""
    tenant = await workshop.create("acme")
    async with workshop.connect(tenant) as connection:
        with pytest.raises(InvalidTransitionError):
            await workshop.provisioner.purge(tenant)
        assert await connection.fetchval("SELECT 1") == 1
    assert await workshop.present() == names_of(tenant)


async def test_a_stale_tenant_object_does_not_purge_a_restored_tenant(workshop: Workshop) -> None:
    """The tenant's state in the registry decides, not that of the caller's object."""
    tenant = await workshop.deleted("acme")
    await workshop.registry.transition(tenant.id, None, action="tenant.restore")
    with pytest.raises(InvalidTransitionError):
        await workshop.provisioner.purge(tenant)
    assert await workshop.present() == names_of(tenant)


async def test_a_purged_tenant_cannot_be_purged_again(workshop: Workshop) -> None:
    """The registry refuses to purge a tenant that is purged already."""
    tenant = await workshop.deleted("acme")
    await workshop.provisioner.purge(tenant)
    with pytest.raises(InvalidTransitionError):
        await workshop.provisioner.purge(tenant)


async def test_the_slug_is_free_only_when_the_database_is_gone(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During the purge no other tenant can take the slug."""
    tenant = await workshop.deleted("acme")
    remove = removal.purge

    async def removing(*args: object, **options: object) -> None:
        with pytest.raises(TenantExistsError):
            await workshop.create("acme")
        await remove(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(removal, "purge", removing)
    await workshop.provisioner.purge(tenant)
    again = await workshop.create("acme")
    assert again.id != tenant.id
    assert await workshop.present() == names_of(again)


Break = Callable[[Workshop, pytest.MonkeyPatch], None]


def before_removal(workshop: Workshop, patch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise OSError("on purpose")

    patch.setattr(removal, "purge", fail)


def between_database_and_role(workshop: Workshop, patch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise OSError("on purpose")

    patch.setattr(roles, "drop", fail)


def after_removal(workshop: Workshop, patch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ControlUnavailableError("on purpose")

    patch.setattr(workshop.registry, "finish_purge", fail)


@pytest.mark.parametrize("breaking", [before_removal, between_database_and_role, after_removal])
@pytest.mark.parametrize("by", ["repeating", "reconcile"])
async def test_an_interrupted_purge_can_be_finished(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, breaking: Break, by: str
) -> None:
    """Another purge or reconcile finishes it; until then the tenant cannot be restored, nor its slug be taken."""
    tenant = await workshop.deleted("acme")
    with monkeypatch.context() as patch:
        breaking(workshop, patch)
        with pytest.raises((ProvisioningError, ControlUnavailableError)):
            await workshop.provisioner.purge(tenant)
    with pytest.raises(InvalidTransitionError):
        await workshop.registry.transition(tenant.id, None, action="tenant.restore")
    with pytest.raises(TenantExistsError):
        await workshop.create("acme")
    if by == "repeating":
        await workshop.provisioner.purge(tenant)
    else:
        report = await workshop.provisioner.reconcile()
        assert (report.purged, report.errors) == (("acme",), ())
    assert (await workshop.present(), await workshop.slugs()) == (set(), {"acme": "purged"})


async def test_a_purge_waits_for_whoever_works_on_the_tenant(workshop: Workshop) -> None:
    """A purge takes the tenant's lock first; if that is not released, it fails at its deadline."""
    tenant = await workshop.deleted("acme")
    impatient = workshop.provisioner_of(provisioning={"timeout": 0.2})
    async with workshop.admin() as connection:
        await locks.lock(connection, tenant_key(tenant.id), timeout=1)
        with pytest.raises(ProvisioningError, match="'acme'") as caught:
            await impatient.purge(tenant)
        assert caught.value.step == "purge"
    assert await workshop.present() == names_of(tenant)
    await workshop.provisioner.purge(tenant)


async def test_purging_at_once_purges_once(workshop: Workshop) -> None:
    """Of concurrent purges one succeeds; the others are refused."""
    tenant = await workshop.deleted("acme")
    outcomes = await asyncio.gather(*(workshop.provisioner.purge(tenant) for _ in range(4)), return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == 1
    assert all(outcome is None or isinstance(outcome, InvalidTransitionError) for outcome in outcomes)
    assert await workshop.present() == set()


# --- logins ---------------------------------------------------------------------------------------------------------


async def test_a_barred_role_is_refused_and_its_connections_end(workshop: Workshop) -> None:
    """PostgreSQL refuses the role, and idle and busy connections have ended when the call returns."""
    tenant = await workshop.create("acme")
    async with workshop.connect(tenant) as idle, workshop.connect(tenant) as busy:
        sleeping = asyncio.create_task(busy.execute("SELECT pg_sleep(60)"))
        await workshop.set_login(tenant, False)
        async with workshop.admin() as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1"
            assert await connection.fetchval(query, placement(tenant).role) == 0
        with pytest.raises(ENDED):
            await sleeping
        with pytest.raises(ENDED):
            await idle.execute("SELECT 1")
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        async with workshop.connect(tenant):
            pass
    await workshop.set_login(tenant, True)
    async with workshop.connect(tenant) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_no_connection_survives_a_storm_of_logins(workshop: Workshop) -> None:
    """A login that is under way while logins are blocked is refused or ended."""
    tenant = await workshop.create("acme")
    stop = asyncio.Event()

    async def log_in_again_and_again() -> None:
        while not stop.is_set():
            try:
                async with workshop.connect(tenant) as connection:
                    await connection.execute("SELECT pg_sleep(5)")
            except SERVER_FAILURES:
                continue

    tasks = [asyncio.create_task(log_in_again_and_again()) for _ in range(4)]
    async with workshop.admin() as connection:
        for _ in range(5):
            await workshop.set_login(tenant, False)
            query = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1"
            assert await connection.fetchval(query, placement(tenant).role) == 0
            await workshop.set_login(tenant, True)
    stop.set()
    await workshop.set_login(tenant, False)
    await asyncio.gather(*tasks)


async def test_barring_has_a_deadline(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that does not end is reported at the deadline."""
    tenant = await workshop.create("acme")

    async def still_there(*_: object) -> bool:
        return True

    monkeypatch.setattr(roles, "end_connections", still_there)
    with pytest.raises(ProvisioningError, match=r"tenant 'acme'.* within 0\.2 s") as caught:
        await workshop.set_login(tenant, False, timeout=0.2)
    assert caught.value.step == "align"


async def drop_everything(workshop: Workshop, tenant: Tenant) -> None:
    async with workshop.admin() as connection:
        place = placement(tenant)
        deadline = asyncio.get_running_loop().time() + 5
        await removal.remove(
            connection, workshop.blockers(), workshop.names, database=place.database, role=place.role, deadline=deadline
        )


@pytest.mark.parametrize("allowed", [True, False])
async def test_a_missing_role_is_an_error(workshop: Workshop, allowed: bool) -> None:
    """The message names the remedy."""
    tenant = await workshop.create("acme")
    await drop_everything(workshop, tenant)
    with pytest.raises(ProvisioningError, match="tenancy reconcile"):
        await workshop.set_login(tenant, allowed)


async def test_removing_what_is_gone_does_nothing(workshop: Workshop) -> None:
    """Every function that removes can be called again."""
    tenant = await workshop.create("acme")
    for _ in range(2):
        await drop_everything(workshop, tenant)
    assert await workshop.present() == set()


async def test_the_change_that_was_committed_last_decides(workshop: Workshop) -> None:
    """A suspension that reaches the server late does not block a tenant that was activated after it."""
    tenant = await workshop.create("acme")
    _, suspended = await workshop.registry.transition(tenant.id, Status.SUSPENDED, action="tenant.suspend")
    _, active = await workshop.registry.transition(tenant.id, Status.ACTIVE, action="tenant.activate")
    await workshop.provisioner.align(active)
    await workshop.provisioner.align(suspended)
    async with workshop.connect(tenant) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_aligning_waits_for_whoever_works_on_the_tenant(workshop: Workshop) -> None:
    """Aligning waits for the tenant's lock until its deadline."""
    tenant = await workshop.create("acme")
    async with workshop.admin() as connection:
        await locks.lock(connection, tenant_key(tenant.id), timeout=1)
        with pytest.raises(ProvisioningError, match="'acme'") as caught:
            await workshop.provisioner.align(tenant, timeout=0.2)
    assert caught.value.step == "align"
    await workshop.provisioner.align(tenant)


async def test_a_purged_tenant_has_no_role_to_change(workshop: Workshop) -> None:
    """Aligning a purged tenant raises ``TenantNotFoundError``."""
    tenant = await workshop.deleted("acme")
    await workshop.provisioner.purge(tenant)
    tombstone = await workshop.registry.get(tenant.id)
    with pytest.raises(TenantNotFoundError):
        await workshop.provisioner.align(tombstone)


async def test_a_prepared_transaction_that_has_ended_is_not_counted_as_rolled_back(workshop: Workshop) -> None:
    """Its owner was faster: the watchdog must not report, nor write into the audit log, what it did not do."""
    tenant = await workshop.create("acme")
    place = placement(tenant)
    gone = PreparedTransaction("gone", place.role, place.database)
    assert await workshop.blockers().roll_back(gone) is False
