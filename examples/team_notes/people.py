"""People and their passwords, in a database of the application's own.

A person may be a member of several teams, or of none yet, so people are in no tenant's database. They are not in the
control database either: its tables are tenancy_orm's, which knows a person by an id alone, the subject of a credential.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar, TypeVarTuple
from uuid import uuid4

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError
from sqlalchemy import DateTime, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Arguments = TypeVarTuple("Arguments")
Value = TypeVar("Value")

FREE_FAILURES = 5
MAX_PAUSE_SECONDS = 60
_CREATION_LOCK = 0x6E6F746573  # of the tables: several processes start at once

_hasher = PasswordHasher()  # Argon2id
# what an address that nobody has is compared with, so that it takes as long to refuse
_NOBODY = _hasher.hash("")


class Base(DeclarativeBase): ...


class Person(Base):
    __tablename__ = "people"
    # never the address: people change theirs, and memberships are stored under the id
    id: Mapped[str] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    password: Mapped[str]
    failures: Mapped[int] = mapped_column(default=0)
    failed_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class TooManyFailuresError(Exception):
    """Somebody has tried wrong passwords for this person; ``seconds`` until the next attempt."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"try again in {seconds} seconds")
        self.seconds = seconds


class People:
    """Signs people up, and checks their passwords."""

    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(url)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._hashing = asyncio.Semaphore(4)  # each takes 64 MiB

    async def open(self) -> None:
        """Create the table, where a product would run its own Alembic migrations."""
        async with self._engine.begin() as connection:
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({_CREATION_LOCK})"))
            await connection.run_sync(Base.metadata.create_all)

    async def close(self) -> None:
        await self._engine.dispose()

    async def sign_up(self, email: str, password: str) -> Person | None:
        """Add a person; None if the address is taken."""
        hashed = await self._in_thread(_hasher.hash, password)
        values = {"id": str(uuid4()), "email": _normalised(email), "password": hashed, "failures": 0}
        async with self._sessions.begin() as session:
            statement = insert(Person).values(values).on_conflict_do_nothing().returning(Person)
            return await session.scalar(statement)

    async def log_in(self, email: str, password: str) -> Person | None:
        """Return the person with this address and password, else None.

        Raises:
            TooManyFailuresError: there were too many wrong passwords; not even the right one is tried.
        """
        async with self._sessions.begin() as session:
            query = select(Person).where(Person.email == _normalised(email)).with_for_update()
            person = await session.scalar(query)
            if person is not None:
                if (wait := _pause(person)) > 0:
                    raise TooManyFailuresError(wait)
                # counted before it is tried: a hundred guesses that come at once must not all find the same count
                person.failures += 1
                person.failed_at = datetime.now(UTC)
        hashed = _NOBODY if person is None else person.password
        is_right = await self._in_thread(_verify, hashed, password)
        if person is None or not is_right:
            return None
        change: dict[str, object] = {"failures": 0, "failed_at": None}
        if _hasher.check_needs_rehash(hashed):
            change["password"] = await self._in_thread(_hasher.hash, password)
        async with self._sessions.begin() as session:
            await session.execute(update(Person).where(Person.id == person.id).values(change))
        return person

    async def emails(self, ids: list[str]) -> dict[str, str]:
        """The addresses of people, by id."""
        async with self._sessions() as session:
            rows = await session.execute(select(Person.id, Person.email).where(Person.id.in_(ids)))
            return {row.id: row.email for row in rows}

    async def _in_thread(self, function: Callable[[*Arguments], Value], *arguments: *Arguments) -> Value:
        async with self._hashing:
            return await asyncio.to_thread(function, *arguments)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[People]:
    """People in the database at ``url``."""
    people = People(url)
    try:
        await people.open()
        yield people
    finally:
        await people.close()


@asynccontextmanager
async def database(url: str | None) -> AsyncIterator[str]:
    """The URL of the database: ``url``, or one on the embedded server of development where that is None."""
    if url is not None:
        yield url
        return
    from tenancy_orm.testing.embedded import EmbeddedServer

    server = EmbeddedServer(Path(".tenancy"))
    await asyncio.to_thread(server.start)
    try:
        await _create_database(server.url(driver="asyncpg"), "people")
        yield server.url("people", driver="asyncpg")
    finally:
        await asyncio.to_thread(server.stop)


async def _create_database(server_url: str, name: str) -> None:
    engine = create_async_engine(server_url, isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            if not await connection.scalar(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": name}):
                await connection.execute(text(f"CREATE DATABASE {name}"))
    finally:
        await engine.dispose()


def _verify(hashed: str, password: str) -> bool:
    try:
        return _hasher.verify(hashed, password)
    except (VerifyMismatchError, InvalidHashError):
        return False


def _pause(person: Person) -> int:
    """Seconds until the next attempt: none after a few failures, then twice as many each time."""
    if person.failed_at is None or person.failures < FREE_FAILURES:
        return 0
    pause = timedelta(seconds=min(2 ** (person.failures - FREE_FAILURES), MAX_PAUSE_SECONDS))
    return max(0, round((person.failed_at + pause - datetime.now(UTC)).total_seconds() + 0.5))


def _normalised(email: str) -> str:
    return email.strip().lower()
