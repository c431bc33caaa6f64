"""``KnownServer``: a server's row, and where this process has its addresses from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..config import TenancyConfig
from ..errors import SecretError
from ..servers import Servers
from ..servers.rows import ServerRow
from ..servers.sealed import SealedAddresses


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownServer:
    """A server: its row, and where this process has its addresses from.

    Attributes:
        row: Its row, with how many tenants it holds.
        source: "row" or "settings"; None where neither has its addresses, so that this process cannot reach it.
        tenants_address: ``host:port`` of tenants' sessions, where that is another address.
        replicas: ``host:port`` of each replica.
        peer_address: ``host:port`` at which other servers reach it, where that is another address.
        warnings: What an operator should look at.
    """

    row: ServerRow
    source: Literal["row", "settings"] | None
    tenants_address: str | None = None
    replicas: tuple[str, ...] = ()
    peer_address: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name."""
        return self.row.name


def describe(
    row: ServerRow, same: Sequence[str], *, config: TenancyConfig, servers: Servers, addresses: SealedAddresses
) -> KnownServer:
    """Return what this process knows of a server.

    Args:
        row: Its row.
        same: The names of the servers of its cluster.
        config: This process's settings.
        servers: The servers that it can reach.
        addresses: Opens the addresses in a row.
    """
    setting = config.server_addresses.get(row.name) if config.servers is not None else None
    warnings: list[str] = []
    source: Literal["row", "settings"] | None = "settings"
    if row.sealed_addresses is not None:
        source = "row"
        if setting is not None:
            try:
                same_addresses = addresses.open(row) == setting
            except SecretError:
                same_addresses = False
            difference = "is ignored" if same_addresses else "differs, and is ignored"
            warnings.append(f"its address is in its row; the one in the settings of this process {difference}")
    elif row.name not in servers:
        source = None
        warnings.append("this process does not know its address")
    if others := [name for name in same if name != row.name]:
        warnings.append(f"it is the same cluster as {', '.join(others)}")
    found = servers.get(row.name)
    if found is None:
        return KnownServer(row=row, source=source, warnings=tuple(warnings))
    traffic = found.traffic.dsn
    return KnownServer(
        row=row,
        source=source,
        tenants_address=None if traffic == found.dsn else traffic.address().rstrip("/"),
        replicas=tuple(replace(replica.dsn, database=None).address().rstrip("/") for replica in found.replicas),
        peer_address=None if found.peer == found.dsn else found.peer.address().rstrip("/"),
        warnings=tuple(warnings),
    )


__all__ = ["KnownServer", "describe"]
