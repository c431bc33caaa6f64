"""Creating a tenant: all or nothing, after failures and cancellations, and with many at once."""

from __future__ import annotations

import asyncio
import itertools
import types
from collections.abc import Coroutine, Generator
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tenancy_orm.errors import (
    ControlUnavailableError,
    DatabaseExistsError,
    InvalidTransitionError,
    MarkerMismatchError,
    ProvisioningError,
    ServerUnavailableError,
    TemplateError,
    TenantExistsError,
    TenantNotFoundError,
    UnknownServerError,
)
from tenancy_orm.events import TenantCreationFailed
from tenancy_orm.keys.format import generate_key
from tenancy_orm.postgres import locks
from tenancy_orm.provisioning import Provisioner, ReconcileReport
from tenancy_orm.provisioning.creation.pipeline import Creation, tenant_key
from tenancy_orm.provisioning.server_objects import databases
from tenancy_orm.servers import Servers
from tenancy_orm.tenant import Status, Tenant
from tests.support.provisioning import Workshop, intercept, names_of, placement, set_marker
from tests.support.waiting import until

STEPS = ("role", "database", "grants", "proved")


class InjectedError(Exception):
    """What the tests make a step fail with."""


# --- success --------------------------------------------------------------------------------------------------------


async def test_a_created_tenant_is_complete(workshop: Workshop) -> None:
    """It has a row, a role and a database at the template's revision, and logs in to its own tables."""
    tenant = await workshop.create("acme")
    assert (tenant.status, tenant.schema_revision) == (Status.ACTIVE, "0001")
    assert await workshop.present() == names_of(tenant)
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('hello')")
        await connection.execute("""INSERT INTO "odd ""schema"."odd ""table" (body) VALUES ('quoted')""")
        assert await connection.fetchval("SELECT body FROM bodies") == "hello"
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == "0001"


async def test_a_tenant_becomes_what_its_draft_says(workshop: Workshop) -> None:
    """A draft with a trial makes a tenant with the status trial."""
    assert (await workshop.create("acme", target_status=Status.TRIAL)).status is Status.TRIAL


async def test_the_role_has_its_tiers_connection_limit(workshop: Workshop) -> None:
    """PostgreSQL itself bounds a tenant's connections."""
    free, enterprise = await workshop.create("acme"), await workshop.create("globex", tier="enterprise")
    async with workshop.admin() as connection:
        for tenant in (free, enterprise):
            limit = await connection.fetchval(
                "SELECT rolconnlimit FROM pg_roles WHERE rolname = $1", placement(tenant).role
            )
            assert limit == workshop.config.tiers[tenant.tier].connection_limit


async def test_the_key_is_stored_together_with_the_tenant(workshop: Workshop) -> None:
    """A tenant and its first key become active in one commit."""
    key = generate_key("ten_test")
    tenant = await workshop.provisioner.create(workshop.draft("acme"), key=key, key_name="first", scopes=("read",))
    async with workshop.control.connect() as connection:
        row = (await connection.execute(text("SELECT id, tenant_id, name, scopes FROM tenancy.api_keys"))).one()
    assert tuple(row) == (key.key_id, tenant.id, "first", ["read"])


async def test_the_password_is_in_no_statement(workshop: Workshop) -> None:
    """PostgreSQL's log and ``pg_stat_activity`` do not contain the tenant's password."""
    async with workshop.admin() as connection:
        tenant = await workshop.create("acme")
        # the creation's own connection is idle now, and shows its last statements; others only the last
        statements = [row[0] for row in await connection.fetch("SELECT query FROM pg_stat_activity")]
        stored = await connection.fetchval(
            "SELECT rolpassword FROM pg_authid WHERE rolname = $1", placement(tenant).role
        )
    password = workshop.provisioner.password(tenant)
    assert statements and not any(password in statement for statement in statements)
    assert stored.startswith("SCRAM-SHA-256$1:") and password not in stored


async def test_steps_are_recorded_before_they_begin(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """During a step the registry has that step's name or a later one, never an earlier one."""
    seen: dict[str, str] = {}
    for name in STEPS:

        async def look(creation: Creation, name: str = name) -> None:
            async with workshop.control.connect() as connection:
                seen[name] = await connection.scalar(text("SELECT step FROM tenancy.tenants"))

        intercept(monkeypatch, name, before=look)
    await workshop.create("acme")
    order = ("registered", *STEPS)
    assert list(seen) == list(STEPS)
    assert seen["role"] in ("registered", "database")
    for name in STEPS[1:]:
        assert order.index(seen[name]) >= order.index(name)


async def test_the_lock_is_held_from_before_the_row_to_the_end(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant's advisory lock cannot be taken during its creation, and can be afterwards."""
    draft = workshop.draft("acme")
    free: list[bool] = []
    register = workshop.registry.register

    async def is_free() -> bool:
        async with workshop.admin() as connection:
            return await locks.try_lock(connection, tenant_key(draft.id))

    async def registering(*args: Any, **options: Any) -> Tenant:
        free.append(await is_free())
        return await register(*args, **options)

    async def look(creation: Creation) -> None:
        free.append(await is_free())

    monkeypatch.setattr(workshop.registry, "register", registering)
    intercept(monkeypatch, "proved", after=look)
    await workshop.provisioner.create(draft, key=None)
    assert free == [False, False]
    assert await is_free()


# --- never adopted --------------------------------------------------------------------------------------------------


async def test_an_existing_database_is_never_adopted(workshop: Workshop) -> None:
    """Creating over a database raises, leaves that database as it was, and undoes the rest."""
    draft = workshop.draft("acme")
    async with workshop.admin() as connection:
        await connection.execute(f'CREATE DATABASE "{draft.database}"')
    async with workshop.admin(draft.database) as connection:
        await connection.execute("CREATE TABLE canary AS SELECT 'old customer' AS body")
    with pytest.raises(DatabaseExistsError, match="not adopted") as caught:
        await workshop.provisioner.create(draft, key=None)
    assert (caught.value.tenant, caught.value.step) == ("acme", "database")
    assert await workshop.present() == {f"database {draft.database}"}
    async with workshop.admin(draft.database) as connection:
        assert await connection.fetchval("SELECT body FROM canary") == "old customer"
    assert await workshop.slugs() == {}


async def test_an_existing_role_is_never_adopted(workshop: Workshop) -> None:
    """A client that knows an existing role's password must not get access to a new tenant's database."""
    draft = workshop.draft("acme")
    async with workshop.admin() as connection:
        await connection.execute(f'CREATE ROLE "{draft.role}"')
    with pytest.raises(DatabaseExistsError, match="not adopted") as caught:
        await workshop.provisioner.create(draft, key=None)
    assert caught.value.step == "role"
    assert await workshop.present() == {f"role {draft.role}"}
    assert await workshop.slugs() == {}


async def test_a_taken_slug_is_refused_before_anything_is_made(workshop: Workshop) -> None:
    """The error is the registry's own, and the first tenant stays."""
    first = await workshop.create("acme")
    with pytest.raises(TenantExistsError):
        await workshop.create("acme")
    assert await workshop.present() == names_of(first)


async def test_an_unknown_server_is_refused(workshop: Workshop) -> None:
    """No row is written for a server that is not configured."""
    with pytest.raises(UnknownServerError):
        await workshop.create("acme", server="elsewhere")
    assert await workshop.slugs() == {}


# --- failure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_failure_at_any_step_is_undone(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    """Neither row nor role nor database is left, the error names the step, and the slug can be used at once."""
    failures: list[TenantCreationFailed] = []
    workshop.events.subscribe(TenantCreationFailed, failures.append)

    async def fail(creation: Creation) -> None:
        raise InjectedError("on purpose")

    with monkeypatch.context() as patch:
        intercept(patch, step, **{when: fail})
        with pytest.raises(ProvisioningError, match=f"'acme' failed at step '{step}'.*has been undone") as caught:
            await workshop.create("acme")
    assert isinstance(caught.value.__cause__, InjectedError)
    assert (caught.value.tenant, caught.value.step) == ("acme", step)
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})
    assert [(event.slug, event.step, event.undone) for event in failures] == [("acme", step, True)]
    await workshop.create("acme")


async def test_a_failed_registration_of_completion_is_undone(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the last commit fails, the creation is undone."""

    async def complete(*_: Any, **__: Any) -> Tenant:
        raise ControlUnavailableError("on purpose")

    monkeypatch.setattr(workshop.registry, "complete", complete)
    with pytest.raises(ControlUnavailableError):
        await workshop.create("acme")
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def test_a_tenant_whose_completion_was_in_doubt_is_not_undone(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection is lost after the commit, the registry is read again, and the tenant stays."""
    complete = workshop.registry.complete

    async def losing(*args: Any, **options: Any) -> Tenant:
        await complete(*args, **options)
        raise ControlUnavailableError("lost the answer")

    monkeypatch.setattr(workshop.registry, "complete", losing)
    tenant = await workshop.create("acme")
    assert tenant.status is Status.ACTIVE
    assert await workshop.consistent()


async def test_a_database_of_another_tenant_is_found_out(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step reads the marker: a tenant with another tenant's database never becomes active."""

    async def swap(creation: Creation) -> None:
        async with workshop.admin() as connection:
            for name in await workshop.databases() - {(await workshop.provisioner.template("default")).name}:
                await set_marker(connection, name, "tenancy:another")

    intercept(monkeypatch, "grants", after=swap)
    with pytest.raises(MarkerMismatchError):
        await workshop.create("acme")
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def test_a_creation_that_takes_too_long_is_undone(workshop: Workshop) -> None:
    """The deadline is ``provisioning.timeout``, and the error names the step."""
    template = (await workshop.provisioner.template("default")).name
    impatient = workshop.provisioner_of(provisioning={"timeout": 2.0})
    await impatient.template("default")
    async with workshop.admin() as connection, connection.transaction():
        # until this transaction ends, a clone waits
        await connection.execute(f'ALTER DATABASE "{template}" RENAME TO "{template}_away"')
        with pytest.raises(ProvisioningError, match="did not end within 2 s at step 'database'") as caught:
            await impatient.create(workshop.draft("acme"), key=None)
        assert isinstance(caught.value.__cause__, TimeoutError)
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def test_a_template_that_was_dropped_is_built_anew_by_the_next_creation(workshop: Workshop) -> None:
    """The creation that finds the template dropped fails and is undone; the next one succeeds."""
    template = (await workshop.provisioner.template("default")).name
    async with workshop.admin() as connection:
        await databases.drop(connection, template)
    with pytest.raises(TemplateError, match="cannot be cloned") as caught:
        await workshop.create("acme")
    assert (caught.value.tenant, caught.value.step) == ("acme", "database")
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})
    await workshop.create("acme")


async def end_locks(workshop: Workshop, creation_of: str) -> None:
    """End the connection that holds the lock of a tenant under creation, as a network fault would."""
    async with workshop.control.connect() as connection:
        tenant_id = await connection.scalar(
            text("SELECT id FROM tenancy.tenants WHERE slug = :slug"), {"slug": creation_of}
        )
    key = tenant_key(tenant_id) % 2**64
    query = (
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory' "
        "AND classid::bigint = $1 AND objid::bigint = $2"
    )
    async with workshop.admin() as connection:
        assert await connection.fetch(query, key >> 32, key % 2**32)


@pytest.mark.parametrize("step", ["role", "database", "grants"])
async def test_a_lost_connection_is_undone_by_another(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """If the connection with the lock is lost, a new one takes the lock, and the creation is undone."""

    async def lose(creation: Creation) -> None:
        await end_locks(workshop, "acme")

    intercept(monkeypatch, step, before=lose)
    with pytest.raises(ProvisioningError):
        await workshop.create("acme")
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def test_a_creation_that_reconcile_has_removed_undoes_the_rest(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the lock was lost and reconcile removed the row, the creation undoes the rest."""

    async def lose(creation: Creation) -> None:
        await end_locks(workshop, "acme")
        report = await workshop.provisioner.reconcile()
        assert (report.removed, report.errors) == (("acme",), ())

    intercept(monkeypatch, "database", after=lose)
    with pytest.raises(ProvisioningError):
        await workshop.create("acme")
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def test_a_tenant_that_reconcile_has_completed_is_not_undone(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the lock was lost and reconcile completed the tenant, it stays, and the error says so."""

    async def lose(creation: Creation) -> None:
        await end_locks(workshop, "acme")
        report = await workshop.provisioner.reconcile()
        assert (report.finished, report.errors) == (("acme",), ())

    intercept(monkeypatch, "proved", after=lose)
    with pytest.raises(ProvisioningError, match="completed tenant 'acme' without its API key"):
        await workshop.create("acme")
    assert await workshop.slugs() == {"acme": "active"}
    assert await workshop.consistent()


async def test_a_failure_is_recorded_of_what_is_being_created_alone(workshop: Workshop) -> None:
    """The last commit may have come first: the tenant is active then, and is not undone."""
    tenant = await workshop.create("acme")
    await workshop.registry.record_failure(tenant.id, step="undoing", error="on purpose")
    async with workshop.control.connect() as connection:
        assert (await connection.execute(text("SELECT step, step_error FROM tenancy.tenants"))).one() == (None, None)


async def test_a_late_commit_completes_nothing_that_is_being_undone(workshop: Workshop) -> None:
    """One that was sent before a connection was lost, say."""
    draft = workshop.draft("acme")
    await workshop.registry.register(draft)
    await workshop.registry.record_failure(draft.id, step="undoing", error="on purpose")
    with pytest.raises(InvalidTransitionError):
        await workshop.registry.complete(draft.id, revision=None, key=None)
    assert await workshop.slugs() == {"acme": "provisioning"}


async def test_what_is_being_undone_is_not_completed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed after a failure, before the database is dropped, leaves a row that says so."""
    killed: list[ReconcileReport] = []
    drop = Creation._drop_database

    async def leave(creation: Creation) -> None:
        """Do what others see once the process is gone, which drops its lock."""
        await locks.unlock(creation._admin, tenant_key(creation._draft.id))
        killed.append(await workshop.provisioner_of().reconcile())
        await drop(creation)

    async def fail(creation: Creation) -> None:
        raise InjectedError("on purpose")

    monkeypatch.setattr(Creation, "_drop_database", leave)
    intercept(monkeypatch, "proved", after=fail)
    with pytest.raises(ProvisioningError, match="has been undone"):
        await workshop.create("acme")
    assert killed == [ReconcileReport(removed=("acme",))]
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def test_what_cannot_be_undone_is_left_to_reconcile(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is raised, the row records the failure, and reconcile removes the rest later."""
    name = ""

    async def fail(creation: Creation) -> None:
        nonlocal name
        name = creation.role
        async with workshop.admin(name) as connection:
            # DROP DATABASE: 55006
            await connection.execute("CREATE SUBSCRIPTION hook CONNECTION '' PUBLICATION p WITH (connect = false)")
        raise InjectedError("on purpose")

    with monkeypatch.context() as patch:
        intercept(patch, "proved", after=fail)
        with pytest.raises(ProvisioningError, match="run: tenancy reconcile") as caught:
            await workshop.create("acme")
    assert isinstance(caught.value.__cause__, InjectedError)
    assert await workshop.present() == {f"database {name}", f"role {name}"}
    async with workshop.control.connect() as connection:
        step, error = (await connection.execute(text("SELECT step, step_error FROM tenancy.tenants"))).one()
    assert step == "undoing" and 'DROP SUBSCRIPTION "hook"' in error
    with pytest.raises(TenantExistsError):
        await workshop.create("acme")
    report = await workshop.provisioner.reconcile()
    assert report.removed == () and "acme" in report.errors[0]
    async with workshop.admin(name) as connection:
        await connection.execute("ALTER SUBSCRIPTION hook SET (slot_name = NONE); DROP SUBSCRIPTION hook")
    assert (await workshop.provisioner.reconcile()).removed == ("acme",)
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def test_a_server_that_is_away_leaves_nothing(workshop: Workshop) -> None:
    """The error is that of routing; no row was written, since the lock is taken first."""
    assert workshop.config.servers is not None
    servers = {
        "default": make_url(str(workshop.config.servers["default"])).set(port=1).render_as_string(hide_password=False)
    }
    away = workshop.provisioner_of()
    await away.template("default")
    away._services = replace(away._services, servers=Servers(workshop.config.replace(servers=servers)))
    with pytest.raises(ServerUnavailableError):
        await away.create(workshop.draft("acme"), key=None)
    assert await workshop.slugs() == {}


# --- cancellation ---------------------------------------------------------------------------------------------------


@types.coroutine
def cancelled_at(work: Coroutine[Any, Any, Any], point: int) -> Generator[Any, Any, bool]:
    """Run ``work`` in this task and cancel it at its ``point``-th await; returns whether it came so far."""
    task = asyncio.current_task()
    assert task is not None
    reached = False
    value: Any = None
    error: BaseException | None = None
    for number in itertools.count():
        try:
            waiting = work.send(value) if error is None else work.throw(error)
        except StopIteration:
            return reached
        if number == point:
            reached = True
            task.cancel()
        value = error = None
        try:
            value = yield waiting
        except asyncio.CancelledError as exc:
            error = exc
        except Exception as exc:  # noqa: BLE001 - the work's to handle
            error = exc
    return reached


async def test_a_cancellation_at_any_await_leaves_nothing_or_a_tenant(workshop: Workshop) -> None:
    """Each await of a creation is cancelled in turn: afterwards there is nothing, or an active tenant."""
    await workshop.create("warm-up")
    outcomes = []
    for point in itertools.count():
        slug = f"t{point}"
        draft = workshop.draft(slug)

        async def create(draft: Any = draft, point: int = point) -> bool:
            return await cancelled_at(workshop.provisioner.create(draft, key=None), point)

        try:
            if not await asyncio.create_task(create()):
                break
            outcome = "returned"
        except asyncio.CancelledError:
            outcome = "cancelled"
        slugs = await workshop.slugs()
        assert slugs.get(slug) in (None, "active"), f"await {point}"
        assert await workshop.consistent(), f"await {point}"
        outcomes.append((outcome, slug in slugs))
    assert len(outcomes) > 15
    # most leave nothing; the tenant stays only from the last commit on
    left = [present for _, present in outcomes]
    assert left == sorted(left)
    assert not left[0]
    report = await workshop.provisioner.reconcile()
    assert (report.removed, report.finished, report.orphans, report.errors) == ((), (), (), ())


async def test_many_creations_cancelled_at_once_leave_nothing(workshop: Workshop) -> None:
    """Creations under way, waiting ones and the builder of the template leave nothing when they are cancelled."""
    tasks = [asyncio.create_task(workshop.create(f"t{i}")) for i in range(40)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert any(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert await workshop.consistent()
    assert set(await workshop.slugs()) >= {x.slug for x in outcomes if isinstance(x, Tenant)}


async def test_a_second_cancellation_does_not_stop_the_undoing(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The creation is undone before the cancellation is raised, even if it is cancelled again."""
    reached = asyncio.Event()

    async def pause(creation: Creation) -> None:
        reached.set()
        await asyncio.Event().wait()

    intercept(monkeypatch, "proved", after=pause)
    task = asyncio.create_task(workshop.create("acme"))
    await reached.wait()
    while not task.done():
        task.cancel()
        await asyncio.wait((task,), timeout=0.005)
    assert task.cancelled()
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


# --- many at once ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
async def test_150_creations_at_once_all_succeed(workshop: Workshop) -> None:
    """Of 150 creations at once each has its own database, and can log in to it."""
    created = await asyncio.gather(*(workshop.create(f"t{i}") for i in range(150)))
    assert [tenant.slug for tenant in created] == [f"t{i}" for i in range(150)]
    assert len({placement(tenant).database for tenant in created}) == 150
    assert await workshop.consistent()
    for tenant in created[::10]:
        async with workshop.connect(tenant) as connection:
            assert await connection.fetchval("SELECT current_database()") == placement(tenant).database


async def test_no_more_run_at_once_than_configured(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting creations have no connection and no row."""
    running = highest = 0
    three = asyncio.Event()

    async def begin(creation: Creation) -> None:
        nonlocal running, highest
        running += 1
        highest = max(highest, running)
        if running == 3:
            three.set()
        await three.wait()

    async def end(creation: Creation) -> None:
        nonlocal running
        running -= 1

    intercept(monkeypatch, "role", before=begin)
    intercept(monkeypatch, "proved", after=end)
    limited = workshop.provisioner_of(provisioning={"concurrency": 3})
    await asyncio.gather(*(limited.create(workshop.draft(f"t{i}"), key=None) for i in range(12)))
    assert highest == 3


async def test_one_slug_is_created_once_however_many_try(workshop: Workshop) -> None:
    """Of several creations with one slug one succeeds, and the others leave nothing."""
    outcomes = await asyncio.gather(*(workshop.create("acme") for _ in range(12)), return_exceptions=True)
    created = [outcome for outcome in outcomes if isinstance(outcome, Tenant)]
    assert len(created) == 1
    assert all(isinstance(x, TenantExistsError) for x in outcomes if not isinstance(x, Tenant))
    assert await workshop.present() == names_of(created[0])


async def test_a_failure_does_not_disturb_the_others(workshop: Workshop) -> None:
    """Of concurrent creations only the one that fails is undone."""
    failing = workshop.draft("failing")
    async with workshop.admin() as connection:
        await connection.execute(f'CREATE ROLE "{failing.role}"')
    outcomes = await asyncio.gather(
        *(workshop.create(f"t{i}") for i in range(6)),
        workshop.provisioner.create(failing, key=None),
        return_exceptions=True,
    )
    assert isinstance(outcomes[-1], DatabaseExistsError)
    assert set(await workshop.slugs()) == {f"t{i}" for i in range(6)}
    with pytest.raises(TenantNotFoundError):
        await workshop.registry.get(failing.id)


def idle_connections(provisioner: Provisioner) -> list[Any]:
    """The connections that a provisioner keeps between creations."""
    return [connection for kept in provisioner._admin_connections._idle.values() for connection in kept]


async def test_broken_idle_connections_are_replaced(workshop: Workshop) -> None:
    """After a restart of the server the next creation replaces the idle connections."""
    await workshop.create("acme")
    pids = [connection.get_server_pid() for connection in idle_connections(workshop.provisioner)]
    async with workshop.admin() as connection:
        ended = await connection.fetch("SELECT pg_terminate_backend(pid, 5000) FROM unnest($1::int[]) AS pid", pids)
    assert len(ended) == 1
    await workshop.create("globex")
    assert await workshop.consistent()


async def test_closing_ends_the_idle_connections(workshop: Workshop) -> None:
    """A closed provisioner has no connections."""
    await workshop.create("acme")
    provisioner = workshop.provisioner_of()
    await provisioner.create(workshop.draft("globex"), key=None)
    idle = idle_connections(provisioner)
    assert len(idle) == 1 and not idle[0].is_closed()
    await provisioner.close()
    assert idle[0].is_closed()
    with pytest.raises(asyncpg.InterfaceError):
        await idle[0].execute("SELECT 1")


async def test_a_connection_that_breaks_after_the_commit_fails_nothing(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection with the lock is lost after the commit, the creation succeeds."""
    complete = workshop.registry.complete

    async def completing(*args: Any, **options: Any) -> Tenant:
        tenant = await complete(*args, **options)
        await end_locks(workshop, "acme")
        return tenant

    monkeypatch.setattr(workshop.registry, "complete", completing)
    assert (await workshop.create("acme")).status is Status.ACTIVE
    assert idle_connections(workshop.provisioner) == []
    assert await workshop.consistent()


async def test_an_idle_connection_that_was_just_ended_is_not_used(workshop: Workshop) -> None:
    """An idle connection with the server's last message, but not yet the end of the stream, is replaced."""
    await workshop.create("acme")
    (idle,) = idle_connections(workshop.provisioner)
    fields = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
    idle._protocol.data_received(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
    assert not idle.is_closed()
    with pytest.raises(asyncpg.InternalClientError):
        await idle.fetchval("SELECT 1")
    await workshop.create("globex")
    assert await workshop.consistent()


async def test_an_idle_connection_is_closed_after_a_while(workshop: Workshop) -> None:
    """An idle connection is closed after ``idle`` seconds."""
    provisioner = workshop.provisioner_of()
    provisioner._admin_connections._idle_seconds = 0.05
    await provisioner.create(workshop.draft("acme"), key=None)
    await until(lambda: not idle_connections(provisioner))
    await provisioner.create(workshop.draft("globex"), key=None)
