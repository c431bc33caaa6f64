"""A program that forks while a ``Tenancy`` is open: ``python -m tests.support.forked <url> [off]``; 0 if all was right.

With ``off`` nothing protects the parent's sockets and event loop, and the program reports what broke.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig, forks, loops
from tenancy_orm.config import Limit
from tenancy_orm.errors import WrongEventLoopError
from tests.support.models import Base
from tests.support.waiting import until

_PID = "SELECT pg_backend_pid()"
_QUERY = b"SELECT 1\x00"
_SESSIONS = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'tenancy-forks/%'"  # as in the URLs


async def break_a_connection(url: str) -> None:
    """What the check is for: what the child sends on its parent's connection gets the parent an answer too many."""
    connection: Any = await asyncpg.connect(url)
    await connection.fetchval(_PID)
    child = os.fork()
    if child == 0:
        os.write(
            connection._transport.get_extra_info("socket").fileno(),
            b"Q" + (len(_QUERY) + 4).to_bytes(4, "big") + _QUERY,
        )
        os._exit(0)
    end_of(child)
    try:
        for _ in range(3):
            await connection.fetchval(_PID, timeout=10)
    except Exception:  # noqa: BLE001 - asyncpg raises an AssertionError, among others
        return
    finally:
        connection.terminate()
    raise AssertionError("the connection was not broken")


def end_of(child: int) -> int:
    """Wait for a child, and return its status."""
    return os.waitpid(child, 0)[1]


async def refusal(use: Callable[[], Awaitable[Any]]) -> WrongEventLoopError | None:
    """The error that refuses a use."""
    try:
        await use()
    except WrongEventLoopError as exc:
        return exc
    return None


async def use_in_the_child(tenancy: Tenancy, session: Any, key: str) -> None:
    """What the parent has open is refused. Another ``Tenancy`` works, and so does this one once it is opened here."""
    internals = tenancy_internals[0]
    uses: tuple[Callable[[], Awaitable[Any]], ...] = (
        lambda: tenancy.fetch_value(_PID, tenant="acme"),
        lambda: tenancy.tenants.get("acme"),
        lambda: session.scalar(text(_PID)),
        lambda: internals.directory.authenticate(key),
        lambda: asyncio.sleep(0, internals.directory.peek(key)),
        lambda: asyncio.sleep(0, tenancy.loop),
    )
    for use in uses:
        error = await refusal(use)
        assert error is not None
        assert error.forked, error
        assert "after the fork" in str(error), error
    await tenancy.close()  # nothing is open here
    async with Tenancy(tenancy.config) as own:
        assert await own.fetch_value(_PID, tenant="acme")
    async with tenancy:
        assert await tenancy.fetch_value(_PID, tenant="acme")
        assert (await tenancy.tenants.get_by_api_key(key)).slug == "acme"
    assert not tenancy.is_open


tenancy_internals: list[Any] = []


def in_a_process(tenancy: Tenancy) -> None:
    """What ``multiprocessing`` runs: synchronous code, which opens the same object."""
    with pytest.raises(WrongEventLoopError, match="after the fork"):
        tenancy.sync.fetch_value(_PID, tenant="acme")
    with tenancy.sync:
        assert tenancy.sync.fetch_value(_PID, tenant="acme")


async def ending_by_a_thread() -> None:
    """Wait for ever; the clean-up takes a moment in a thread."""
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.to_thread(time.sleep, 0.02)


async def end_by_a_thread() -> None:
    """A child that leaves ``asyncio.run`` ends, where nothing but a thread wakes its loop."""
    home = loops.HomeLoop()
    task = asyncio.create_task(ending_by_a_thread())
    await asyncio.sleep(0)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        sys.exit(0)
    assert await asyncio.to_thread(end_of, child) == 0
    home.check()
    task.cancel()


class Ending:
    """Forks a child that ends in some way, and waits for it."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy

    async def leaves(self) -> None:
        """The exception unwinds the stack, so that ``asyncio.run`` cancels the parent's tasks, and closes its loop.

        A task ends by means of a thread, which has to wake the child's loop. And the status is the child's own,
        whatever it leaves open.
        """
        task = asyncio.create_task(ending_by_a_thread())
        await asyncio.sleep(0)
        async with (
            self.tenancy.session("acme") as session,
            self.tenancy.session("acme", read_only=True),
            self.tenancy.quotas.hold("acme", "jobs"),
        ):
            await session.scalar(text(_PID))
            child = os.fork()
            if child == 0:
                sys.exit(0)
            assert await asyncio.to_thread(end_of, child) == 0
        task.cancel()

    async def collects(self) -> None:
        """The garbage collector of the child gets all connections."""
        child = os.fork()
        if child == 0:
            try:
                for one in gc.get_objects():
                    if isinstance(one, asyncpg.Connection):
                        one.__del__()
                gc.collect()
            finally:
                os._exit(0)
        assert await asyncio.to_thread(end_of, child) == 0

    async def multiprocesses(self) -> None:
        """By the standard library, with a function that works; ``spawn`` would pickle the object, which is refused."""
        with pytest.raises(TypeError, match="make one in each process"):
            pickle.dumps(self.tenancy)
        process = multiprocessing.get_context("fork").Process(target=in_a_process, args=(self.tenancy,))
        process.start()
        await asyncio.to_thread(process.join)
        assert process.exitcode == 0, process.exitcode


async def sessions_of_this_program(url: str) -> set[int]:
    """The process ids of its sessions on the server."""
    observer = await asyncpg.connect(url)
    try:
        return {row["pid"] for row in await observer.fetch(_SESSIONS)}
    finally:
        await observer.close()


async def sessions_end_with_the_parent(url: str) -> bool:
    """Whether the server notices that the sockets of a parent are closed while a child of it lives on."""
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        for one in [one for one in gc.get_objects() if isinstance(one, asyncpg.Connection)]:
            if not one.is_closed():
                one._abort()  # without a last message, as if the kernel had ended the process

        async def ended() -> bool:
            # psycopg's own is left
            return len(await sessions_of_this_program(url)) == 1

        await until(ended)
    except TimeoutError:
        return False
    finally:
        os.kill(child, signal.SIGKILL)
        end_of(child)
    return True


async def endings(url: str, seconds: float) -> None:
    """Fork in every way; print what is not as it was in the parent, and end."""
    async with Tenancy(TenancyConfig.from_env(metadata=Base.metadata)) as tenancy:
        await tenancy.quotas.set("acme", {"jobs": Limit(2, "concurrent")})
        await tenancy.fetch_value(_PID, tenant="acme")
        await asyncio.to_thread(tenancy.sync.fetch_value, _PID, tenant="acme")
        before = await sessions_of_this_program(url)
        for end in (Ending(tenancy).collects, Ending(tenancy).leaves, Ending(tenancy).multiprocesses):
            try:
                # threads wake the loop by its pipe
                await asyncio.wait_for(end(), seconds)
                await asyncio.wait_for(asyncio.to_thread(tenancy.sync.fetch_value, _PID, tenant="acme"), 10)
                await asyncio.wait_for(tenancy.fetch_value(_PID, tenant="acme"), 10)
                await asyncio.wait_for(tenancy.tenants.list(), 10)
            except Exception as exc:  # noqa: BLE001 - it is what the program reports
                end_with(f"{end.__name__}: {exc!r}")
            after = await sessions_of_this_program(url)
            if after != before:
                end_with(f"{end.__name__}: {len(before - after)} of {len(before)} sessions ended")
        if not await sessions_end_with_the_parent(url):
            end_with("a child keeps its parent's sessions")


def end_with(report: str) -> None:
    """Print, and end at once: a broken loop does not end by itself."""
    print(report, flush=True)
    os.killpg(0, signal.SIGKILL)  # a child hangs as well


async def main() -> None:
    """Fork, and see that the parent goes on with the same connection."""
    await break_a_connection(sys.argv[1])
    async with Tenancy(TenancyConfig.from_env(metadata=Base.metadata)) as tenancy:
        key = (await tenancy.tenants.create("acme")).api_key
        await tenancy.internals.directory.authenticate(key)
        tenancy_internals.append(tenancy.internals)
        async with tenancy.session("acme") as session:
            pid = await session.scalar(text(_PID))
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    asyncio.run(use_in_the_child(tenancy, session, key))
                    status = 0
                except BaseException:  # noqa: BLE001 - the child must not run on as a second parent
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            assert end_of(child) == 0
            assert await session.scalar(text(_PID)) == pid
        assert await tenancy.fetch_value(_PID, tenant="acme") == pid


if __name__ == "__main__":
    if sys.argv[2:] == ["off"]:
        loops._leave_selector = lambda loop: None
        forks._sockets = {}  # type: ignore[assignment]
        # nothing of an event loop that is not woken any more can be relied on
        signal.signal(signal.SIGALRM, lambda *_: end_with("the parent hangs"))
        signal.alarm(8)
        asyncio.run(endings(sys.argv[1], 3))
    else:
        asyncio.run(end_by_a_thread())
        asyncio.run(main())
        asyncio.run(endings(sys.argv[1], 60))
