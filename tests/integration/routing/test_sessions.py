"""Sessions, connections and engines of tenants: ordinary SQLAlchemy, on the tenant's own database."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, selectinload

from tenancy_orm.config import TenancyConfig
from tenancy_orm.context import reset_current, set_current
from tenancy_orm.errors import ConfigurationError, CrossTenantError, NotOpenError, RoutingError, TenantNotFoundError
from tenancy_orm.events import ConnectionOpened, EventBus, IsolationIncident
from tenancy_orm.routing import Router, TenantSession
from tenancy_orm.tenant import Status, Tenant
from tests.support import databases as support
from tests.support.databases import Databases
from tests.support.models import Note, Tag


async def bodies(router: Router, tenant: Tenant) -> list[str]:
    async with router.session(tenant) as session:
        return list(await session.scalars(select(Note.body).order_by(Note.id)))


async def test_each_tenant_has_its_own_rows(made: Databases, router: Router) -> None:
    """A tenant's session does not see rows that another tenant has committed."""
    a, b = await made.create(), await made.create()
    for tenant in (a, b):
        async with router.session(tenant) as session:
            session.add(Note(body=tenant.slug))
            await session.commit()
    assert await bodies(router, a) == [a.slug]
    assert await bodies(router, b) == [b.slug]


async def test_what_is_not_committed_is_rolled_back(made: Databases, router: Router) -> None:
    """A session without a commit is rolled back, as any AsyncSession."""
    a = await made.create()
    async with router.session(a) as session:
        session.add(Note(body="lost"))
        await session.flush()
    assert await bodies(router, a) == []


async def test_it_is_an_ordinary_async_session(made: Databases, router: Router) -> None:
    """Unit of work, lazy and eager loading, refresh, savepoints and streams work as they do elsewhere."""
    a = await made.create()
    async with router.session(a) as session:
        assert type(session) is AsyncSession
        note = Note(body="first", tags=[Tag(name="x"), Tag(name="y")])
        session.add(note)
        await session.commit()
        assert note.body == "first", "objects stay readable after a commit"
        await session.refresh(note)
        note.body = "second"
        async with session.begin_nested():
            session.add(Note(body="third"))
        await session.commit()
    async with router.session(a) as session:
        found = await session.get_one(Note, note.id)
        assert sorted(tag.name for tag in await found.awaitable_attrs.tags) == ["x", "y"]
        eager = await session.scalars(select(Note).options(selectinload(Note.tags)).order_by(Note.id))
        assert [(one.body, len(one.tags)) for one in eager] == [("second", 2), ("third", 0)]
        assert [one.body async for one in await session.stream_scalars(select(Note).order_by(Note.id))] == [
            "second",
            "third",
        ]
        await session.delete(found)
        await session.commit()
    assert await bodies(router, a) == ["third"]


async def test_json_is_decoded_by_the_driver(made: Databases, router: Router) -> None:
    """The dialect sets up every connection, the first and later ones."""
    a, b = await made.create(), await made.create()
    for tenant in (a, b):
        async with router.session(tenant) as session:
            value = await session.scalar(text("SELECT CAST(:value AS text)::jsonb"), {"value": json.dumps({"a": [1]})})
            assert value == {"a": [1]}


async def test_an_error_of_the_application_passes_untouched(made: Databases, router: Router) -> None:
    """An IntegrityError is SQLAlchemy's own, with its cause."""
    a = await made.create()
    async with router.session(a) as session:
        session.add(Tag(note_id=1, name="orphan"))
        with pytest.raises(IntegrityError) as caught:
            await session.flush()
    assert type(caught.value) is IntegrityError
    assert getattr(caught.value.orig, "sqlstate", None) == "23503"


async def test_options_are_those_of_async_session(made: Databases, router: Router) -> None:
    """A session takes AsyncSession's options: autoflush, info and a session class of the application's."""

    class Own(TenantSession):
        pass

    a = await made.create()
    async with router.session(a, autoflush=False, info={"k": 1}, sync_session_class=Own) as session:
        assert isinstance(session.sync_session, Own)
        assert session.autoflush is False
        assert session.info == {"k": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"bind": None},
        {"on_refusal": None},
        {"sync_session_class": Session},
        {"session_class": Session},
        {"session_class": AsyncSession, "sync_session_class": Session},
    ],
)
async def test_options_that_would_take_the_guard_away_are_refused(
    made: Databases, router: Router, options: dict[str, Any]
) -> None:
    """Options that would bypass the tenant's engine or the guard raise ``ConfigurationError``."""
    a = await made.create()
    with pytest.raises(ConfigurationError):
        async with router.session(a, **options):
            pass
    assert router.statistics().leased == 0


async def test_a_session_ends_with_its_block(made: Databases, router: Router) -> None:
    """A session is refused after its block, when its engine is no longer leased."""
    a = await made.create()
    async with router.session(a) as session:
        pass
    with pytest.raises(NotOpenError):
        await session.execute(text("SELECT 1"))


async def test_a_connection_without_a_session(made: Databases, router: Router) -> None:
    """``router.connection`` gives an AsyncConnection, for SQLAlchemy Core."""
    a = await made.create()
    async with router.connection(a) as connection:
        assert await connection.scalar(text("SELECT current_database()")) == (a.placement and a.placement.database)
    statistics = router.statistics().servers["default"]
    assert (statistics.in_use, statistics.idle) == (0, 1)


async def test_a_lease_gives_the_engine(made: Databases, router: Router) -> None:
    """``router.lease`` gives an AsyncEngine; its URL has no password."""
    a = await made.create()
    async with router.lease(a) as engine, router.lease(a) as same:
        assert engine is same
        assert a.placement is not None
        assert engine.url.database == a.placement.database
        assert engine.url.password is None
        assert router.statistics().leased == 1
    assert router.statistics().leased == 0


async def test_a_tenant_without_a_database_is_refused(router: Router, made: Databases) -> None:
    """A tenant without a placement, such as a purged one, raises an error."""
    a = await made.create()
    with pytest.raises(RoutingError):
        async with router.session(replace(a, placement=None)):
            pass
    with pytest.raises(TenantNotFoundError):
        async with router.session(replace(a, placement=None, status=Status.PURGED)):
            pass


async def test_a_closed_router_opens_nothing(made: Databases, config: TenancyConfig) -> None:
    """A closed router opens no session, and closing it again does nothing."""
    a = await made.create()
    async with support.router(made, config) as router:
        assert await bodies(router, a) == []
        await router.close()
        assert await made.sessions() == 0
        with pytest.raises(NotOpenError):
            async with router.session(a):
                pass


async def test_tenants_share_one_dialect_and_one_compiled_cache(made: Databases, router: Router) -> None:
    """A statement is compiled once for all tenants, and the dialect is initialised once."""
    a, b = await made.create(), await made.create()
    async with router.lease(a) as one, router.lease(b) as other:
        assert one.dialect is other.dialect
        cache = one.get_execution_options()["compiled_cache"]
        assert cache is other.get_execution_options()["compiled_cache"]
    await bodies(router, a)
    compiled = len(cache)
    assert compiled > 0
    await bodies(router, b)
    assert len(cache) == compiled


async def test_opening_a_connection_is_told(made: Databases, config: TenancyConfig) -> None:
    """The event of a new connection has the tenant, the server and the seconds that it took."""
    a = await made.create()
    events, seen = EventBus(), list[ConnectionOpened]()
    events.subscribe(ConnectionOpened, seen.append)
    async with support.router(made, config, events=events) as router:
        await bodies(router, a)
        await bodies(router, a)
    assert [(event.tenant_id, event.slug, event.server) for event in seen] == [(a.id, a.slug, "default")]
    assert 0 < seen[0].seconds < 10


# --- another tenant is bound ----------------------------------------------------------------------------------------


async def test_nothing_of_a_tenant_works_while_another_is_bound(made: Databases, config: TenancyConfig) -> None:
    """Open sessions, connections and streams are refused and reported; they work again when the binding has ended."""
    a, b = await made.create(), await made.create()
    events, seen = EventBus(), list[IsolationIncident]()
    events.subscribe(IsolationIncident, seen.append)
    async with support.router(made, config, events=events) as router:
        async with router.session(b) as session, router.connection(b) as connection:
            session.add_all([Note(body=str(number)) for number in range(200)])
            await session.commit()
            stream = await session.stream_scalars(select(Note.id).execution_options(yield_per=10))
            assert await anext(aiter(stream)) is not None
            token = set_current(a)
            for attempt in (
                lambda: session.execute(text("SELECT 1")),
                lambda: session.scalars(select(Note)),
                lambda: connection.execute(text("SELECT 1")),
                stream.all,
            ):
                with pytest.raises(CrossTenantError) as caught:
                    await attempt()
                assert (caught.value.bound, caught.value.requested) == (a.slug, b.slug)
            with pytest.raises(CrossTenantError):
                async with router.connection(b):
                    pass
            reset_current(token)
            await session.rollback()
            assert await session.scalar(text("SELECT 1")) == 1
        async with router.session(a) as session:
            set_current(a)
            assert await session.scalar(text("SELECT 1")) == 1
            set_current(None)
    assert {event.kind for event in seen} == {"CrossTenantError"}
    assert {event.tenant_id for event in seen} == {b.id}


async def test_a_task_that_inherits_the_binding_may_go_on(made: Databases, config: TenancyConfig) -> None:
    """A task that inherits the binding may use the session of that tenant."""
    a = await made.create()
    async with support.router(made, config) as router:
        token = set_current(a)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(bodies(router, a))
        reset_current(token)
        assert task.result() == []
