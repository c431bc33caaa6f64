"""TLS in front of a server that has none, as the embedded one: a proxy ends it, and notes who came how."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_SSL_REQUEST = (80877103).to_bytes(4)
_CANCEL_REQUEST = (80877102).to_bytes(4)


def write_certificate(path: Path) -> None:
    """Write a self-signed certificate of localhost and its key into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(made.public_bytes(pem) + private)


class TlsProxy:
    """Forwards connections, with TLS or without, as the client wants it.

    ``encrypted`` says of each application_name whether all its connections were encrypted.
    """

    def __init__(self, host: str, port: int, certificate: Path) -> None:
        self._target = (host, port)
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate)
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.encrypted: dict[str, bool] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection."""
        upstream: asyncio.StreamWriter | None = None
        try:
            first = await _message(reader)
            has_tls = first[4:8] == _SSL_REQUEST
            if has_tls:
                writer.write(b"S")
                await writer.start_tls(self._context)
                first = await _message(reader)
            if first[4:8] != _CANCEL_REQUEST:
                words = first[8:].split(b"\0")
                name = dict(zip(words[::2], words[1::2], strict=False)).get(b"application_name", b"").decode()
                self.encrypted[name] = self.encrypted.get(name, True) and has_tls
            answers, upstream = await asyncio.open_connection(*self._target)
            upstream.write(first)
            await asyncio.gather(_forward(reader, upstream), _forward(answers, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client gave up, for example since it does not trust the certificate
        finally:
            for end in (writer, upstream):
                if end is not None:
                    end.transport.abort()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Begin to forward a connection."""
        task = asyncio.get_running_loop().create_task(self.serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cut every connection."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _message(reader: asyncio.StreamReader) -> bytes:
    length = await reader.readexactly(4)
    return length + await reader.readexactly(int.from_bytes(length) - 4)


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.transport.abort()


@asynccontextmanager
async def tls_proxy(port: int, certificate: Path) -> AsyncIterator[TlsProxy]:
    """A proxy at a free port in front of the one of ``port``."""
    proxy = TlsProxy("127.0.0.1", port, certificate)
    listener = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.port = listener.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        listener.close()
        await proxy.close()
