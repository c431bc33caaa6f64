"""Interrupted work is finished or removed; work under way and customers' data are left alone."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from tenancy_orm.errors import ControlUnavailableError, ProvisioningError, ServerUnavailableError
from tenancy_orm.postgres import connections, locks
from tenancy_orm.protocols import GrantTarget
from tenancy_orm.provisioning import ReconcileReport
from tenancy_orm.provisioning.creation import unfinished
from tenancy_orm.provisioning.creation.pipeline import Creation, tenant_key
from tenancy_orm.provisioning.creation.unfinished import UnfinishedWork
from tenancy_orm.provisioning.rights import grants
from tenancy_orm.provisioning.server_objects import databases, roles
from tenancy_orm.registry.rows import TenantDraft, Unfinished
from tenancy_orm.routing import marker
from tenancy_orm.tenant import Status, Tenant
from tests.support.older_rows import turn_back
from tests.support.postgres import Postgres
from tests.support.provisioning import (
    VERSIONS,
    Workshop,
    intercept,
    mended,
    names_of,
    open_workshop,
    placement,
    running_server,
    set_marker,
)
from tests.support.proxy import proxied
from tests.support.waiting import HANGS

NOTHING = ReconcileReport()


async def abandon(workshop: Workshop, draft: TenantDraft, step: str) -> None:
    """Leave a creation as a process leaves it that is killed right after ``step``."""
    creation_steps = ("registered", "role", "database", "grants", "proved")
    await workshop.registry.register(draft)
    done = creation_steps[: creation_steps.index(step) + 1]
    async with workshop.admin() as connection:
        if "role" in done:
            await roles.create(connection, draft.role, verifier="SCRAM-SHA-256$1:x", connection_limit=1)
        if "database" in done:
            template = (await workshop.provisioner.template("default")).name
            await databases.create(
                connection, draft.database, template=template, owner=workshop.names.owner, open_to_connections=False
            )
    await workshop.registry.record_step(draft.id, step)


async def forget(workshop: Workshop, tenant_id: UUID) -> None:
    """Take a tenant's row away, as restoring an older backup of the registry does."""
    async with workshop.control.transaction() as connection:
        await connection.execute(text("ALTER TABLE tenancy.tenants DISABLE TRIGGER USER"))
        await connection.execute(text("DELETE FROM tenancy.tenants WHERE id = :id"), {"id": tenant_id})
        await connection.execute(text("ALTER TABLE tenancy.tenants ENABLE TRIGGER USER"))


async def test_there_is_nothing_to_do(workshop: Workshop) -> None:
    """Active, suspended, deleted and purged tenants are not changed."""
    kept = [await workshop.create("acme"), await workshop.deleted("globex")]
    await workshop.provisioner.align(kept[1])
    await workshop.provisioner.purge(await workshop.deleted("gone"))
    before = await workshop.present()
    assert await workshop.provisioner.reconcile() == NOTHING
    assert await workshop.present() == before == names_of(kept[0]) | names_of(kept[1])


# --- creations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["registered", "role", "database", "grants"])
async def test_an_abandoned_creation_is_removed(workshop: Workshop, step: str) -> None:
    """A creation that was interrupted at any step is removed."""
    await abandon(workshop, workshop.draft("acme"), step)
    report = await workshop.provisioner.reconcile()
    assert report == ReconcileReport(removed=("acme",))
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})
    assert await workshop.provisioner.reconcile() == NOTHING


async def test_a_creation_that_does_not_prove_itself_is_removed(workshop: Workshop) -> None:
    """The last step's name is in the registry before it begins, and does not count as done."""
    await abandon(workshop, workshop.draft("acme"), "proved")
    assert await workshop.provisioner.reconcile() == ReconcileReport(removed=("acme",))
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def test_a_creation_that_proves_itself_is_completed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tenant becomes active at the revision of its database, without a key, since nobody has seen one."""
    draft = workshop.draft("acme", target_status=Status.TRIAL)
    await leave_proved(workshop, monkeypatch, draft)
    assert await workshop.provisioner.reconcile() == ReconcileReport(finished=("acme",))
    tenant = await workshop.registry.get(draft.id)
    assert (tenant.status, tenant.schema_revision) == (Status.TRIAL, "0001")
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('works')")
    async with workshop.control.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM tenancy.api_keys")) == 0


async def with_a_note(workshop: Workshop) -> Tenant:
    """A tenant with data."""
    tenant = await workshop.create("acme")
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('a customer''s')")
    return tenant


async def notes(workshop: Workshop, tenant: Tenant) -> list[str]:
    async with workshop.connect(tenant) as connection:
        return [row["body"] for row in await connection.fetch("SELECT body FROM notes")]


async def test_without_the_look_at_the_marker_a_restored_row_costs_a_customers_data(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_at_its_last_step(_self: object, _connection: object, one: Unfinished, _placement: object) -> bool:
        return one.step == "proved"

    monkeypatch.setattr(UnfinishedWork, "_is_whole", is_at_its_last_step)
    await turn_back(workshop.control, (await with_a_note(workshop)).slug, "grants")
    assert await workshop.provisioner.reconcile() == ReconcileReport(removed=("acme",))
    assert await workshop.present() == set()


@pytest.mark.parametrize("step", ["registered", "database", "grants", "proved", "unseeded", "seeds"])
async def test_a_completed_creation_with_an_older_row_is_completed_again(workshop: Workshop, step: str) -> None:
    """A backup of the control database was made while the tenant was being created, and was restored long after."""
    tenant = await with_a_note(workshop)
    await turn_back(workshop.control, "acme", step)
    assert await workshop.provisioner.reconcile(check=True) == ReconcileReport(finished=("acme",))
    assert await workshop.provisioner.reconcile() == ReconcileReport(finished=("acme",))
    again = await workshop.registry.get(tenant.id)
    assert (again.status, again.schema_revision) == (Status.ACTIVE, "0001")
    assert await notes(workshop, again) == ["a customer's"]
    assert await workshop.provisioner.reconcile() == NOTHING


async def test_a_password_that_was_changed_since_an_older_row_is_that_of_the_row_again(workshop: Workshop) -> None:
    tenant = await with_a_note(workshop)
    async with workshop.admin() as connection:
        await connection.execute(f"ALTER ROLE \"{placement(tenant).role}\" PASSWORD 'a newer one'")
    await turn_back(workshop.control, "acme", "grants")
    for check in (True, False):
        assert await workshop.provisioner.reconcile(check=check) == ReconcileReport(finished=("acme",))
    assert await notes(workshop, await workshop.registry.get(tenant.id)) == ["a customer's"]


async def test_a_tenant_that_was_suspended_since_an_older_row_is_not_let_in(workshop: Workshop) -> None:
    """Until somebody says so: it may have been deleted as well."""
    tenant = await with_a_note(workshop)
    place = placement(tenant)
    await workshop.set_login(tenant, False)
    await turn_back(workshop.control, "acme", "proved")
    for check in (True, False):
        (error,) = (await workshop.provisioner.reconcile(check=check)).errors
        assert "if it was suspended or deleted since: GRANT CONNECT, and LOGIN" in error
    async with workshop.admin() as connection:
        await connection.execute(
            f'ALTER ROLE "{place.role}" LOGIN; GRANT CONNECT ON DATABASE "{place.database}" TO "{place.role}"'
        )
    assert await workshop.provisioner.reconcile() == ReconcileReport(finished=("acme",))
    assert await notes(workshop, await workshop.registry.get(tenant.id)) == ["a customer's"]


async def test_what_cannot_be_proved_now_is_never_removed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on request, where the tenant's login was not refused: the server is too busy, say."""
    tenant = await with_a_note(workshop)
    await turn_back(workshop.control, "acme", "proved")

    async def prove(*_: object) -> object:
        raise ServerUnavailableError(server="default", tenant="acme")

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "prove", prove)
        report = await workshop.provisioner.reconcile(drop_unknown=True)
    assert (len(report.errors), report.removed) == (1, ())
    assert await workshop.provisioner.reconcile(drop_unknown=True) == ReconcileReport(finished=("acme",))
    assert await notes(workshop, await workshop.registry.get(tenant.id)) == ["a customer's"]


async def test_what_cannot_be_used_and_has_its_marker_is_kept_and_said(workshop: Workshop) -> None:
    """Until the caller asks to remove it."""
    tenant = await with_a_note(workshop)
    place = placement(tenant)
    await turn_back(workshop.control, "acme", "proved")
    async with workshop.admin() as connection:
        await connection.execute(f"ALTER ROLE \"{place.role}\" VALID UNTIL '2020-01-01'")
    for _ in range(2):
        report = await workshop.provisioner.reconcile()
        (error,) = report.errors
        with pytest.raises(ProvisioningError, match="has its marker and is kept"):
            await workshop.provisioner.settle_creation(await workshop.registry.get(tenant.id))
        assert report == ReconcileReport(errors=(error,))
        kept = f"acme: its creation was interrupted, or its row is of an older backup; database '{place.database}' has"
        assert kept in error and "reconcile(drop_unknown=True)" in error
    assert await workshop.present() == names_of(tenant)
    assert await workshop.provisioner.reconcile(drop_unknown=True) == ReconcileReport(removed=("acme",))
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def leave_proved(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, draft: TenantDraft) -> None:
    """Leave a creation as a process leaves it that is killed before the last commit."""

    async def do_nothing(*_: object, **__: object) -> bool:
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Creation, "_undo_started", do_nothing)
        patch.setattr(workshop.registry, "complete", fail)
        with pytest.raises(ControlUnavailableError):
            await workshop.provisioner.create(draft, key=None)


async def fail(*_: object, **__: object) -> Tenant:
    raise ControlUnavailableError("on purpose")


@pytest.mark.parametrize("step", ["role", "database", "grants", "proved"])
async def test_a_creation_under_way_is_left_alone(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """While its lock is held, no reconcile removes or completes it."""
    reached, proceed = asyncio.Event(), asyncio.Event()

    async def pause(creation: Creation) -> None:
        reached.set()
        await proceed.wait()

    intercept(monkeypatch, step, after=pause)
    task = asyncio.create_task(workshop.create("acme"))
    await reached.wait()
    reports = await asyncio.gather(*(workshop.provisioner_of().reconcile() for _ in range(3)))
    assert reports == [NOTHING] * 3
    proceed.set()
    tenant = await task
    assert tenant.status is Status.ACTIVE
    assert await workshop.consistent()


async def test_reconciling_beside_running_creations_disturbs_none(workshop: Workshop) -> None:
    """Repeated reconciles from several machines do not disturb the creation of 30 tenants."""
    done = asyncio.Event()

    async def reconcile() -> None:
        provisioner = workshop.provisioner_of()
        while not done.is_set():
            assert await provisioner.reconcile() == NOTHING

    reconciling = [asyncio.create_task(reconcile()) for _ in range(2)]
    await asyncio.gather(*(workshop.create(f"t{i}") for i in range(30)))
    done.set()
    await asyncio.gather(*reconciling)
    assert len(await workshop.slugs()) == 30
    assert await workshop.consistent()


async def test_many_can_reconcile_at_once(workshop: Workshop) -> None:
    """Concurrent reconciles remove each database and role once."""
    for number, step in enumerate(["registered", "role", "database", "grants"] * 3):
        await abandon(workshop, workshop.draft(f"t{number}"), step)
    reports = await asyncio.gather(*(workshop.provisioner_of().reconcile() for _ in range(4)))
    assert sorted(slug for report in reports for slug in report.removed) == sorted(f"t{i}" for i in range(12))
    assert [error for report in reports for error in report.errors] == []
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


# --- what the registry does not know --------------------------------------------------------------------------------


async def test_an_orphan_that_never_belonged_to_a_tenant_is_dropped(workshop: Workshop) -> None:
    """A database without a marker and a role, with names of this installation, are dropped."""
    first, second = workshop.draft("x"), workshop.draft("y")
    await workshop.provisioner.prepare_server("default")
    async with workshop.admin() as connection:
        await connection.execute(f'CREATE DATABASE "{first.database}"')
        await connection.execute(f'CREATE ROLE "{second.role}" LOGIN')
    report = await workshop.provisioner.reconcile()
    assert report == ReconcileReport(orphans=tuple(sorted((first.database, second.role))))
    assert await workshop.present() == set()


async def test_a_tenants_database_that_the_registry_forgot_is_kept(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    """It may hold a customer's data, which must not be lost when an older backup of the registry is restored."""
    tenant = await workshop.create("acme")
    await forget(workshop, tenant.id)
    with caplog.at_level(logging.ERROR):
        report = await workshop.provisioner.reconcile()
    assert report == ReconcileReport(unknown=(placement(tenant).database,))
    assert await workshop.present() == names_of(tenant)
    assert placement(tenant).database in caplog.text
    async with workshop.connect(tenant) as connection:
        assert await connection.fetchval("SELECT count(*) FROM notes") == 0


async def test_what_is_unknown_is_dropped_on_request(workshop: Workshop) -> None:
    """``drop_unknown=True`` drops databases that the registry does not know."""
    tenant = await workshop.create("acme")
    await forget(workshop, tenant.id)
    report = await workshop.provisioner.reconcile(drop_unknown=True)
    assert report == ReconcileReport(orphans=(placement(tenant).database,))
    assert await workshop.present() == set()


async def test_a_tombstone_is_honoured(workshop: Workshop) -> None:
    """If a restored backup of the server contains a purged tenant's database, it is dropped again."""
    tenant = await workshop.deleted("acme")
    await workshop.provisioner.purge(tenant)
    async with workshop.admin() as connection:
        await connection.execute(f'CREATE DATABASE "{placement(tenant).database}"')
        await set_marker(connection, placement(tenant).database, f"tenancy:{workshop.names.installation}:{tenant.id}")
    report = await workshop.provisioner.reconcile()
    assert report == ReconcileReport(orphans=(placement(tenant).database,))
    assert await workshop.present() == set()


async def test_another_installations_databases_are_not_touched(
    workshop: Workshop, postgres: Postgres, name_prefix: str
) -> None:
    """Two control databases can share a server, even with the same name prefix."""
    name = postgres.new_name()
    other = await open_workshop(
        control_url=await postgres.create_database(name), admin_url=postgres.admin_url, name_prefix=name_prefix
    )
    try:
        tenant = await other.create("acme")
        assert await workshop.provisioner.reconcile(drop_unknown=True) == NOTHING
        assert await other.present() == names_of(tenant)
        assert await other.consistent()
    finally:
        await other.close()
        await postgres.drop_database(name)


async def test_an_orphan_whose_lock_is_held_is_left_alone(workshop: Workshop) -> None:
    """An orphan is not dropped while its lock is held."""
    draft = workshop.draft("x")
    async with workshop.admin() as connection:
        await connection.execute(f'CREATE DATABASE "{draft.database}"')
        await locks.lock(connection, tenant_key(draft.id), timeout=1)
        assert await workshop.provisioner.reconcile() == NOTHING
    assert await workshop.provisioner.reconcile() == ReconcileReport(orphans=(draft.database,))


@pytest.mark.new_installation
async def test_leftover_templates_and_scratches_are_dropped(workshop: Workshop) -> None:
    """Incomplete templates and scratch databases that no process uses are dropped; complete templates stay."""
    template = await workshop.provisioner.template("default")
    partial, scratch = workshop.names.template("beef" * 3), workshop.names.scratch("dead" * 4)
    async with workshop.admin() as connection:
        await connection.execute(f'CREATE DATABASE "{partial}"')
        await connection.execute(f'CREATE DATABASE "{scratch}"')
    async with workshop.provisioner.scratch("default") as used:
        report = await workshop.provisioner.reconcile()
        assert report == ReconcileReport(orphans=tuple(sorted((partial, scratch))))
        assert await workshop.databases() == {template.name, used}


# --- logins ---------------------------------------------------------------------------------------------------------


async def test_logins_follow_the_registry(workshop: Workshop) -> None:
    """If a server was down when a tenant was suspended or activated, reconcile corrects the role."""
    suspended, active = await workshop.create("acme"), await workshop.create("globex")
    await workshop.registry.transition(suspended.id, Status.SUSPENDED, action="tenant.suspend")
    async with workshop.admin() as connection:
        await roles.set_login(connection, placement(active).role, False)
    async with workshop.connect(suspended) as connection:
        report = await workshop.provisioner.reconcile()
        assert mended(report) == {"acme": {"role.login"}, "globex": {"role.login"}}
        with pytest.raises(Exception, match=r"closed|terminat"):
            await connection.execute("SELECT 1")
    async with workshop.connect(active):
        pass
    assert await workshop.provisioner.reconcile() == NOTHING


async def test_connection_limits_follow_the_tiers(workshop: Workshop) -> None:
    """After a change of its tier, or of the tier's limit, a tenant's role gets the new limit."""
    tenant = await workshop.create("acme", tier="free")

    async def limit() -> int:
        async with workshop.admin() as connection:
            query = "SELECT rolconnlimit FROM pg_roles WHERE rolname = $1"
            return int(await connection.fetchval(query, placement(tenant).role))

    await workshop.registry.change(tenant.id, action="tenant.update", tier="pro")
    assert await limit() == 5
    assert mended(await workshop.provisioner.reconcile()) == {"acme": {"role.connection_limit"}}
    assert await limit() == 20
    _, changed = await workshop.registry.change(tenant.id, action="tenant.update", tier="enterprise")
    await workshop.provisioner.align(changed)
    assert await limit() == 50
    assert await workshop.provisioner.reconcile() == NOTHING


async def test_a_tier_that_the_configuration_has_lost_is_left_alone(workshop: Workshop) -> None:
    """If the configuration has no such tier, the role's limit is not changed."""
    tenant = await workshop.create("acme", tier="pro")
    without = workshop.provisioner_of(tiers={"free": workshop.config.tiers["free"]})
    assert await without.reconcile() == NOTHING
    assert placement(tenant).role in "".join(await workshop.present())


# --- servers that are away ------------------------------------------------------------------------------------------


@asynccontextmanager
async def second_server(workshop: Workshop, admin_url: str, **config: Any) -> AsyncIterator[Workshop]:
    """The same installation with another server, of that URL, besides its own."""
    assert workshop.config.servers is not None
    opened = await open_workshop(
        control_url=workshop.config.control_url,
        admin_url=str(workshop.config.servers["default"]),
        name_prefix=workshop.config.name_prefix,
        servers={**workshop.config.servers, "second": admin_url},
        **config,
    )
    try:
        yield opened
    finally:
        await opened.close()


async def test_a_server_that_is_away_is_reported_and_stops_nothing(workshop: Workshop, own_server: Postgres) -> None:
    """The other servers are reconciled; this one's work is done once it answers again."""
    async with second_server(workshop, own_server.admin_url) as two:
        await two.create("elsewhere", server="second")
        draft = two.draft("broken", server="second")
        await two.registry.register(draft)
    await abandon(workshop, workshop.draft("acme"), "database")
    async with second_server(workshop, "postgresql://postgres:x@127.0.0.1:1/postgres") as two:
        report = await two.provisioner.reconcile()
    assert report.removed == ("acme",)
    assert len(report.errors) == 1 and report.errors[0].startswith("second: server 'second' is not available")
    async with second_server(workshop, own_server.admin_url) as two:
        assert await two.provisioner.reconcile() == ReconcileReport(removed=("broken",))
        assert {slug for slug, status in (await two.slugs()).items() if status == "active"} == {"elsewhere"}


async def test_a_creation_of_a_tenant_that_was_moved_since_keeps_its_row(
    workshop: Workshop, own_server: Postgres
) -> None:
    """What it had on the first server is gone; the row is older than that."""
    tenant = await with_a_note(workshop)
    place = placement(tenant)
    async with workshop.admin() as connection:
        await connection.execute(f'DROP DATABASE "{place.database}"')
        await connection.execute(f'DROP ROLE "{place.role}"')
    moved = f"{place.database}_moved"
    async with own_server.connect() as connection:
        await connection.execute(f'CREATE DATABASE "{moved}"')
        await set_marker(connection, moved, marker.marker_text(workshop.control.installation, tenant.id))
    await turn_back(workshop.control, "acme", "database")
    async with second_server(workshop, own_server.admin_url) as two:
        for drop_unknown in (False, True):
            report = await two.provisioner.reconcile(drop_unknown=drop_unknown)
            (error,) = report.errors
            assert f"nothing is removed: database '{moved}' on server 'second' has its marker" in error
            assert report.removed == ()
        assert await two.slugs() == {"acme": "provisioning"}
    async with own_server.connect() as connection:
        assert await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", moved)


async def test_what_a_role_says_of_a_creation_that_has_ended_is_taken_back(workshop: Workshop) -> None:
    """A process may die right after the commit that has ended it."""
    tenant, creating = await workshop.create("acme"), workshop.draft("globex")
    await abandon(workshop, creating, "database")
    async with workshop.admin() as connection:
        for role in (placement(tenant).role, creating.role):
            await connection.execute(roles.unfinished_statement(role))
        async with workshop.admin() as holder:
            await locks.lock(holder, tenant_key(creating.id), timeout=1)
            assert (await workshop.provisioner.reconcile()).removed == ()
        assert await roles.unfinished(connection, workshop.names.tenant_stem) == [creating.role]


async def test_a_server_that_is_no_longer_configured_is_reported(workshop: Workshop, own_server: Postgres) -> None:
    """Unfinished work on a server that is not configured is reported as an error."""
    async with second_server(workshop, own_server.admin_url) as two:
        await two.registry.register(two.draft("stranded", server="second"))
    report = await workshop.provisioner.reconcile()
    assert report == ReconcileReport(errors=("stranded: its server is not configured",))


async def test_a_report_can_be_printed(workshop: Workshop) -> None:
    """A report can be turned into plain values, for the command line."""
    await abandon(workshop, workshop.draft("acme"), "role")
    report = asdict(await workshop.provisioner.reconcile())
    assert report["removed"] == ("acme",)
    assert set(report) == {
        "finished",
        "removed",
        "purged",
        "corrected",
        "orphans",
        "unknown",
        "differences",
        "errors",
    }


async def test_a_creation_without_its_grants_does_not_prove_itself(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A creation killed before its role had rights on the tables is removed, not completed."""
    draft = workshop.draft("acme")

    async def do_nothing(*_: object, **__: object) -> bool:
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Creation, "_undo_started", do_nothing)
        patch.setattr(grants, "grant_and_mark", fail)
        with pytest.raises(ControlUnavailableError):
            await workshop.provisioner.create(draft, key=None)
    async with workshop.control.connect() as connection:
        assert await connection.scalar(text("SELECT step FROM tenancy.tenants")) == "proved"
    assert await workshop.provisioner.reconcile() == ReconcileReport(removed=("acme",))
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def test_a_server_that_stops_answering_does_not_hold_up_the_others(workshop: Workshop) -> None:
    """If a server stops (SIGSTOP) during reconcile, its work fails at the deadline, and the other server's is done."""
    with running_server(max(VERSIONS), "stopped") as stopped:
        async with second_server(workshop, stopped.admin_url, provisioning={"timeout": 1.0}) as two:
            await two.provisioner.prepare_server("second")
            await abandon(workshop, workshop.draft("acme"), "database")
            pids: list[int] = []
            connect_admin = two.servers["second"].connect_admin

            async def connecting(*args: Any, **options: Any) -> Any:
                made = await connect_admin(*args, **options)
                os.kill(made.get_server_pid(), signal.SIGSTOP)
                pids.append(made.get_server_pid())
                return made

            two.servers["second"].connect_admin = connecting  # type: ignore[method-assign]
            async with asyncio.timeout(HANGS):
                report = await two.provisioner.reconcile()
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
    assert pids
    assert report.removed == ("acme",)
    assert len(report.errors) == 1 and report.errors[0].startswith("second: timed out")


async def test_a_proxy_that_swallows_packets_does_not_hold_up_the_end(
    postgres: Postgres, control_url: str, name_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline has passed, and neither the ROLLBACK, nor the unlock, nor the request to cancel is answered."""
    monkeypatch.setattr(connections, "CLOSE_SECONDS", 0.5)
    async with proxied(postgres.admin_url) as proxy:
        url = proxy.url(postgres.admin_url)
        through = await open_workshop(control_url=control_url, admin_url=url, name_prefix=name_prefix)
        acme = await through.create("acme")

        def slow(target: GrantTarget) -> str:
            asyncio.get_running_loop().call_later(0.2, proxy.swallow)
            return "SELECT pg_sleep(60)"

        provisioner = through.provisioner_of(provisioning={"grants": slow, "timeout": 1.0})
        try:
            async with asyncio.timeout(HANGS):
                report = await provisioner.reconcile()
                assert report.errors == ("acme: timed out", "default: ConnectionResetError: the connection was lost")
                proxy.cut()
                proxy.restore()
                with pytest.raises(ProvisioningError, match=r"timed out; .* run tenancy reconcile"):
                    await provisioner.apply_grants(acme)
        finally:
            proxy.cut()
            proxy.restore()
            await through.close()
