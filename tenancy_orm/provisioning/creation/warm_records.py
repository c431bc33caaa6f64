"""What the control database knows of warm databases: which there are, and which a creation may claim.

A creation claims one in ``Registry.register``, in the statement that writes its tenant's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Row, delete, func, insert, select, text, update

from ...control.database import ControlDatabase
from ...control.models import warm_databases

WarmState = Literal["making", "ready", "dropping"]


@dataclass(frozen=True, slots=True)
class WarmRecord:
    """A warm database's row; its role has its name.

    ``wanted_seconds`` is how long ago a process with its recipe asked for it, by the clock of the control database.
    """

    name: str
    server: str
    template: str
    recipe: str
    revision: str | None
    state: WarmState
    created_at: datetime
    wanted_seconds: float


_COLUMNS = (
    warm_databases.c.name,
    warm_databases.c.server,
    warm_databases.c.template,
    warm_databases.c.recipe,
    warm_databases.c.revision,
    warm_databases.c.state,
    warm_databases.c.created_at,
    func.extract("epoch", func.clock_timestamp() - warm_databases.c.wanted_at).label("wanted_seconds"),
)

# by id, which begins with its time, since that is indexed; a window of ten minutes, the busiest of a day
_BUSIEST = text("""
SELECT coalesce(max(created), 0) FROM (
    SELECT count(*) AS created FROM tenancy.tenants
     WHERE id >= CAST(:first AS uuid) AND server = :server
     GROUP BY floor(extract(epoch FROM created_at) / :window)) AS windows
""")
_BEING_CREATED = text("""
SELECT EXISTS (SELECT FROM tenancy.tenants
 WHERE status = 'provisioning' AND server = :server AND updated_at > now() - make_interval(secs => :seconds))
""")


class WarmRecords:
    """Reads and writes the rows of warm databases.

    Args:
        control: The control database.
    """

    def __init__(self, control: ControlDatabase) -> None:
        self._control = control

    async def of_server(self, server: str) -> list[WarmRecord]:
        """Return the warm databases of a server, the oldest first."""
        query = select(*_COLUMNS).where(warm_databases.c.server == server)
        async with self._control.connect() as connection:
            rows = await connection.execute(query.order_by(warm_databases.c.created_at, warm_databases.c.name))
            return [_record(row) for row in rows]

    async def find(self, name: str) -> WarmRecord | None:
        """Return the row of a warm database, or None if there is none, or a creation has claimed it."""
        async with self._control.connect() as connection:
            row = (await connection.execute(select(*_COLUMNS).where(warm_databases.c.name == name))).one_or_none()
            return None if row is None else _record(row)

    async def add(self, name: str, *, server: str, template: str, recipe: str, revision: str | None) -> None:
        """Record a warm database that is about to be made."""
        values = {"name": name, "server": server, "template": template, "recipe": recipe, "revision": revision}
        async with self._control.transaction() as connection:
            await connection.execute(insert(warm_databases).values(values))

    async def complete(self, name: str) -> bool:
        """Let creations claim a warm database; False if it has no row any more."""
        return await self._set(name, "ready", ("making",))

    async def withdraw(self, name: str) -> bool:
        """Let no creation claim a warm database from now on; False if one has, or it has no row."""
        return await self._set(name, "dropping", ("making", "ready", "dropping"))

    async def _set(self, name: str, state: WarmState, before: Sequence[WarmState]) -> bool:
        changed = (
            update(warm_databases)
            .where(warm_databases.c.name == name, warm_databases.c.state.in_(before))
            .values(state=state, wanted_at=func.clock_timestamp())
        )
        async with self._control.transaction() as connection:
            return bool((await connection.execute(changed)).rowcount)

    async def remove(self, name: str) -> None:
        """Delete the row of a warm database that was dropped."""
        unclaimable = warm_databases.c.state != "ready"
        async with self._control.transaction() as connection:
            await connection.execute(delete(warm_databases).where(warm_databases.c.name == name, unclaimable))

    async def want(self, server: str, recipe: str) -> None:
        """Record that a process with this recipe asks for its warm databases."""
        own = (warm_databases.c.server == server, warm_databases.c.recipe == recipe)
        # not at every look of every process
        old = warm_databases.c.wanted_at < func.clock_timestamp() - timedelta(seconds=30)
        async with self._control.transaction() as connection:
            await connection.execute(update(warm_databases).where(*own, old).values(wanted_at=func.clock_timestamp()))

    async def busiest(self, server: str, *, first: str, window: float) -> int:
        """Return how many tenants were created in the busiest window of time since ``first``.

        Args:
            server: The server.
            first: The smallest id of that time, as text.
            window: Seconds.
        """
        async with self._control.connect() as connection:
            parameters = {"first": first, "server": server, "window": window}
            return int(await connection.scalar(_BUSIEST, parameters) or 0)

    async def is_creating(self, server: str, *, seconds: float) -> bool:
        """Whether any process creates a tenant on a server; one that has begun longer ago is not counted."""
        async with self._control.connect() as connection:
            return bool(await connection.scalar(_BEING_CREATED, {"server": server, "seconds": seconds}))


def _record(row: Row[*tuple[Any, ...]]) -> WarmRecord:
    return WarmRecord(**{**row._mapping, "wanted_seconds": float(row.wanted_seconds)})


__all__ = ["WarmRecord", "WarmRecords", "WarmState"]
