"""Refusals in the audit log, and a writer for those of invitations."""

from __future__ import annotations

import asyncio
import logging
import time
from contextvars import Context
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import Actor
from ..audit.log import AuditLog
from ..control.database import ControlDatabase
from .refusals import Refusal, RefusalCounter

logger = logging.getLogger("tenancy_orm.members")

_WRITE_SECONDS: Final = 10.0


async def append_refusals(audit: AuditLog, connection: AsyncConnection, counted: RefusalCounter) -> None:
    """Append what was counted to the audit log, in the caller's transaction."""
    for refusal, detail in counted.entries():
        await audit.append(
            connection,
            action=refusal.action,
            tenant_id=refusal.tenant_id,
            slug=refusal.slug,
            actor=Actor(refusal.kind, refusal.actor_id, source=refusal.source),
            detail=detail,
        )


class RefusalLog:
    """Writes refused invitations to the audit log: at once, and those of the next seconds together.

    Anybody who has logged in can try texts, and every entry takes the lock of the log. A task of its own writes: a
    caller that disconnects cancels its request, and must not cancel the entry with it.
    """

    def __init__(self, control: ControlDatabase, audit: AuditLog) -> None:
        self._control = control
        self._audit = audit
        self._counter = RefusalCounter()
        self._written_at = -_WRITE_SECONDS
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def add(self, refusal: Refusal) -> None:
        """Count a refusal, and see that it is written."""
        self._counter.add(refusal)
        if not self._closed and (self._task is None or self._task.done()):
            # in a context without a tenant: some of them may be of other tenants than the bound one
            self._task = asyncio.get_running_loop().create_task(self._write_repeatedly(), context=Context())

    async def close(self) -> None:
        """Write what is left."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._write()

    async def _write_repeatedly(self) -> None:
        while self._counter:
            await asyncio.sleep(max(self._written_at + _WRITE_SECONDS - time.monotonic(), 0.0))
            await self._write()

    async def _write(self) -> None:
        counted, self._counter = self._counter, RefusalCounter()
        self._written_at = time.monotonic()
        if not counted:
            return
        try:
            async with self._control.transaction() as connection:
                await append_refusals(self._audit, connection, counted)
        except BaseException as exc:
            self._counter.add_all(counted)
            if not isinstance(exc, Exception):
                raise
            logger.warning("refused invitations could not be written (%s); they are kept", type(exc).__name__)
