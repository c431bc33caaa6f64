"""Another process, as far as the package can tell: a ``Tenancy`` of its own on the same control database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tenancy_orm import Tenancy, TenancyConfig


@asynccontextmanager
async def opened(config: TenancyConfig, *, initialise: bool = False) -> AsyncIterator[Tenancy]:
    """Open it for the body, and close it."""
    other = Tenancy(config)
    await other.open(initialise=initialise)
    try:
        yield other
    finally:
        await other.close()
