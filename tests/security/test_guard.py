"""The guard: an object of one tenant gets into no other tenant's session, by whatever route."""

from __future__ import annotations

import copy
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import insert, inspect, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, make_transient, make_transient_to_detached, selectinload
from sqlalchemy.orm.loading import merge_frozen_result

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import CrossTenantError
from tenancy_orm.events import EventBus, IsolationIncident
from tenancy_orm.routing import Router, TenantSession
from tenancy_orm.tenant import Tenant
from tests.support import databases as support
from tests.support.databases import Databases
from tests.support.models import Note, Tag
from tests.support.postgres import Postgres

SECRET = "secret of acme"


@pytest.fixture
def config(postgres: Postgres, name_prefix: str) -> TenancyConfig:
    """A small budget."""
    return support.configuration(postgres, name_prefix)


@pytest.fixture
async def made(postgres: Postgres, config: TenancyConfig) -> AsyncIterator[Databases]:
    """A maker of tenants."""
    async with support.databases(postgres, config) as made:
        yield made


@dataclass
class World:
    """Two tenants with rows of the same ids, and what opens their sessions: with the guard, or without."""

    router: Router
    acme: Tenant
    globex: Tenant
    guarded: bool
    incidents: list[IsolationIncident]

    @asynccontextmanager
    async def session(self, tenant: Tenant) -> AsyncIterator[AsyncSession]:
        """A session of the kind in question."""
        if self.guarded:
            async with self.router.session(tenant) as session:
                yield session
        else:
            async with self.router.lease(tenant) as engine, AsyncSession(engine, expire_on_commit=False) as session:
                yield session

    async def note(self) -> Note:
        """A detached object of acme, with its tags."""
        async with self.session(self.acme) as session:
            return (await session.scalars(select(Note).options(selectinload(Note.tags)))).one()

    async def rows(self) -> list[Any]:
        """What is in globex's database."""
        async with self.router.lease(self.globex) as engine, engine.connect() as connection:
            notes = await connection.execute(text("SELECT id, body FROM notes ORDER BY id"))
            tags = await connection.execute(text("SELECT id, note_id, name FROM tags ORDER BY id"))
            return [*notes.all(), *tags.all()]


@pytest.fixture
async def worlds(made: Databases, config: TenancyConfig) -> AsyncIterator[Callable[[bool], World]]:
    """Makes a world."""
    acme, globex = await made.create("acme"), await made.create("globex")
    for tenant, body in ((acme, SECRET), (globex, "own")):
        assert tenant.placement is not None
        async with made.postgres.connect(tenant.placement.database) as inside:
            await inside.execute(
                f"INSERT INTO notes (body) VALUES ('{body}'); INSERT INTO tags (note_id, name) VALUES (1, 'tag {body}')"
            )
    events, incidents = EventBus(), list[IsolationIncident]()
    events.subscribe(IsolationIncident, incidents.append)
    async with support.router(made, config, events=events) as router:
        yield lambda guarded: World(router, acme, globex, guarded, incidents)


# Each attack takes acme's data into a session of globex. It returns what it could read there, if that is its point.


async def add(world: World, session: AsyncSession) -> object:
    note = await world.note()
    session.add(note)
    note.body += "!"
    return None


async def add_all(world: World, session: AsyncSession) -> object:
    note = await world.note()
    session.add_all([note])
    note.body += "!"
    return None


async def add_unpickled(world: World, session: AsyncSession) -> object:
    note = pickle.loads(pickle.dumps(await world.note()))  # noqa: S301 - our own bytes
    session.add(note)
    note.body += "!"
    return None


async def add_deep_copy(world: World, session: AsyncSession) -> object:
    note = copy.deepcopy(await world.note())
    session.add(note)
    note.body += "!"
    return None


async def add_transient(world: World, session: AsyncSession) -> object:
    note = await world.note()
    (tag,) = note.tags
    make_transient(tag)
    make_transient(note)
    note.id = tag.id = None  # type: ignore[assignment]
    session.add(note)
    return None


async def add_transient_as_detached(world: World, session: AsyncSession) -> object:
    note = await world.note()
    make_transient(note)
    make_transient_to_detached(note)
    session.add(note)
    note.body += "!"
    return None


async def add_rolled_back(world: World, session: AsyncSession) -> object:
    note = Note(body=SECRET)
    async with world.session(world.acme) as other:
        other.add(note)
        await other.flush()
        await other.rollback()
    note.id = None  # type: ignore[assignment]
    session.add(note)
    return None


async def add_expunged(world: World, session: AsyncSession) -> object:
    note = Note(body=SECRET)
    async with world.session(world.acme) as other:
        other.add(note)
        other.expunge(note)
    session.add(note)
    return None


async def delete(world: World, session: AsyncSession) -> object:
    await session.delete(await world.note())
    return None


async def delete_all(world: World, session: AsyncSession) -> object:
    note = await world.note()
    await session.run_sync(lambda sync: sync.delete_all([note]))
    return None


async def merge(world: World, session: AsyncSession) -> object:
    await session.merge(await world.note())
    return None


async def merge_all(world: World, session: AsyncSession) -> object:
    await session.merge_all([await world.note()])
    return None


async def merge_unpickled(world: World, session: AsyncSession) -> object:
    await session.merge(pickle.loads(pickle.dumps(await world.note())))  # noqa: S301 - our own bytes
    return None


async def merge_without_loading(world: World, session: AsyncSession) -> object:
    merged = await session.merge(await world.note(), load=False)
    found = await session.get_one(Note, 1)
    assert found is merged, "globex's code finds acme's object by the id of its own"
    return found.body


async def merge_a_new_object_that_leads_to_one(world: World, session: AsyncSession) -> object:
    await session.merge(Note(body="new", tags=[*(await world.note()).tags]))
    return None


async def thawed(session: AsyncSession, frozen: Any) -> Any:
    def thaw(sync: Session) -> Any:
        return merge_frozen_result(sync, select(Note), frozen, load=False)()  # type: ignore[no-untyped-call]

    return await session.run_sync(thaw)


async def merge_from_a_cache(world: World, session: AsyncSession) -> object:
    async with world.session(world.acme) as other:
        frozen = (await other.execute(select(Note))).freeze()
    return (await thawed(session, frozen)).scalar_one().body


async def merge_from_a_pickled_cache(world: World, session: AsyncSession) -> object:
    async with world.session(world.acme) as other:
        frozen = (await other.execute(select(Note))).freeze()
    frozen = pickle.loads(pickle.dumps(frozen))  # noqa: S301 - our own bytes
    return (await thawed(session, frozen)).scalar_one().body


async def bulk_save(world: World, session: AsyncSession) -> object:
    note = await world.note()
    await session.run_sync(lambda sync: sync.bulk_save_objects(iter([note]), update_changed_only=False))
    return None


async def bulk_save_transient(world: World, session: AsyncSession) -> object:
    note = await world.note()
    make_transient(note)
    note.id = None  # type: ignore[assignment]
    await session.run_sync(lambda sync: sync.bulk_save_objects([note]))
    return None


async def append_to_own(world: World, session: AsyncSession) -> object:
    own = await session.get_one(Note, 1, options=[selectinload(Note.tags)])
    (tag,) = (await world.note()).tags
    make_transient(tag)
    tag.id = None  # type: ignore[assignment]
    own.tags.append(tag)
    return None


async def append_to_new(world: World, session: AsyncSession) -> object:
    (tag,) = (await world.note()).tags
    make_transient(tag)
    tag.id = None  # type: ignore[assignment]
    session.add(Note(body="new", tags=[tag]))
    return None


async def point_to(world: World, session: AsyncSession) -> object:
    note = await world.note()
    session.add(Tag(name="new", note=note))
    return None


async def load_by_its_relationships(world: World, session: AsyncSession) -> object:
    async with world.session(world.acme) as other:
        note = (await other.scalars(select(Note))).one()
    session.sync_session.enable_relationship_loading(note)
    return f"{note.body}: {[tag.name for tag in await note.awaitable_attrs.tags]}"


async def smuggle(world: World, session: AsyncSession) -> object:
    note = await world.note()
    state, sync = inspect(note), session.sync_session
    state.session_id = sync.hash_key
    sync.identity_map.add(state)
    note.body += "!"
    return None


async def bind_to_its_engine(world: World, session: AsyncSession) -> object:
    async with world.router.lease(world.acme) as engine:
        return await session.scalar(select(Note.body), bind_arguments={"bind": engine.sync_engine})


async def bind_a_class_to_its_engine(world: World, session: AsyncSession) -> object:
    async with world.router.lease(world.acme) as engine:
        session.sync_session.bind_mapper(Note, engine.sync_engine)
        return await session.scalar(select(Note.body))


ATTACKS: list[Callable[[World, AsyncSession], Awaitable[object]]] = [
    add,
    add_all,
    add_unpickled,
    add_deep_copy,
    add_transient,
    add_transient_as_detached,
    add_rolled_back,
    add_expunged,
    delete,
    merge,
    merge_unpickled,
    merge_without_loading,
    merge_a_new_object_that_leads_to_one,
    merge_from_a_cache,
    merge_from_a_pickled_cache,
    bulk_save,
    bulk_save_transient,
    append_to_own,
    append_to_new,
    point_to,
    load_by_its_relationships,
    smuggle,
    bind_to_its_engine,
    bind_a_class_to_its_engine,
    # of SQLAlchemy 2.1
    *((delete_all, merge_all) if hasattr(Session, "merge_all") else ()),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_an_object_of_one_tenant_gets_into_no_other_s_session(
    worlds: Callable[[bool], World], attack: Callable[[World, AsyncSession], Awaitable[object]]
) -> None:
    """It works on a plain AsyncSession; on a tenant's it is refused, by name, and nothing is written."""
    guarded, open_ = worlds(True), worlds(False)
    before = await guarded.rows()

    async with guarded.session(guarded.globex) as session:
        with pytest.raises(CrossTenantError) as caught:
            await attack(guarded, session)
            await session.flush()
        assert (caught.value.bound, caught.value.requested) == ("globex", "acme")
        if session.in_transaction():
            # an application that catches the error and goes on
            with pytest.raises(CrossTenantError):
                await session.commit()
            await session.rollback()
            if attack is not bind_a_class_to_its_engine:
                # what it does afterwards is not held against it
                session.add(Note(body="later"))
                await session.commit()
    after = await guarded.rows()
    assert [row for row in after if "later" not in row] == before
    assert {(event.slug, event.kind) for event in guarded.incidents} == {("globex", "CrossTenantError")}

    async with open_.session(open_.globex) as session:
        seen = await attack(open_, session)
        await session.commit()
    assert SECRET in str(seen) or await open_.rows() != after, "the attack must work where there is no guard"


async def test_objects_move_freely_between_sessions_of_their_tenant(worlds: Callable[[bool], World]) -> None:
    """By the same routes."""
    world = worlds(True)
    note = await world.note()
    async with world.session(world.acme) as session:
        session.add(note)
        note.body = "first"
        await session.commit()
    async with world.session(world.acme) as session:
        merged = await session.merge(pickle.loads(pickle.dumps(note)))  # noqa: S301 - our own bytes
        merged.body = "second"
        await session.commit()
        frozen = (await session.execute(select(Note))).freeze()
    async with world.session(world.acme) as session:
        assert (await thawed(session, frozen)).scalar_one().body == "second"
        await session.run_sync(lambda sync: sync.bulk_save_objects([Note(body="third")]))
        await session.commit()
        assert list(await session.scalars(select(Note.body).order_by(Note.id))) == ["second", "third"]


async def test_an_object_that_never_met_a_tenant_may_be_added_anywhere(worlds: Callable[[bool], World]) -> None:
    """Only the first session it enters decides."""
    world = worlds(True)
    note = Note(body="new")
    async with world.session(world.globex) as session:
        session.add(note)
        await session.commit()
    async with world.session(world.acme) as session:
        with pytest.raises(CrossTenantError, match="adding a Note"):
            session.add(note)


async def test_what_a_bulk_save_wrote_is_marked(worlds: Callable[[bool], World]) -> None:
    """Although it never enters the session."""
    world = worlds(True)
    note = Note(body="new")
    async with world.session(world.globex) as session:
        await session.run_sync(lambda sync: sync.bulk_save_objects([note]))
        await session.commit()
    async with world.session(world.acme) as session:
        with pytest.raises(CrossTenantError):
            await session.merge(note)


async def test_rows_returned_by_an_insert_are_marked(worlds: Callable[[bool], World]) -> None:
    """ORM-enabled INSERT .. RETURNING loads objects without a SELECT."""
    world = worlds(True)
    async with world.session(world.acme) as session:
        note = (await session.scalars(insert(Note).returning(Note), [{"body": "new"}])).one()
        await session.commit()
    async with world.session(world.globex) as session:
        with pytest.raises(CrossTenantError):
            await session.merge(note)


async def test_a_session_class_of_the_application_is_guarded_as_well(worlds: Callable[[bool], World]) -> None:
    """Listeners of the base class reach classes derived from it, also later ones."""

    class Own(TenantSession):
        pass

    class OfOthers(Session):
        pass

    class OwnAsync(AsyncSession):
        sync_session_class = OfOthers

    world = worlds(True)
    for options in ({"sync_session_class": Own}, {"session_class": OwnAsync}):
        async with world.router.session(world.globex, **options) as session:
            with pytest.raises(CrossTenantError):
                session.add(await world.note())
            assert (
                isinstance(session.sync_session, OfOthers)
                is isinstance(session, OwnAsync)
                is ("session_class" in options)
            )


async def test_an_object_still_in_another_s_session_is_refused_too(worlds: Callable[[bool], World]) -> None:
    """By SQLAlchemy itself, which has an object in one session at a time."""
    world = worlds(True)
    async with world.session(world.acme) as other, world.session(world.globex) as session:
        note = (await other.scalars(select(Note))).one()
        with pytest.raises(InvalidRequestError):
            session.add(note)
        with pytest.raises(CrossTenantError):
            await session.merge(note)


def test_plain_sessions_of_the_application_are_left_alone() -> None:
    """The guard listens on its own class, not on every session of the process."""
    with Session() as session:
        assert not session.dispatch.before_attach
        assert not session.dispatch.loaded_as_persistent
