"""A name server on loopback, which answers as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rrset


class NameServer(asyncio.DatagramProtocol):
    """Answers with the TXT records of ``texts``, by name without a final dot, and with NXDOMAIN to everything else.

    To a name in ``codes`` it answers with that code and no records, and to one in ``silent`` not at all.
    """

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}
        self.codes: dict[str, dns.rcode.Rcode] = {}
        self.silent: set[str] = set()
        self.asked: list[str] = []
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport to answer by."""
        # asyncio's own transport does not inherit from the class that it implements
        self.transport = cast("asyncio.DatagramTransport", transport)
        self.address = "127.0.0.1:{}".format(transport.get_extra_info("sockname")[1])

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer one question."""
        query = dns.message.from_wire(data)
        name = query.question[0].name.to_text(omit_final_dot=True)
        self.asked.append(name)
        if name in self.silent:
            return
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA | dns.flags.RA
        if name in self.codes:
            response.set_rcode(self.codes[name])
        elif name in self.texts:
            response.answer.append(dns.rrset.from_text(f"{name}.", 60, "IN", "TXT", *self.texts[name]))
        else:
            response.set_rcode(dns.rcode.NXDOMAIN)
        self.transport.sendto(response.to_wire(), addr)


@asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    """Serve until the end of the body."""
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(NameServer, ("127.0.0.1", 0))
    try:
        yield server
    finally:
        transport.close()
