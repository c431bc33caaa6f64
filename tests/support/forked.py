"""A program that forks while a ``Tenancy`` is open: ``python -m tests.support.forked <url>``; 0 if all was right."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import WrongEventLoopError
from tests.support.models import Base

_PID = "SELECT pg_backend_pid()"
_QUERY = b"SELECT 1\x00"


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
    """Everything is refused; a ``Tenancy`` of its own works."""
    uses: tuple[Callable[[], Awaitable[Any]], ...] = (
        lambda: tenancy.fetch_value(_PID, tenant="acme"),
        lambda: session.scalar(text(_PID)),
        lambda: tenancy.internals.directory.authenticate(key),
        lambda: asyncio.sleep(0, tenancy.internals.directory.peek(key)),
        tenancy.open,
        tenancy.close,
    )
    for use in uses:
        error = await refusal(use)
        assert error is not None
        assert error.forked, error
        assert "after the fork" in str(error), error
    async with Tenancy(tenancy.config) as own:
        assert await own.fetch_value(_PID, tenant="acme")


async def main() -> None:
    """Fork, and see that the parent goes on with the same connection."""
    await break_a_connection(sys.argv[1])
    async with Tenancy(TenancyConfig.from_env(metadata=Base.metadata)) as tenancy:
        key = (await tenancy.tenants.create("acme")).api_key
        await tenancy.internals.directory.authenticate(key)
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
    asyncio.run(main())
