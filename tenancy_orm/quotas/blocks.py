"""Leased quotas: a process takes a block of a quota, counts in memory, and returns what it has not spent.

The database counts a block as used when it is taken, so the limit can never be passed. Near the limit blocks shrink to
the amount asked for, and a process that is refused while others have unspent blocks makes them return those: together
the processes use up the limit exactly. A process that dies loses the unspent part of its last block, and no more.

An answer may be lost after the database has acted. A block that is being returned is therefore never spent again, and
every block has its own id, so that returning it can be repeated: the second time its row is gone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from contextvars import Context
from threading import get_ident
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import text

from ..config.tiers import LARGEST_AMOUNT
from ..context import _current, refuse_other_tenant
from ..control.database import ControlDatabase
from ..errors import ControlUnavailableError
from ..loops import HomeLoop

logger = logging.getLogger("tenancy_orm.quotas")

HEARTBEAT_SECONDS: Final = 0.5  # how often a process checks whether its blocks are reclaimed
BLOCK_SECONDS: Final = 15.0  # a block that is not renewed for this long is a dead process's: nobody waits for it
IDLE_SECONDS: Final = 5.0  # a block that was not used for this long is returned
RECLAIM_SECONDS: Final = 1.5  # how long a refused process waits for others to return blocks: three heartbeats
POLL_SECONDS: Final = 0.05  # how often it asks again until then
_ALL: Final = 2**62  # everything that the database knows to be unspent

_TAKE = text(
    "SELECT *, nullif(ends_at, 'infinity') AS resets_at, extract(epoch FROM nullif(ends_at, 'infinity') - at)"
    "::double precision AS seconds FROM tenancy.quota_take_block("
    "CAST(:tenant_id AS uuid), :resource, CAST(:id AS uuid), CAST(:previous AS uuid), CAST(:held AS bigint), "
    "CAST(:amount AS bigint), CAST(:block AS bigint), CAST(:seconds AS double precision))"
)
_RETURN = text("SELECT tenancy.quota_return_block(CAST(:id AS uuid), CAST(:unspent AS bigint))")
_RECLAIMED = text("SELECT id FROM tenancy.quota_blocks WHERE id = ANY(CAST(:ids AS uuid[])) AND reclaim")
_RENEW = text(
    "UPDATE tenancy.quota_blocks SET expires_at = clock_timestamp() + make_interval(secs => :seconds) "
    "WHERE id = ANY(CAST(:ids AS uuid[]))"
)

OutcomeHandler = Callable[[UUID, str, int, Any], object]


class LeasedQuota:
    """One process's part of one tenant's quota; made by ``QuotaManager.leased``.

    ``try_consume`` is a subtraction in memory. ``consume`` takes a new block from the database when the block is spent.
    """

    __slots__ = (
        "__weakref__",
        "_block",
        "_blocks",
        "_home",
        "_last_refusal",
        "_lock",
        "_returning",
        "_stale",
        "_unspent",
        "_used",
        "_valid_until",
        "id",
        "resource",
        "tenant_id",
    )

    def __init__(self, blocks: BlockManager, tenant_id: UUID, resource: str, block: int) -> None:
        self.tenant_id = tenant_id
        self.resource = resource
        self._blocks = blocks
        self._home = blocks.home
        self._block = block
        self._lock = asyncio.Lock()  # one query at a time; it protects id and _returning
        # the current block, and how much of it is unspent
        self.id: UUID | None = None
        self._unspent = 0
        # blocks being returned, by id, with the amount to return; removed when the database has confirmed it
        self._returning: dict[UUID, int] = {}
        # when the period of the current block is over, by the monotonic clock
        self._valid_until = -math.inf
        self._used = False
        self._stale = False
        # the last refusal: when it was asked for, the amount, and the answer
        self._last_refusal: tuple[float, int, Any] | None = None

    @property
    def unspent(self) -> int:
        """How much of the current block is unspent: a crash would lose this, and the blocks being returned."""
        return self._unspent

    def try_consume(self, amount: int = 1) -> bool:
        """Count ``amount`` against the current block. Returns False, and counts nothing, if the block is too small.

        Raises:
            CrossTenantError: another tenant is bound.
            WrongEventLoopError: this is another thread.
        """
        if get_ident() != self._home.thread:
            self._home.check()
        # written out here, to cost less than a microsecond
        if (bound := _current.get()) is not None:
            if bound.id != self.tenant_id:
                refuse_other_tenant(self.tenant_id)
            if bound.admission is not None:
                bound.admission.check()
        if type(amount) is int and 0 < amount <= self._unspent and time.monotonic() < self._valid_until:
            self._unspent -= amount
            self._used = True
            return True
        return False

    async def consume(self, amount: int = 1) -> None:
        """Count ``amount`` as used, taking a new block if necessary. A cancelled call may have counted.

        Raises:
            QuotaExceededError: it would pass the limit, and no other process has any of it left to return.
            TenantNotFoundError: no such tenant.
            UnknownQuotaError: the resource has no limit for this tenant.
            ControlUnavailableError: the block is spent, and the control database does not answer.
            ValueError: ``amount`` is not a whole number from 1 to 10**15.
            CrossTenantError: another tenant is bound.
        """
        if not self.try_consume(amount):
            check_amount(amount)
            self._home.check()
            # in a task of its own: if the caller is cancelled, the answer and the block in it must not be lost
            task = asyncio.ensure_future(self._refill(amount))
            task.add_done_callback(_retrieve)
            await asyncio.shield(task)

    async def release(self) -> None:
        """Return the current block, and blocks that could not be returned before.

        They cannot be spent any more, whether or not the call succeeds: a return that failed is repeated in the
        background.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: another tenant is bound.
            WrongEventLoopError: this is another event loop or thread.
        """
        self._home.check()
        refuse_other_tenant(self.tenant_id)
        async with self._lock:
            await self._return()

    async def return_pending(self) -> None:
        """Return the blocks that could not be returned before."""
        async with self._lock:
            await self._return_detached()

    @property
    def has_pending_returns(self) -> bool:
        """Whether blocks are still to be returned."""
        return bool(self._returning)

    def expire(self) -> None:
        """Make the next ``consume`` return the current block and take a new one: the limit may have changed.

        A block that is being taken is affected as well.
        """
        self._valid_until = -math.inf
        self._stale = True

    async def _refill(self, amount: int) -> None:
        called = time.monotonic()
        while True:
            async with self._lock:
                if self.try_consume(amount):
                    return
                row = self._applicable_refusal(called, amount) or await self._take(amount)
            if row.outcome != "exceeded" or not row.in_blocks or time.monotonic() - called >= RECLAIM_SECONDS:
                self._blocks.handle_outcome(self.tenant_id, self.resource, amount, row)
                return
            # other processes have unspent blocks: they check every HEARTBEAT_SECONDS whether to return them
            await asyncio.sleep(POLL_SECONDS)

    def _applicable_refusal(self, called: float, amount: int) -> Any:
        """Return a final refusal of the same amount or less, asked for after this call began: it applies here too."""
        if self._last_refusal is not None:
            asked, refused, row = self._last_refusal
            if asked >= called and amount >= refused and not row.in_blocks:
                return row
        return None

    async def _take(self, amount: int) -> Any:
        """Take ``amount`` and a block beyond it. Called under the lock."""
        if self._unspent and (self._stale or time.monotonic() >= self._valid_until):
            await self._return()
        self._stale = False
        asked = time.monotonic()
        unspent, self._unspent = self._unspent, 0
        new = uuid4()
        try:
            row = await self._blocks.take_block(self, new, unspent, amount, self._block)
        except BaseException:
            # it may have taken effect: one of the two blocks exists, so both are returned
            self._detach_block(unspent)
            self._returning[new] = _ALL
            self._blocks.watch(self)
            raise
        if row.outcome == "counted":
            self.id = new
            self._unspent = unspent + row.granted - amount
            # measured from before the query, so that it is never past the period's end
            self._valid_until = math.inf if row.seconds is None else asked + row.seconds
            if self._stale:
                self._valid_until = -math.inf
            self._used = True
            self._blocks.watch(self)
        else:
            self._unspent = unspent
            self._last_refusal = (asked, amount, row)
        return row

    async def _return(self) -> None:
        unspent, self._unspent = self._unspent, 0
        self._detach_block(unspent)
        await self._return_detached()

    def _detach_block(self, unspent: int) -> None:
        """Stop using the current block, before the database records it."""
        if self.id is not None:
            self._returning[self.id] = unspent
            self.id = None

    async def _return_detached(self) -> None:
        for block_id, unspent in list(self._returning.items()):
            await self._blocks.return_block(block_id, unspent)
            del self._returning[block_id]
        if self.id is None:
            self._blocks.unwatch(self)

    def was_idle(self) -> bool:
        """Whether it was not used since the last call."""
        used, self._used = self._used, False
        return not used


class BlockManager:
    """Takes, renews and returns a process's blocks; returns those that are idle or reclaimed.

    Args:
        control: The control database.
        handle_outcome: Turns the database's answer into events and errors.
    """

    def __init__(self, control: ControlDatabase, handle_outcome: OutcomeHandler) -> None:
        self._control = control
        self.home = HomeLoop()
        self.handle_outcome = handle_outcome
        # quotas with a current block or one being returned, and the time since which each is idle
        self._watched: dict[LeasedQuota, float | None] = {}
        self._task: asyncio.Task[None] | None = None
        self._renewed = 0.0

    async def take_block(self, quota: LeasedQuota, block_id: UUID, unspent: int, amount: int, block: int) -> Any:
        """Take ``amount`` beyond what is ``unspent``, and up to ``block`` more, as one block ``block_id``."""
        parameters = {
            "tenant_id": quota.tenant_id,
            "resource": quota.resource,
            "id": block_id,
            "previous": quota.id,
            "held": unspent,
            "amount": amount,
            "block": block,
            "seconds": BLOCK_SECONDS,
        }
        async with self._control.connect() as connection:
            return (await connection.execute(_TAKE, parameters)).one()

    async def return_block(self, block_id: UUID, unspent: int) -> None:
        """Return the unspent part of a block, which may be 0, and remove its row."""
        async with self._control.connect() as connection:
            await connection.execute(_RETURN, {"id": block_id, "unspent": unspent})

    def watch(self, quota: LeasedQuota) -> None:
        """Renew and return the blocks of ``quota`` from now on."""
        self._watched.setdefault(quota, None)
        if self._task is None or self._task.done():
            # it renews all tenants' blocks, so it must not run with the first one's tenant bound
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    def unwatch(self, quota: LeasedQuota) -> None:
        """Stop watching a quota with all its blocks returned."""
        self._watched.pop(quota, None)

    async def close(self) -> None:
        """Return every block. A block that cannot be returned stays counted as used; no error is raised."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for quota in list(self._watched):
            if not await self._try(quota.release()):
                logger.warning(
                    "%d blocks stay counted as used: the control database does not answer", len(self._watched)
                )
                return

    async def _run(self) -> None:
        while self._watched:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            # if this fails, blocks may still be spent, since they are counted; the next heartbeat catches up
            await self._try(self._heartbeat())

    async def _try(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run one part of the work; its error does not stop the rest. False if the control database does not answer."""
        try:
            await work
        except ControlUnavailableError:
            logger.warning("blocks of quotas cannot be renewed or returned: the control database is not available")
            return False
        except Exception:
            logger.exception("blocks of quotas cannot be renewed or returned")
        return True

    async def _heartbeat(self) -> None:
        now = time.monotonic()
        ids = [quota.id for quota in self._watched if quota.id is not None]
        async with self._control.connect() as connection:
            called = set(await connection.scalars(_RECLAIMED, {"ids": ids}))
            if now - self._renewed > BLOCK_SECONDS / 3:
                await connection.execute(_RENEW, {"ids": ids, "seconds": BLOCK_SECONDS})
                self._renewed = now
        for quota, idle_since in list(self._watched.items()):
            if quota not in self._watched:
                continue  # returned since
            since = (idle_since or now) if quota.was_idle() else None
            self._watched[quota] = since
            if quota.id in called or (since is not None and now - since > IDLE_SECONDS):
                work = quota.release()
            elif quota.has_pending_returns:
                work = quota.return_pending()
            else:
                continue
            if not await self._try(work):
                return


def check_amount(amount: int, *, least: int = 1, what: str = "an amount") -> None:
    """Refuse everything but a whole number within the bounds: bool, floats and NaN as well.

    Raises:
        ValueError: it is not such a number.
    """
    if type(amount) is not int or not least <= amount <= LARGEST_AMOUNT:
        raise ValueError(f"{what} must be a whole number from {least} to 10**15, not {amount!r}")


def _retrieve(task: asyncio.Future[None]) -> None:
    """Retrieve the exception of a task after its caller was cancelled, or asyncio would report it."""
    if not task.cancelled():
        task.exception()
