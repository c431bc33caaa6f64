"""A process that backs a tenant up and is killed in the midst of it: ``python -m tests.support.backups_process``.

It reads what to do as JSON from stdin, and kills itself when it is about to write the second piece to the store.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import DirectoryStore
from tests.support.models import Base


class Deadly(DirectoryStore):
    """A store that kills the process that writes an archive to it."""

    def write(self, path: str, chunks: Iterable[bytes], *, size: int | None = None) -> None:
        """Write a part of it."""
        super().write(path, _deadly(chunks) if path.endswith(".age") else chunks, size=size)


def _deadly(chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        os.kill(os.getpid(), signal.SIGKILL)


async def main(given: dict[str, Any]) -> None:
    """Back acme up."""
    config = TenancyConfig(
        control_url=given["control_url"],
        servers={"default": given["server"]},
        metadata=Base.metadata,
        encryption_keys=given["keys"],
        name_prefix=given["prefix"],
        backup=given["backup"],
    )
    async with Tenancy(config) as tenancy:
        stores = tenancy.backups._stores
        stores.current.__class__ = Deadly
        await tenancy.backups.run(["acme"])


if __name__ == "__main__":
    asyncio.run(main(json.load(sys.stdin)))
