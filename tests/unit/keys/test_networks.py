"""Addresses and networks."""

from __future__ import annotations

import pytest

from tenancy_orm.errors import ConfigurationError
from tenancy_orm.keys.networks import is_in_networks, parse_networks, source_group


@pytest.mark.parametrize(
    ("source", "networks", "admitted"),
    [
        ("192.0.2.1", ["192.0.2.0/24"], True),
        ("192.0.3.1", ["192.0.2.0/24"], False),
        ("192.0.3.1", ["192.0.2.0/24", "192.0.3.1"], True),
        ("::ffff:192.0.2.1", ["192.0.2.0/24"], True),
        ("::ffff:192.0.2.1", ["::/0"], False),
        ("2001:db8::1", ["2001:db8::/32"], True),
        ("2001:db8::1", ["0.0.0.0/0"], False),
        ("fe80::1%eth0", ["fe80::/10"], True),
        ("192.0.2.1:443", ["192.0.2.0/24"], False),
        ("testclient", ["0.0.0.0/0"], False),
        ("", ["0.0.0.0/0"], False),
        (None, ["0.0.0.0/0"], False),
    ],
)
def test_a_source_is_admitted_by_its_address(source: str | None, networks: list[str], admitted: bool) -> None:
    """Text that is not an address is in no network; an IPv4 address matches in every notation."""
    assert is_in_networks(source, parse_networks(networks)) is admitted


@pytest.mark.parametrize("network", ["192.0.2.1/24", "192.0.2.0/33", "everywhere", ""])
def test_a_malformed_network_is_refused(network: str) -> None:
    """They are not guessed: 10.0.0.1/8 may be a mistake for 10.0.0.1."""
    with pytest.raises(ConfigurationError, match="CIDR"):
        parse_networks([network])


def test_sources_are_counted_by_what_one_customer_holds() -> None:
    """One IPv4 address; all of an IPv6 /64."""
    assert source_group("192.0.2.1") == source_group("::ffff:192.0.2.1") == "192.0.2.1"
    assert source_group("2001:db8:1:2::3") == source_group("2001:db8:1:2:ffff::") == "2001:db8:1:2::/64"
    assert source_group("2001:db8:1:3::3") != source_group("2001:db8:1:2::3")
    assert source_group("x" * 1_000) == "x" * 64
