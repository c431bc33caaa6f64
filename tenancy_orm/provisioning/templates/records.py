"""What the control database knows of templates: what each was built from, and which process used it last."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from ...audit.actor import SYSTEM, Actor
from ...audit.entries import insert_entry
from ...control.database import ControlDatabase
from ...control.models import templates


@dataclass(frozen=True, slots=True)
class TemplateRecord:
    """A template's row. ``inputs`` are the digests of the further files that its build used, by name."""

    server: str
    name: str
    base: str
    revision: str | None
    inputs: Mapping[str, str]
    built_at: datetime | None
    last_used_at: datetime
    last_used_by: str | None
    retired: bool
    age_seconds: float
    """Seconds since a process last used it, by the clock of the control database."""


_COLUMNS = (
    templates.c.server,
    templates.c.name,
    templates.c.base,
    templates.c.revision,
    templates.c.inputs,
    templates.c.built_at,
    templates.c.last_used_at,
    templates.c.last_used_by,
    templates.c.retired,
    func.extract("epoch", func.now() - templates.c.last_used_at).label("age_seconds"),
)


class TemplateRecords:
    """Reads and writes the rows of templates.

    Args:
        control: The control database.
    """

    def __init__(self, control: ControlDatabase) -> None:
        self._control = control
        self._process = f"{socket.gethostname()}:{os.getpid()}"

    async def of_base(self, server: str, base: str) -> list[TemplateRecord]:
        """Return the templates of a base that no rebuild has replaced, the newest first."""
        query = select(*_COLUMNS).where(
            templates.c.server == server, templates.c.base == base, templates.c.retired.is_(False)
        )
        async with self._control.connect() as connection:
            rows = await connection.execute(query.order_by(templates.c.built_at.desc(), templates.c.name))
            return [_record(row) for row in rows]

    async def of_server(self, server: str) -> list[TemplateRecord]:
        """Return all templates of a server."""
        async with self._control.connect() as connection:
            return [
                _record(row) for row in await connection.execute(select(*_COLUMNS).where(templates.c.server == server))
            ]

    async def add(
        self,
        server: str,
        name: str,
        *,
        base: str,
        revision: str | None,
        inputs: Mapping[str, str],
        replaces: bool = False,
        actor: Actor = SYSTEM,
    ) -> None:
        """Record a template that was built. One that ``replaces`` the others of its base retires them."""
        async with self._control.transaction() as connection:
            if replaces:
                others = update(templates).where(templates.c.server == server, templates.c.base == base)
                await connection.execute(others.values(retired=True))
            values: dict[str, Any] = {
                "base": base,
                "revision": revision,
                "inputs": dict(inputs),
                "last_used_by": self._process,
            }
            added = insert(templates).values(server=server, name=name, **values)
            # housekeeping may have seen the template in this moment, and entered it as unknown
            values["built_at"] = values["last_used_at"] = func.now()
            await connection.execute(added.on_conflict_do_update(index_elements=["server", "name"], set_=values))
            if replaces:
                detail = {"server": server, "template": name, "revision": revision}
                await insert_entry(connection, action="template.rebuild", actor=actor, detail=detail)

    async def add_unknown(self, server: str, names: Collection[str]) -> None:
        """Record templates that exist without a row, so that they are kept for a time: who uses them is not known."""
        if not names:
            return
        unknown: dict[str, Any] = {"server": server, "base": "", "inputs": {}, "built_at": None}
        rows = [{**unknown, "name": name} for name in names]
        async with self._control.transaction() as connection:
            await connection.execute(insert(templates).values(rows).on_conflict_do_nothing())

    async def touch(self, server: str, name: str) -> bool:
        """Record that this process uses a template; False if it is gone, or was replaced by a rebuild."""
        used = (
            update(templates)
            .where(templates.c.server == server, templates.c.name == name)
            .values(last_used_at=func.now(), last_used_by=self._process)
            .returning(templates.c.retired)
        )
        async with self._control.transaction() as connection:
            return await connection.scalar(used) is False

    async def forget_missing(self, server: str, present: Collection[str]) -> None:
        """Delete the rows of templates that are not ``present`` on a server, and were not built since it was asked."""
        old = templates.c.last_used_at < func.now() - timedelta(minutes=5)
        async with self._control.transaction() as connection:
            await connection.execute(
                delete(templates).where(templates.c.server == server, templates.c.name.not_in(tuple(present)), old)
            )

    async def forget(self, server: str) -> None:
        """Delete the rows of all templates of a server."""
        async with self._control.transaction() as connection:
            await connection.execute(delete(templates).where(templates.c.server == server))

    async def remove(self, server: str, name: str, *, unused_for: float, actor: Actor) -> bool:
        """Delete the row of a template, unless a process has used it within ``unused_for`` seconds."""
        unused_since = func.now() - timedelta(seconds=unused_for)
        unused = templates.c.last_used_at <= unused_since
        async with self._control.transaction() as connection:
            found = await connection.scalar(
                delete(templates)
                .where(templates.c.server == server, templates.c.name == name, unused)
                .returning(templates.c.name)
            )
            if found is not None:
                detail = {"server": server, "template": name}
                await insert_entry(connection, action="template.remove", actor=actor, detail=detail)
            return found is not None


def _record(row: Row[Any]) -> TemplateRecord:
    return TemplateRecord(**{**row._mapping, "age_seconds": float(row.age_seconds)})
