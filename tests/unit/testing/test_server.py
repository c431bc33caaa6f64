"""The server of a test run, and the connections to others that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenancy_orm.errors import ConfigurationError
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.testing._server import TestServer

OTHERS = [
    "postgresql://u@production/app",
    "postgresql://u@localhost:5433/app",
    "postgresql://u@localhost,production/app",
    "postgresql:///app?service=production",
]


def test_no_url_leads_to_another_server() -> None:
    """By host, port, one of several hosts, or a service; the same server is let through."""
    server = TestServer("postgresql://u@localhost/postgres", Path())
    server.check(Dsn.parse("postgresql://v@localhost:5432/other"))
    for url in OTHERS:
        with pytest.raises(ConfigurationError, match="no other server than that of its tests"):
            server.check(Dsn.parse(url))
