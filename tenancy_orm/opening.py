"""What an opening does besides building the parts: the control database, the servers, the tiers in force."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import asyncpg

from .config import TenancyConfig
from .connections import ConnectionLeases
from .control.database import ControlDatabase
from .errors import AdministratorNeededError, ConfigurationError, ProvisioningError, ServerUnavailableError
from .provisioning import Provisioner
from .servers import Servers
from .servers.inspection import check_rows, inspect_servers
from .tenants.tiers import TierRegistry, differing

logger = logging.getLogger("tenancy_orm")

_CHECK_SECONDS = 3.0  # how long opening waits for a server that does not answer


async def upgrade_control(config: TenancyConfig, control: ControlDatabase, servers: Servers) -> None:
    """Upgrade the control database, as its server's administrator where its own role may not do everything."""
    try:
        await control.upgrade()
    except AdministratorNeededError:
        own = config.listen_dsn or control.dsn
        server = next((s for s in servers.values() if s.dsn.shares_host(own)), None)
        if server is None:
            raise  # it is none of the tenants' servers, the ones that have an administrator
        try:
            administrator = await server.connect_admin()
        except asyncpg.PostgresError as exc:
            raise server.unavailable(exc) from exc
        try:
            await control.upgrade(administrator=administrator)
        finally:
            await administrator.close(timeout=5)


async def check_servers(
    config: TenancyConfig, control: ControlDatabase, servers: Servers, leases: ConnectionLeases
) -> None:
    """Refuse a pooler for administration, and another maintenance database than the one in use.

    A server that does not answer now does not delay the opening for long: its first connection is checked.
    """
    default = config.default_server
    known = dict(servers)
    if default is not None and default not in known:
        raise ConfigurationError(
            f"default_server is {default!r}, which is not among the servers: {', '.join(known)}; correct it, or "
            f"unset it and run: tenancy servers add {default}"
        )
    new = [name for name, server in known.items() if server.row is None or server.row.identity is None]
    found = await inspect_servers(known, timeout=_CHECK_SECONDS)
    # those with their addresses in their rows were verified by the command that put them there; one of them that is
    # removed in this moment must not be added again
    saved = {
        name: server
        for name, server in known.items()
        if name in config.server_addresses and (server.row is None or server.row.sealed_addresses is None)
    }
    await control.save_servers(
        {name: (server.host, server.port) for name, server in saved.items()},
        maintenance={
            name: found[name].database if name in found else server.dsn.database for name, server in saved.items()
        },
        identities={name: facts.identity for name, facts in found.items() if name in saved},
    )
    await servers.refresh()
    rows = [server.row for server in servers.values() if server.row is not None]
    check_rows(rows, found, new=new)
    await leases.open({name: found[name].connections if name in found else None for name in servers})


async def prepare_servers(servers: Servers, provisioner: Provisioner, *, is_new: bool) -> None:
    """Prepare every server. One that cannot be logged in to is no reason not to open: the others' tenants work.

    A new installation is another matter: there it is a mistake, and nothing else is left to work.
    """
    names = list(servers)
    work = (provisioner.prepare_server(name) for name in names)
    failed: list[BaseException] = []
    for name, error in zip(names, await asyncio.gather(*work, return_exceptions=True), strict=True):
        if isinstance(error, (ServerUnavailableError, ProvisioningError)) and not is_new:
            provisioner.unprepared[name] = error
            logger.warning(
                "server %s could not be prepared; it is before the next tenant is created there: %s", name, error
            )
        elif isinstance(error, BaseException):
            failed.append(error)
    if failed:
        raise failed[0]


async def ensure_tiers(tiers: TierRegistry, config: TenancyConfig, *, initialise: bool) -> Mapping[str, float]:
    """Put the configured tiers in force where that was asked for, or where there are none yet."""
    in_force, weights = await tiers.limits_and_weights()
    if initialise or not in_force:
        await tiers.apply(config.tiers)
        weights = await tiers.weights()
    elif names := differing(in_force, config.tiers, weights):
        logger.warning(
            "the configured tiers %s are not the ones in force, which stay; run tenancy tiers apply to change them",
            ", ".join(names),
        )
    return weights


__all__ = ["check_servers", "ensure_tiers", "prepare_servers", "upgrade_control"]
