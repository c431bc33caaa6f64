"""Servers: their addresses, and errors without passwords."""

from __future__ import annotations

import pytest

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import ConfigurationError, ServerUnavailableError, UnknownServerError
from tenancy_orm.servers import Server, Servers
from tenancy_orm.tenant import Placement

URL = "postgresql://admin:hunter2@db.example:5433/registry?sslmode=verify-full&prepared_statement_cache_size=0"
PLACEMENT = Placement("default", "tenant_db", "tenant_role", b"")


def servers(url: str = URL, **changes: object) -> Servers:
    return Servers(TenancyConfig(control_url=url, **changes))  # type: ignore[arg-type]


def server(url: str = URL) -> Server:
    return servers(url)["default"]


def test_a_server_knows_its_address() -> None:
    """Host and port come from the administrative URL."""
    assert (server().name, server().host, server().port) == ("default", "db.example", 5433)
    assert server("postgresql://a@h/d").port == 5432
    local = server("postgresql://a@/d?host=/run/pg&port=5499")
    assert (local.host, local.port) == ("/run/pg", 5499)


def test_a_tenants_url_is_a_name_and_not_a_way_in() -> None:
    """A tenant's URL has neither the tenant's nor the administrator's password."""
    url = server().tenant_url(PLACEMENT)
    assert url.render_as_string(hide_password=False) == "postgresql+asyncpg://tenant_role@db.example:5433/tenant_db"


def test_options_of_the_client_are_read_from_the_url() -> None:
    """The cache sizes for a server behind PgBouncer come from its URL."""
    assert server().prepared_statement_cache_size == 0
    assert server("postgresql://a@h/d").prepared_statement_cache_size == 100


def test_an_unknown_server_is_named() -> None:
    """An unknown server raises ``UnknownServerError``, a LookupError, with its name."""
    found = servers()
    assert list(found) == ["default"]
    assert "other" not in found
    with pytest.raises(UnknownServerError, match="'other'"):
        found["other"]


def test_no_repr_holds_a_password() -> None:
    """Neither a server's repr nor those of its members contain a password."""
    assert "hunter2" not in f"{servers()!r} {server()!r} {server().tenant_url(PLACEMENT)!r}"


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    """The error has the server's name, and not its password."""
    gone = server("postgresql://admin:hunter2@127.0.0.1:1/registry")
    for attempt in (gone.connect_admin(), gone.connect_tenant(PLACEMENT, "hunter2", tenant="acme")):
        with pytest.raises(ServerUnavailableError, match="'default'") as caught:
            await attempt
        assert "hunter2" not in repr(caught.value)


async def test_a_url_that_cannot_be_used_is_an_error_of_the_configuration() -> None:
    """An invalid URL raises ``ConfigurationError``, not ``ServerUnavailableError``."""
    with pytest.raises(ConfigurationError, match=r"the URL of server .big.: the parameter sslmode must be"):
        servers(servers={"big": "postgresql://a@h/d?sslmode=nonsense"})
    # asyncpg finds this contradiction when it connects
    with pytest.raises(ConfigurationError, match=r"the URL of server .default. cannot be used"):
        await server("postgresql://a@h/d?sslmode=prefer&sslnegotiation=direct").connect_admin()
