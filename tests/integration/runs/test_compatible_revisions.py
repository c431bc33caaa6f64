"""Tenants at revisions that the running code cannot work with: refused, and only they."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextvars import Context
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text
from starlette.types import Receive, Scope, Send

from tenancy_orm import TenancyConfig
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.errors import ConfigurationError, SettingError, TaskRefusedError, TenantRevisionError
from tenancy_orm.events import TenantRevisionRefused
from tenancy_orm.migrations.state import _LOCK
from tenancy_orm.runs import NoticeReport
from tenancy_orm.tasks import ArrivalPolicy
from tenancy_orm.tasks.gate import Message, TaskGate
from tests.support.asgi import messages, websocket_scope
from tests.support.fleet import until
from tests.support.projects import Project
from tests.support.releases import Release, create, next_project, released


@pytest.fixture
async def old(config: TenancyConfig, project: Project) -> AsyncIterator[Release]:
    """The present release: it is at 0002, and works with that alone."""
    next_project(project)
    async with released(config.replace(compatible_revisions="0002"), "*", initialise=True) as release:
        yield release


@pytest.fixture
async def new(old: Release, config: TenancyConfig, project: Project) -> AsyncIterator[Release]:
    """The next release: it is at 0003, and needs that."""
    migrations = Project(project.root.parent / "next").migrations
    async with released(config.replace(migrations=migrations, compatible_revisions="0003:"), "id, rating") as release:
        yield release


async def test_a_tenant_outside_is_refused_and_only_that_one(old: Release, new: Release) -> None:
    """At every way in; and it is served again once its revision fits."""
    acme, globex = [await create(old, slug) for slug in ("acme", "globex")]
    assert [await old.get(acme), await old.get(globex)] == [200, 200]
    # new code, before anything was migrated
    answer = await new.client.get("/notes", headers={"X-API-Key": acme})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
    assert answer.json()["type"] == "urn:tenancy:problem:tenant-revision"
    (await new.fleet.migrations.upgrade(tenants=["acme"])).raise_for_failures()
    # the notification has come by the time that this one has
    await until(lambda: old.get(acme), 503)
    await until(lambda: new.get(acme), 200)
    assert [await old.get(globex), await new.get(globex)] == [200, 503]

    tenancy = old.tenancy
    with pytest.raises(
        TenantRevisionError, match=r"'acme' .*: its schema is at 0003, and this code works with 0002$"
    ) as raised:
        async with tenancy.session("acme"):
            pass
    assert (raised.value.revision, raised.value.tenant, raised.value.status) == ("0003", "acme", "revision")
    with pytest.raises(TenantRevisionError):
        await tenancy.fetch_value("SELECT 1", tenant="acme")
    with pytest.raises(TenantRevisionError):
        await tenancy.run("acme", tenancy.execute, "SELECT 1")
    with pytest.raises(TenantRevisionError):
        await tenancy.wrap(asyncio.sleep, "acme")(0)
    with pytest.raises(TenantRevisionError):
        await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme")
    # operators look at any
    assert await tenancy.fetch_value("SELECT count(rating) FROM notes", tenant="acme", operator=True) == 0
    assert await tenancy.fetch_value("SELECT 1", tenant="globex") == 1

    await new.fleet.migrations.downgrade("0002", tenants=["acme"])
    await until(lambda: old.get(acme), 200)
    assert await new.get(acme) == 503


async def test_a_tenant_that_moves_out_gets_no_further_session(old: Release, new: Release) -> None:
    """A transaction that is open goes on; the next one of the same request is refused."""
    acme = await create(old, "acme")
    tenancy = old.tenancy
    async with tenancy.scope("acme"):
        async with tenancy.session() as session:
            assert await session.scalar(text("SELECT count(*) FROM notes")) == 1
            await session.rollback()
            # an operator's, with none bound
            run = asyncio.create_task(new.fleet.migrations.upgrade(tenants=["acme"]), context=Context())
            (await run).raise_for_failures()
            await until(lambda: old.get(acme), 503)
            assert await session.scalar(text("SELECT count(*) FROM notes")) == 1
        with pytest.raises(TenantRevisionError):
            async with tenancy.session():
                pass


async def test_a_websocket_is_refused_and_an_open_one_gets_no_session(old: Release, new: Release) -> None:
    """Before it is accepted, by a document where the server can send one; an open one is not closed."""
    acme = await create(old, "acme")
    go_on, outcomes = asyncio.Event(), list[str]()

    async def chat(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        for _ in range(2):
            try:
                async with old.tenancy.session() as session:
                    outcomes.append(str(await session.scalar(text("SELECT 'served'"))))
            except TenantRevisionError:
                outcomes.append("refused")
            await go_on.wait()
        await send({"type": "websocket.close"})

    app = TenancyMiddleware(chat, tenancy=old.tenancy)
    headers = [("x-api-key", acme)]
    open_one = asyncio.create_task(messages(app, websocket_scope(headers=headers), [{"type": "websocket.connect"}]))
    await until(lambda: asyncio.sleep(0, outcomes), ["served"])
    await new.fleet.migrations.upgrade(tenants=["acme"])
    await until(lambda: old.get(acme), 503)
    go_on.set()
    assert [message["type"] for message in await open_one] == ["websocket.accept", "websocket.close"]
    assert outcomes == ["served", "refused"]
    refused = await messages(app, websocket_scope(headers=headers), [{"type": "websocket.connect"}])
    assert [(message["type"], message.get("code")) for message in refused] == [("websocket.close", 1008)]
    scope = websocket_scope(headers=headers, extensions={"websocket.http.response": {}})
    answered = await messages(app, scope, [{"type": "websocket.connect"}])
    assert answered[0]["status"] == 503


async def test_a_task_for_a_tenant_outside_is_retried(old: Release, new: Release) -> None:
    """Later, by this or by newer code; the policy may say otherwise."""
    await old.fleet.create("acme")
    gate = TaskGate(old.tenancy, queue="tests")
    message = Message(task="count", id="1", arguments=())
    async with old.tenancy.scope("acme"):
        header = gate.send(message)
    assert (await gate.arrive(header, message)).tenant == old.fleet.tenants["acme"]
    await new.fleet.migrations.upgrade(tenants=["acme"])

    async def refusal(gate: TaskGate) -> str:
        try:
            await gate.arrive(header, message)
        except TaskRefusedError as exc:
            return f"{exc.reason} {exc.outcome} {exc.retry_seconds}"
        return "none"

    await until(lambda: refusal(gate), "revision retry 60.0")
    assert (
        await refusal(TaskGate(old.tenancy, queue="tests", policy=ArrivalPolicy(revision="drop")))
        == "revision drop None"
    )
    # newer code runs it
    await until(lambda: refusal(TaskGate(new.tenancy, queue="tests")), "none")


async def test_a_declaration_without_the_codes_own_head_opens_nothing(config: TenancyConfig, project: Project) -> None:
    """It would refuse the tenants that it creates."""
    project.add("0002", down="0001")
    with pytest.raises(ConfigurationError, match="does not have 0002"):
        async with released(config.replace(compatible_revisions="0001"), "*", initialise=True):
            pass


async def test_a_tenant_is_refused_from_the_notice_of_its_migration_on(
    old: Release, new: Release, config: TenancyConfig
) -> None:
    """Not only once the registry has its new revision: old code sends nothing to a schema that may have changed.

    It is served again where the migration fails, or is interrupted.
    """
    await old.fleet.create("acme")

    async def served(release: Release) -> bool:
        try:
            return bool(await release.tenancy.fetch_value("SELECT 1", tenant="acme") == 1)
        except TenantRevisionError:
            return False

    assert await served(old)
    async with old.fleet.connect("acme") as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("LOCK TABLE notes")
        run = asyncio.create_task(new.fleet.migrations.upgrade(tenants=["acme"]))
        await until(lambda: served(old), False)
        assert (await old.fleet.revision("acme"), await old.fleet.recorded("acme")) == ("0002", "0002")
        with pytest.raises(TenantRevisionError, match="is being migrated to 0003"):
            await old.tenancy.fetch_value("SELECT 1", tenant="acme")
        # a process that is started now has received no notice
        async with released(config.replace(compatible_revisions="0002"), "*") as late:
            assert not await served(late)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await transaction.rollback()
    await until(lambda: served(old))
    await old.fleet.execute("acme", "ALTER TABLE notes ADD rating text")
    assert not (await new.fleet.migrations.upgrade(tenants=["acme"])).ok
    await until(lambda: served(old))
    # a migration that was killed says nothing: until it is resumed, or can last no longer
    registry = new.fleet.registry
    await registry.announce_migration(old.fleet.tenants["acme"].id, target="0003", seconds=3600.0)
    await until(lambda: served(old), False)
    await old.fleet.execute("acme", "ALTER TABLE notes DROP rating")
    (await new.fleet.migrations.upgrade(tenants=["acme"])).raise_for_failures()
    await until(lambda: served(new))
    await registry.announce_migration(old.fleet.tenants["acme"].id, target=None, seconds=0.0)
    assert (await registry.find("acme")).migrating_to is None


AFTER_0003 = "with op.get_context().autocommit_block():\n    op.execute('SELECT pg_advisory_lock(77)')"


@pytest.mark.parametrize("how", ["interrupted", "lost"])
async def test_revisions_that_are_committed_count_however_the_migration_ends(
    old: Release, config: TenancyConfig, project: Project, how: str
) -> None:
    """Old code serves no tenant with a migration that was ended between two revisions."""
    following = Project(project.root.parent / "next")
    following.add("0004", AFTER_0003, down="0003")
    await old.fleet.create("acme")
    newer = config.replace(migrations=following.migrations, compatible_revisions="0003:", migration={"attempts": 1})
    async with released(newer, "id") as new, old.fleet.connect("acme") as other:
        await other.execute("SELECT pg_advisory_lock(77)")
        waiting = (
            "FROM pg_locks l JOIN pg_database d ON d.oid = l.database "
            "WHERE NOT l.granted AND d.datname = current_database()"
        )
        run = asyncio.create_task(new.fleet.migrations.upgrade(tenants=["acme"]))
        await until(lambda: other.fetchval(f"SELECT count(*) {waiting}"), 1)
        if how == "lost":
            await other.fetchval(f"SELECT pg_terminate_backend(pid) {waiting}")
        else:
            run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        assert (await old.fleet.revision("acme"), await old.fleet.recorded("acme")) == ("0003", "0003")
        with pytest.raises(TenantRevisionError, match="is at 0003"):
            await old.tenancy.fetch_value("SELECT 1", tenant="acme")
        await until(lambda: new.tenancy.fetch_value("SELECT 1", tenant="acme"), 1)


async def test_an_interruption_between_two_attempts_leaves_what_the_first_has_committed(
    old: Release, config: TenancyConfig, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = Project(project.root.parent / "next")
    busy = "IF EXISTS (SELECT FROM notes WHERE body = 'busy') THEN RAISE 'busy' USING ERRCODE = '55P03'; END IF"
    block = f'with op.get_context().autocommit_block():\n    op.execute("DO $$ BEGIN {busy}; END $$")'
    following.add("0004", block, down="0003")
    await old.fleet.create("acme")
    await old.fleet.execute("acme", "INSERT INTO notes (body) VALUES ('busy')")
    newer = config.replace(migrations=following.migrations, compatible_revisions="0003:")
    pauses: list[float] = []

    def pause(*_: float) -> float:
        pauses.append(100.0)
        return pauses[-1]

    monkeypatch.setattr("tenancy_orm.migrations.limits.random", SimpleNamespace(uniform=pause))
    async with released(newer, "id") as new:
        run = asyncio.create_task(new.fleet.migrations.upgrade(tenants=["acme"]))
        await until(lambda: old.fleet.revision("acme"), "0003")
        await until(lambda: asyncio.sleep(0, len(pauses)), 1)  # the attempt has ended
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
    assert await old.fleet.recorded("acme") == "0003"


@pytest.mark.parametrize("by", ["cancel", "housekeeping"])
async def test_the_notice_of_a_killed_migration_ends_by_what_the_database_says(
    old: Release, new: Release, by: str
) -> None:
    """Also where it could last no longer: the schema may have changed. A migration that runs keeps its own."""
    for slug in ("untouched", "changed", "expired", "running"):
        await old.fleet.create(slug)
    (await new.fleet.migrations.upgrade(tenants=["changed", "expired"])).raise_for_failures()
    async with new.tenancy.internals.control.transaction() as connection:
        # their processes were killed before they could record the new revision
        await connection.execute(text("UPDATE tenancy.tenants SET schema_revision = '0002'"))
    registry = new.fleet.registry
    for slug, tenant in old.fleet.tenants.items():
        seconds = 0.0 if slug == "expired" else 3600.0
        await registry.announce_migration(tenant.id, target="0003", seconds=seconds)
    assert await old.tenancy.fetch_value("SELECT 1", tenant="expired") == 1  # the hole that this closes
    async with old.fleet.connect("running") as other:
        await other.execute("SELECT pg_advisory_lock($1)", _LOCK)
        if by == "cancel":
            async with new.tenancy.internals.control.transaction() as connection:
                await connection.execute(text("UPDATE tenancy.migration_runs SET state = 'running', ended_at = NULL"))
            [run] = await new.fleet.migrations.runs(state="running")
            await new.fleet.migrations.cancel(run.id)
        else:
            report = (await new.tenancy.run_housekeeping()).chores["clear_notices"]
            assert (report.cleared, report.errors) == (("changed", "expired", "untouched"), ())
        assert [await old.fleet.recorded(slug) for slug in old.fleet.tenants] == ["0002", "0003", "0003", "0002"]
        assert await old.tenancy.fetch_value("SELECT 1", tenant="untouched") == 1
        for slug in ("changed", "expired", "running"):
            with pytest.raises(TenantRevisionError):
                await old.tenancy.fetch_value("SELECT 1", tenant=slug)
    assert await new.fleet.migrations.clear_notices() == NoticeReport(cleared=("running",))
    assert await new.fleet.migrations.clear_notices() == NoticeReport()


async def test_it_is_known_how_many_tenants_are_outside(old: Release, new: Release, caplog: Any) -> None:
    """As a report, for any declaration; in the log when one is refused, and as an event for each."""
    acme, *_ = [await create(old, slug) for slug in ("acme", "globex", "hooli")]
    await new.fleet.migrations.upgrade(tenants=["globex"])
    report = await new.fleet.migrations.compatibility()
    assert [(x.revision, x.tenants, x.migrating, x.served) for x in report.revisions] == [
        ("0002", 2, 0, False),
        ("0003", 1, 0, True),
    ]
    assert (report.declared, report.total, report.outside, report.ok) == ("0003:", 3, 2, False)
    assert report.summary() == "3 tenants, 2 of them at revisions outside 0003:"
    assert (await new.fleet.migrations.compatibility("0002:")).ok
    # what the old release can still serve, asked with the new one's code: its declaration cannot have this head
    before = await new.fleet.migrations.compatibility("0001:0002")
    assert [(x.revision, x.served) for x in before.revisions] == [("0002", True), ("0003", False)]
    assert (before.total, before.outside) == (3, 1)
    with pytest.raises(SettingError):
        await new.fleet.migrations.compatibility("a b")
    received: list[tuple[str, str | None]] = []
    new.tenancy.events.subscribe(TenantRevisionRefused, lambda event: received.append((event.slug, event.revision)))
    for _ in range(3):
        assert await new.get(acme) == 503
    assert received == [("acme", "0002")]
    await until(lambda: asyncio.sleep(0, "3 tenants, 2 of them at revisions outside 0003:" in caplog.text))
