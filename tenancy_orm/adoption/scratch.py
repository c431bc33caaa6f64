"""A short-lived database on a tenants' server, in which a source's schema is looked at before anything is changed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial

from ..cancellation import run_to_completion
from ..errors import AdoptionError
from ..migrations.services import FleetServices
from ..postgres import connections, locks
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import reason_of
from ..provisioning import removal
from ..provisioning.blockers import Blockers
from ..provisioning.copy_logins import CopyLogin, end_login
from ..provisioning.empty_databases import InstalledExtension, create_for_login
from ..provisioning.new_databases import HOLDING


@asynccontextmanager
async def open_scratch(
    services: FleetServices, server: str, *, extensions: Iterable[InstalledExtension], seconds: float
) -> AsyncIterator[CopyLogin]:
    """Make an empty database for the body, with a login that owns what comes into it; both are dropped at the end.

    If the process dies, ``reconcile`` drops them.

    Args:
        services: The services of an open ``Tenancy``.
        server: The server's name.
        extensions: The extensions that it has, beside the configured ones.
        seconds: For how long the login is valid.

    Raises:
        AdoptionError: the server refused.
        ServerUnavailableError: the server does not answer.
    """
    found, names = services.servers[server], services.names
    blockers = Blockers(found, names=names, registry=services.registry)
    name, timeout = names.scratch(secrets.token_hex(8)), services.config.provisioning.timeout
    connection = await blockers.connect(settings=HOLDING, purpose="tenancy-adopt")
    try:
        try:
            async with asyncio.timeout(timeout):
                # reconcile drops no scratch database while this is held
                await locks.lock(connection, locks.lock_key(name), timeout=timeout)
                login = await create_for_login(
                    connection,
                    blockers,
                    found,
                    names,
                    database=name,
                    login=name,
                    seconds=seconds,
                    extensions=extensions,
                    wanted=services.config.extensions,
                )
        except SERVER_FAILURES as exc:
            raise AdoptionError(f"server {server!r} refuses a database to look at: {reason_of(exc)}") from exc
        yield login
    finally:
        await run_to_completion(_drop(services, blockers, connection, name))


async def _drop(services: FleetServices, blockers: Blockers, connection: Connection, name: str) -> None:
    try:
        async with asyncio.timeout(services.config.provisioning.timeout):
            if not await connections.is_alive(connection):
                connection.terminate()
                connection = await blockers.connect(purpose="tenancy-adopt")
            await end_login(connection, blockers, name)
            await removal.drop_database(connection, blockers, name)
            await blockers.run(connection, partial(removal.drop_retired, connection, blockers, services.names, name))
    finally:
        await connections.close(connection)


__all__ = ["open_scratch"]
