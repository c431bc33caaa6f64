"""What an opening finds out about the servers, and what it logs of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence

import asyncpg

from ..errors import ServerIdentityError, ServerUnavailableError
from ..postgres.errors import describe
from .identity import differ
from .rows import ServerRow
from .server import Server, ServerFacts

logger = logging.getLogger("tenancy_orm.servers")


async def inspect_servers(servers: Mapping[str, Server], *, timeout: float) -> dict[str, ServerFacts]:
    """Ask all servers at once what they are; those that do not answer in time are left out, which is logged.

    Args:
        servers: The servers.
        timeout: Seconds that a login may take, and the answer.

    Raises:
        PoolerError: an administrator's address leads to a connection pooler.
        ConfigurationError: a URL cannot be used.
        CrossTenantError: a tenant is bound.
    """
    names = list(servers)
    answers = await asyncio.gather(*(servers[name].inspect(timeout=timeout) for name in names), return_exceptions=True)
    found = {}
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, ServerIdentityError):
            logger.error("the address of server %s leads to another cluster, and is not used: %s", name, answer)
        elif isinstance(answer, (ServerUnavailableError, asyncpg.PostgresError)):
            logger.warning("server %s could not be checked; its first connection is: %s", name, describe(answer))
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found[name] = answer
    return found


def check_rows(rows: Sequence[ServerRow], found: Mapping[str, ServerFacts], *, new: Collection[str]) -> None:
    """Log what is wrong with the rows of the servers, and the facts of those that answered.

    Args:
        rows: The rows.
        found: The facts by name.
        new: Servers with an identity that was not known until now.

    An address that leads to another cluster is an error: nothing is administered there, and the sessions of its tenants
    are refused by the markers of their databases. The other servers work.
    """
    by_identity: dict[str, str] = {}
    for row in rows:
        facts = found.get(row.name)
        if facts is not None and differ(row.identity, facts.identity):
            logger.error(
                "the address of server %s leads to another cluster, %s, than the one that holds its tenants, %s: it is "
                "not used; if the server has moved on purpose, run: tenancy servers update %s --accept-identity",
                row.name,
                facts.identity or "one without a marker",
                row.identity,
                row.name,
            )
        if row.identity is None:
            continue
        if (other := by_identity.setdefault(row.identity, row.name)) != row.name and {other, row.name} & set(new):
            logger.warning(
                "servers %s and %s are one cluster: its connections and its capacity are counted twice", other, row.name
            )


__all__ = ["check_rows", "inspect_servers"]
