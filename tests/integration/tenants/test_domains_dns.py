"""TXT records looked up over the wire, from a name server on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from tenancy_orm.errors import DomainError
from tenancy_orm.tenants.domains import DnsTextRecords

RECORDS = {"_tenancy-challenge.acme.example.": ['"first part " "second part"', '"other"']}


class NameServer(asyncio.DatagramProtocol):
    """Answers from ``RECORDS``, and with NXDOMAIN to everything else; ``silent.example.`` is not answered."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport to answer by."""
        # asyncio's own transport does not inherit from the class that it implements
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer one question."""
        query = dns.message.from_wire(data)
        name = query.question[0].name.to_text()
        if name == "silent.example.":
            return
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA | dns.flags.RA
        if name in RECORDS:
            response.answer.append(dns.rrset.from_text(name, 60, "IN", "TXT", *RECORDS[name]))
        else:
            response.set_rcode(dns.rcode.NXDOMAIN)
        self.transport.sendto(response.to_wire(), addr)


@pytest.fixture
async def records() -> AsyncIterator[DnsTextRecords]:
    """A resolver that asks the name server of this test alone."""
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(NameServer, ("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    yield DnsTextRecords(nameservers=["127.0.0.1"], port=port, timeout=1.0)
    transport.close()


async def test_published_texts_are_found(records: DnsTextRecords) -> None:
    """A record of several strings is one text."""
    assert sorted(await records.lookup("_tenancy-challenge.acme.example")) == ["first part second part", "other"]


async def test_a_name_without_a_record_has_no_texts(records: DnsTextRecords) -> None:
    """It does not exist."""
    assert await records.lookup("_tenancy-challenge.globex.example") == []


async def test_a_silent_name_server_is_an_error_within_the_deadline(records: DnsTextRecords) -> None:
    """Not an absent record: the claim is not judged."""
    async with asyncio.timeout(10):
        with pytest.raises(DomainError, match="cannot be looked up"):
            await records.lookup("silent.example")
