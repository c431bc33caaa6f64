"""Servers' addresses, and which server a new tenant is placed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tenancy_orm import TenancyConfig
from tenancy_orm.config import PoolConfig, ServerAddresses
from tenancy_orm.errors import SettingError
from tenancy_orm.servers import Server

URL = "postgresql://admin:hunter2@db.example/postgres"
POOLER = "postgresql://pooler.example:6432?sslmode=require"


def hosts(config: TenancyConfig) -> dict[str, tuple[str, str | None]]:
    """Each server's host for administration, and its own for tenants."""
    return {
        name: (str(found.admin_dsn), None if (dsn := found.tenants_dsn) is None else str(dsn))
        for name, found in config.server_addresses.items()
    }


BOTH = {"eu": ("db.example:5432/postgres", "pooler.example:6432/"), "us": ("db.example:5432/postgres", None)}


@pytest.mark.parametrize(
    "servers",
    [
        {"eu": ServerAddresses(admin=URL, tenants=POOLER), "us": URL},
        {"eu": {"admin": URL, "tenants": POOLER}, "us": {"admin": URL}},
        f"eu={URL} eu.tenants={POOLER} us={URL}",
        f"eu={URL},eu.tenants={POOLER},us.admin={URL}",
        f"us={URL}, eu.tenants={POOLER}, eu.admin={URL}",
    ],
)
def test_a_server_has_two_addresses(servers: Any) -> None:
    """As an object, as a table and as text; one URL stands for both."""
    config = TenancyConfig(control_url=URL, servers=servers)
    assert hosts(config) == BOTH
    assert "hunter2" not in f"{config!r} {config.model_dump()} {config.server_addresses!r}"


@pytest.mark.parametrize(
    "servers",
    [
        {"eu": ServerAddresses(admin=URL, replicas=["postgresql://db-2.example", "postgresql://db-3.example:5433"])},
        {"eu": {"admin": URL, "replicas": ["postgresql://db-2.example", "postgresql://db-3.example:5433"]}},
        f"eu={URL} eu.replicas=postgresql://db-2.example eu.replicas=postgresql://db-3.example:5433",
    ],
)
def test_a_server_has_replicas(servers: Any) -> None:
    """Each at an address of its own, at which the administrator logs in as on the server."""
    [addresses] = TenancyConfig(control_url=URL, servers=servers).server_addresses.values()
    assert [str(dsn) for dsn in addresses.replica_dsns] == ["db-2.example:5432/", "db-3.example:5433/"]
    server = Server("eu", addresses.admin_dsn, connect_timeout=5, replicas=addresses.replica_dsns)
    assert [(one.name, one.host, one.port) for one in server.replicas] == [
        ("eu/1", "db-2.example", 5432),
        ("eu/2", "db-3.example", 5433),
    ]
    assert {(one.dsn.user, one.dsn.secret(), one.dsn.database) for one in server.replicas} == {
        ("admin", "hunter2", "postgres")
    }


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://db-2.example,db-3.example", "names several hosts; write each replica as a URL of its own"),
        ("postgresql://admin:hunter2@db-2.example", "names a user and a password"),
        ("postgresql://", "names no host"),
    ],
)
def test_the_address_of_a_replica_is_one_host(url: str, reason: str) -> None:
    """Positions of two servers would else be taken for those of one."""
    with pytest.raises(SettingError) as caught:
        ServerAddresses(admin=URL, replicas=[url])
    assert reason in str(caught.value) and "hunter2" not in str(caught.value)


def test_a_settings_file_has_a_table_for_each_server(directory: Path) -> None:
    """A variable replaces them all."""
    (directory / "tenancy.toml").write_text(
        f'control_url = "{URL}"\ndefault_server = "us"\n[servers]\nus = "{URL}"\n'
        f'[servers.eu]\nadmin = "{URL}"\ntenants = "{POOLER}"\n'
    )
    config = TenancyConfig.from_env({})
    assert (hosts(config), config.default_server) == (BOTH, "us")
    environ = {"TENANCY_SERVERS": f"a={URL} b={URL} b.tenants={POOLER}", "TENANCY_DEFAULT_SERVER": "b"}
    config = TenancyConfig.from_env(environ)
    assert (list(hosts(config)), config.default_server) == (["a", "b"], "b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tenants": POOLER}, "servers: the address of server 'eu': admin is missing"),
        (
            {"admin": URL, "replica": URL},
            "servers: server 'eu' has addresses of an unknown kind replica; write a URL, or",
        ),
        ({"admin": "hunter2"}, "servers: the address of server 'eu': admin is not a URL"),
        ({"admin": URL, "tenants": "postgresql:///?sslmode=require"}, "tenants names no host"),
        (
            {"admin": URL, "tenants": "postgresql://app:hunter2@pooler/main"},
            "tenants names a user and a password and a database; those are the tenant's own",
        ),
        ({"admin": URL, "tenants": "postgresql://pooler?passfile=x"}, "tenants names the parameter passfile"),
        (3, "servers: must be a table of URLs by name; of server 'eu': write a URL, or admin"),
    ],
)
def test_a_mistake_in_an_address_is_named(given: Any, message: str) -> None:
    """Without the value, which may hold a password."""
    with pytest.raises(SettingError) as caught:
        TenancyConfig(control_url=URL, servers={"eu": given})
    assert message in str(caught.value) and "hunter2" not in str(caught.value)


def test_text_of_a_server_without_administration_is_refused() -> None:
    """The tenants' address alone is none."""
    with pytest.raises(SettingError, match="the address of server 'eu': admin is missing"):
        TenancyConfig(control_url=URL, servers=f"eu.tenants={POOLER}")  # type: ignore[arg-type]


def test_a_tenant_may_not_hold_more_connections_than_there_are() -> None:
    """Where both numbers were given. The default of one is no contradiction to the other."""
    with pytest.raises(SettingError, match=r"^pool\.max_connections_per_tenant: must be at most max_connections, wh"):
        TenancyConfig(control_url=URL, pool={"max_connections": 3, "max_connections_per_tenant": 4})  # type: ignore[arg-type]
    config = TenancyConfig(control_url=URL).replace(pool={"max_connections": 3})
    assert config.pool == PoolConfig(max_connections=3)
    with pytest.raises(SettingError, match=r"^max_connections_per_tenant: must be at most"):
        PoolConfig(max_connections=3, max_connections_per_tenant=4)
