"""``NewAddresses``: the addresses that a server is to have; those that it has complete them, and they are verified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..config import ServerAddresses, TenancyConfig
from ..errors import ConfigurationError, SecretError, ServerIdentityError, UnknownServerError
from ..servers import Server, Servers
from ..servers.identity import differ
from ..servers.rows import ServerRow
from ..servers.sealed import SealedAddresses
from ..servers.server import ServerFacts
from . import check as server_check
from .fields import read_addresses

# of addresses beside the administrative one, by their name in ``ServerAddresses``
_OPTIONS: Final = {"tenants": "--tenants", "replicas": "--replica", "peer": "--peer"}


class NewAddresses:
    """Finds out which addresses a server is to have, and what they change in its row.

    Args:
        config: This process's settings.
        servers: Makes servers of addresses.
        sealed: Opens the addresses in rows, and seals them.
        embedded: Whether the server "default" is the embedded one.
    """

    def __init__(self, config: TenancyConfig, servers: Servers, sealed: SealedAddresses, *, embedded: bool) -> None:
        self._config = config
        self._servers = servers
        self._sealed = sealed
        self._embedded = embedded

    def of_settings(self, name: str) -> ServerAddresses:
        """Return the addresses that a server has in this process's settings.

        Raises:
            ConfigurationError: it has none there.
        """
        if name not in self._config.server_addresses:
            raise ConfigurationError(f"server {name!r} is not in the settings of this process")
        return self._config.server_addresses[name]

    def complete(
        self,
        row: ServerRow,
        addresses: ServerAddresses | str | None,
        further: Mapping[str, Any],
        *,
        accept_identity: bool,
    ) -> ServerAddresses:
        """Return the addresses with those that the server has, where they are not given.

        Args:
            row: Of the server.
            addresses: All of its addresses, or its administrative URL; the present ones where None.
            further: The other addresses that are given, by their name in ``ServerAddresses``.
            accept_identity: Whether they may lead to another cluster.

        Raises:
            ConfigurationError: an address is malformed; or another cluster is accepted, and an address that may lead to
                the former one would stay.
            SecretError, UnknownServerError: nothing is given in place of the present ones, which cannot be read.
        """
        try:
            found = addresses if isinstance(addresses, ServerAddresses) else self._present(row)
        except (SecretError, UnknownServerError):
            if addresses is None:
                raise
            found = read_addresses(addresses)  # nobody can read the others any more
        admin = {} if addresses is None else {"admin": read_addresses(addresses).admin}
        kinds = ("admin", *_OPTIONS)
        complete = read_addresses({**{kind: getattr(found, kind) for kind in kinds}, **admin, **further})
        kept = [option for kind, option in _OPTIONS.items() if getattr(complete, kind) and kind not in further]
        if accept_identity and isinstance(addresses, str) and kept:
            # a pooler in front of the former cluster would go on writing there
            raise ConfigurationError(
                f"server {row.name!r} has other addresses, which may lead to the former cluster: give "
                f"{' and '.join(kept)} as well, '' for none"
            )
        return complete

    async def verify(
        self,
        rows: Mapping[str, ServerRow],
        name: str,
        addresses: ServerAddresses | str | None,
        *,
        accept_identity: bool,
    ) -> dict[str, Any]:
        """Verify the addresses of a server, the present ones where None, and return what changes in its row.

        Args:
            rows: Of all servers, by name.
            name: The server's name.
            addresses: All of its addresses.
            accept_identity: Whether they may lead to another cluster.

        Raises:
            ConfigurationError: the embedded server has no addresses of its own; the addresses have another maintenance
                database, or lead to the cluster of another server; or the server cannot hold tenants.
            ServerIdentityError: they lead to another cluster.
            ServerUnavailableError: the server does not answer.
        """
        row = rows[name]
        if self._embedded and name == "default":
            raise ConfigurationError(
                "server 'default' is the embedded one: its address changes with its starts, so it is not kept in a row"
            )
        given = self._present(row) if addresses is None else read_addresses(addresses)
        # without its row, by which it would refuse another cluster
        server = self._servers.make(name, given)
        try:
            facts = await server_check.verify(server)
        finally:
            await server.close()
        if row.maintenance_database not in (None, facts.database):
            raise ConfigurationError(
                f"the new address names the database {facts.database!r}, and locks on server {name!r} are taken in "
                f"{row.maintenance_database!r}: name that one; to change it, stop every process and run: tenancy "
                f"servers set-maintenance-database {name} {facts.database}"
            )
        if row.identity not in (None, facts.identity) and not accept_identity:
            answers = (
                f"another cluster answers, {facts.identity or 'one without a marker'}, than the one that holds its "
                f"tenants, {row.identity}; if they were moved there"
                if differ(row.identity, facts.identity)
                else f"this administrator can read {facts.identity or 'nothing'} and not {row.identity}, by which the "
                "cluster that holds its tenants is known; if it is the same one"
            )
            raise ServerIdentityError(
                server=name,
                address=server.dsn.address(),
                reason=f"{answers}, repeat this with --accept-identity (accept_identity=True)",
            )
        if differ(row.identity, facts.identity):
            server_check.refuse_known_cluster(name, facts.identity, rows.values())
        if addresses is None:
            return {"identity": facts.identity}
        return self.columns(server, given, facts)

    def columns(self, server: Server, addresses: ServerAddresses, facts: ServerFacts) -> dict[str, Any]:
        """Return what a row has of verified addresses.

        Args:
            server: As these addresses make it.
            addresses: All of them.
            facts: What the server has said of itself.
        """
        return {
            "host": server.host,
            "port": server.port,
            "maintenance_database": facts.database,
            "identity": facts.identity,
            "sealed_addresses": self._sealed.seal(server.name, addresses),
        }

    def _present(self, row: ServerRow) -> ServerAddresses:
        if row.sealed_addresses is not None:
            return self._sealed.open(row)
        if row.name not in self._config.server_addresses:
            raise UnknownServerError(row.name)
        return self._config.server_addresses[row.name]


__all__ = ["NewAddresses"]
