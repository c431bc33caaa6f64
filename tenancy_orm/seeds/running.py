"""Running one seed in one database: in a transaction, within a time-out, and once for each version."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from ..config import project
from ..context import bind
from ..errors import ConfigurationError, SeedError
from ..migrations.statements import statements
from ..postgres.errors import postgres_error
from ..routing import Router
from ..tenant import Tenant
from . import records
from .definition import Seed
from .failures import place_of, reason_of

# only a text with one of these words is taken apart
_TRANSACTION_CONTROL = re.compile(r"\b(BEGIN|START|COMMIT|END|ROLLBACK|ABORT|PREPARE)\b", re.IGNORECASE)


async def run_for_tenant(router: Router, tenant: Tenant, seed: Seed, *, timeout: float, force: bool = False) -> bool:
    """Run a seed as the tenant's role, with the tenant bound; return whether it ran, and not before.

    Args:
        router: Gives the session.
        tenant: The tenant.
        seed: The seed.
        timeout: Seconds that it may take.
        force: Run it even if its version was applied.

    Raises:
        SeedError: it failed, or took too long; nothing of it remains.
    """
    async with _bounded(seed, timeout, tenant.slug) as progress:
        with bind(tenant):
            async with router.session(tenant) as session, session.begin():
                return await _run(session, seed, tenant, progress, force=force)


async def run_as_owner(
    connection: AsyncConnection, seed: Seed, *, timeout: float, force: bool = False, tenant: str | None = None
) -> bool:
    """Run a seed that does not depend on the tenant, as the owner of the tables; return whether it ran.

    Args:
        connection: To the template, or to a tenant's database.
        seed: The seed.
        timeout: Seconds that it may take.
        force: Run it even if its version was applied.
        tenant: The slug of the tenant, for an error.

    Raises:
        SeedError: as ``run_for_tenant``.
    """
    async with (
        _bounded(seed, timeout, tenant) as progress,
        AsyncSession(connection, expire_on_commit=False) as session,
        session.begin(),
    ):
        return await _run(session, seed, None, progress, force=force)


@dataclass(slots=True)
class _Progress:
    """Which statement of a SQL file runs; None before and after."""

    statement: int | None = None

    def place(self, seed: Seed, error: Exception) -> str:
        """Where in the file it failed, for the message."""
        if self.statement is None:
            return ""
        found = postgres_error(error)
        # where PostgreSQL points at, counted from 1 in this statement
        position = int(getattr(found, "position", None) or 1)
        line = seed.lines[self.statement] + seed.statements[self.statement].count("\n", 0, position - 1)
        return f" ({project.shown(Path(seed.origin))}, line {line})"


async def _run(session: AsyncSession, seed: Seed, tenant: Tenant | None, progress: _Progress, *, force: bool) -> bool:
    claimed, previous = await records.claim(session, seed, force=force)
    if not claimed:
        return False
    if seed.function is None:
        connection = await session.connection()
        for progress.statement, statement in enumerate(seed.statements):
            await connection.exec_driver_sql(statement)
        progress.statement = None
        return True
    offered = {"tenant": tenant, "previous": previous}
    begun = session.sync_session.get_transaction()
    with _uncommitted(session), _without_transaction_control(await session.connection()):
        await _call(session, seed.function, {name: offered[name] for name in seed.asks})
    if session.sync_session.get_transaction() is not begun:
        raise ConfigurationError("a seed must not end its transaction; raise an error to undo what it did")
    return True


@contextmanager
def _uncommitted(session: AsyncSession) -> Iterator[None]:
    """Refuse a commit in the body: the seed would count as applied, whatever it does afterwards."""

    def refuse(inner: Session) -> None:
        # a savepoint is committed as well
        if not inner.in_nested_transaction():
            raise ConfigurationError("a seed must not commit: what it did is committed when it returns")

    event.listen(session.sync_session, "before_commit", refuse)
    try:
        yield
    finally:
        event.remove(session.sync_session, "before_commit", refuse)


@contextmanager
def _without_transaction_control(connection: AsyncConnection) -> Iterator[None]:
    """Refuse a COMMIT or ROLLBACK that the body sends as text: SQLAlchemy would not know that the transaction ended."""

    def refuse(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if _TRANSACTION_CONTROL.search(statement):
            for one in statements(statement):
                if one.controls_transaction:
                    raise ConfigurationError(f"a seed must not end its transaction: leave {one.words[0]} out")

    event.listen(connection.sync_connection, "before_cursor_execute", refuse)
    try:
        yield
    finally:
        event.remove(connection.sync_connection, "before_cursor_execute", refuse)


async def _call(session: AsyncSession, function: Any, arguments: dict[str, Any]) -> None:
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        await function(session, **arguments)
        return
    outcome = await session.run_sync(lambda synchronous: function(synchronous, **arguments))
    if inspect.isawaitable(outcome):
        outcome.close() if inspect.iscoroutine(outcome) else None
        raise TypeError("the function returned an awaitable: write it as async def")


@asynccontextmanager
async def _bounded(seed: Seed, timeout: float, tenant: str | None) -> AsyncIterator[_Progress]:
    """Bound the body, and have its errors name the seed."""
    limit = asyncio.timeout(timeout)
    progress = _Progress()
    try:
        async with limit:
            yield progress
    except Exception as exc:
        late = isinstance(exc, TimeoutError) and limit.expired()
        reason = f"did not end within {timeout:g} s (provisioning.seed_timeout)" if late else reason_of(exc, tenant)
        message = f"seed {seed.name!r}{progress.place(seed, exc)} {reason}{place_of(tenant)}"
        raise SeedError(message, seed=seed.name, tenant=tenant) from exc
