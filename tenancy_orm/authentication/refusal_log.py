"""Refused invitations in the audit log."""

from __future__ import annotations

import asyncio
import logging
import time
from contextvars import Context
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from ..audit.actor import Actor
from ..audit.log import AuditLog
from ..context import run_unbound
from ..control.database import ControlDatabase
from ..errors import TenancyError
from .refusals import Refusal, RefusalCounter

logger = logging.getLogger("tenancy_orm.members")

_WRITE_SECONDS: Final = 10.0


class RefusalLog:
    """Writes refused invitations to the audit log: at once, and those of the next seconds together.

    Anybody who has logged in can try texts, and every entry takes the lock of the log.
    """

    def __init__(self, control: ControlDatabase, audit: AuditLog) -> None:
        self._control = control
        self._audit = audit
        self._counter = RefusalCounter()
        self._written_at = -_WRITE_SECONDS
        self._task: asyncio.Task[None] | None = None

    async def add(self, refusal: Refusal) -> None:
        """Count a refusal, and see that it is written."""
        self._counter.add(refusal)
        wait = self._written_at + _WRITE_SECONDS - time.monotonic()
        if wait <= 0:
            # unbound: some of them may be of other tenants
            await run_unbound(self._write())
        elif self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._write_later(wait), context=Context())

    async def close(self) -> None:
        """Write what is left."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._write()

    async def _write_later(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._write()

    async def _write(self) -> None:
        counted, self._counter = self._counter, RefusalCounter()
        self._written_at = time.monotonic()
        if not counted:
            return
        try:
            async with self._control.transaction() as connection:
                for refusal, detail in counted.entries():
                    await self._audit.append(
                        connection,
                        action=refusal.action,
                        tenant_id=refusal.tenant_id,
                        slug=refusal.slug,
                        actor=Actor(refusal.kind, refusal.actor_id, source=refusal.source),
                        detail=detail,
                    )
        except (TenancyError, SQLAlchemyError) as exc:
            logger.warning("refused invitations could not be written (%s); they are kept", type(exc).__name__)
            self._counter.add_all(counted)
