"""A process with a directory of its own, that uses credentials over and over and says when each stops working.

Run as ``python -m tests.support.directory_process CONTROL_URL TTL LISTEN_URL CREDENTIALS``, the last as ``described``
returns it. It prints ``known`` once all work and the listener is connected, and then for each, in the order in which
they are refused, its number, the wall-clock times of the refusal and of the last use that was admitted, and the reason.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterable
from typing import Any

from tenancy_orm.authentication.credential import Credential
from tenancy_orm.authentication.directory import Directory
from tenancy_orm.errors import InvalidCredentialError
from tests.support.control import control_plane


def described(credentials: Iterable[str | Credential]) -> str:
    """Keys, as texts, and credentials of other kinds, as an argument of the command line."""
    return json.dumps(
        [
            one if isinstance(one, str) else {name: getattr(one, name) for name in ("kind", "subject", "id", "tenants")}
            for one in credentials
        ]
    )


async def use(directory: Directory, credential: str | dict[str, Any]) -> str | None:
    """Admit a credential as the middleware does; returns why it is refused, None where it is not."""
    try:
        if isinstance(credential, str):
            if directory.peek(credential) is None:
                await directory.authenticate(credential)
            return None
        authenticated = Credential(**credential)
        if directory.subjects.peek(authenticated, ()) is None:
            allowed = await directory.subjects.allowed(authenticated)
            if not allowed.memberships:
                return "no member"
            directory.subjects.admit(authenticated, allowed, allowed.memberships[0], ())
        return None
    except InvalidCredentialError as error:
        return error.reason


async def main(url: str, ttl: str, listen_url: str, credentials: str) -> None:
    """Use ``credentials`` until each was refused, for a few minutes at most."""
    async with (
        asyncio.timeout(170),
        control_plane(
            url, initialise=False, directory={"ttl": float(ttl)}, control={"listen_url": listen_url}
        ) as plane,
    ):
        left = dict(enumerate(json.loads(credentials)))
        refused = [await use(plane.directory, credential) for credential in left.values()]
        admitted_at = dict.fromkeys(left, time.time())
        print("known" if plane.directory.statistics.listening and not any(refused) else "deaf", flush=True)
        while left:
            for number, credential in list(left.items()):
                used_at = time.time()
                if (reason := await use(plane.directory, credential)) is None:
                    admitted_at[number] = used_at
                else:
                    print(number, time.time(), admitted_at[number], reason, flush=True)
                    del left[number]
            await asyncio.sleep(0.001)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
