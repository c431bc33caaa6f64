"""Network addresses: the networks that a key may be used from, and what counts as one source."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import TypeAlias

from ..errors import ConfigurationError

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_IPV6_SITE = 64  # one customer commonly has a whole /64, and could use a new address for every attempt
_SOURCE_LENGTH = 64


def parse_networks(networks: Iterable[str | Network]) -> tuple[Network, ...]:
    """Parse networks in CIDR notation; a single address is a network of one.

    Raises:
        ConfigurationError: one is malformed, or has bits set to the right of its mask.
    """
    if isinstance(networks, str):
        raise ConfigurationError("networks must be a sequence of networks, not one string")
    found = []
    for network in networks:
        try:
            found.append(ipaddress.ip_network(network))
        except ValueError as exc:
            raise ConfigurationError(f"{str(network)!r} is not a network in CIDR notation: {exc}") from None
    return tuple(found)


def parse_address(source: str | None) -> Address | None:
    """Parse a peer's address; None if it is malformed. An IPv4 address that is mapped into IPv6 counts as IPv4."""
    if source is None:
        return None
    try:
        address = ipaddress.ip_address(source)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_in_networks(source: str | None, networks: Iterable[Network]) -> bool:
    """Whether ``source`` is in one of ``networks``. An unknown or malformed source is in none."""
    address = parse_address(source)
    return address is not None and any(address in network for network in networks)


def source_group(source: str) -> str:
    """The unit that failures are counted by: an IPv4 address, an IPv6 /64, or the text itself if it is neither."""
    address = parse_address(source)
    if address is None:
        return source[:_SOURCE_LENGTH]
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address), _IPV6_SITE), strict=False))
    return str(address)
