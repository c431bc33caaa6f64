"""A process with a directory of its own, that uses one key over and over and says when it stops working.

Run as ``python -m tests.support.directory_process CONTROL_URL TTL LISTEN_URL KEY``. It prints ``known`` once the key
works and the listener hears, and the wall-clock time of the first refusal.
"""

from __future__ import annotations

import asyncio
import sys
import time

from tenancy_orm.errors import InvalidCredentialError
from tests.support.control import control_plane


async def main(url: str, ttl: str, listen_url: str, key: str) -> None:
    """Use ``key`` until it is refused, for a minute at most."""
    async with (
        asyncio.timeout(60),
        control_plane(
            url, initialise=False, directory={"ttl": float(ttl)}, control={"listen_url": listen_url}
        ) as plane,
    ):
        await plane.directory.authenticate(key)
        print("known" if plane.directory.statistics.listening else "deaf", flush=True)
        while True:
            try:
                if plane.directory.peek(key) is None:
                    await plane.directory.authenticate(key)
            except InvalidCredentialError as error:
                print(error.reason, time.time(), flush=True)
                return
            await asyncio.sleep(0.001)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
