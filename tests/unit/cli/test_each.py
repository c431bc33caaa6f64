"""The environment of ``tenancy each``: a tenant's login, the server's address, and no other credentials."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from psycopg import pq

from tenancy_orm.cli.each import _pass_on, environment_for
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.provisioning.logins.temporary_logins import TemporaryLogin


def login(dsn: Dsn) -> TemporaryLogin:
    """A login on a server with this DSN."""
    tenant: Any = SimpleNamespace(id=UUID(int=1), slug="acme")
    fields: dict[str, Any] = {"_dsn": dsn, "_purpose": "test", "expires_at": datetime.now(UTC)}
    return TemporaryLogin(tenant=tenant, role="login", password="own", database="acme", server="default", **fields)


def libpqs(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> dict[str, str]:
    """How a program with this environment connects, by libpq."""
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        found = {option.keyword.decode(): option.val for option in pq.Conninfo.get_defaults()}
    return {name: value.decode() for name, value in found.items() if value is not None}


def test_a_service_does_not_make_the_login_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the variables alone, libpq prefers the file's user and password: the command would be the administrator."""
    file = tmp_path / "services.conf"
    file.write_text(
        "[prod]\nhost=db.example\nport=6432\nuser=admin\npassword=100%secret\ndbname=postgres\nsslmode=require\njit=off\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    attacked = libpqs(monkeypatch, {"PGSERVICE": "prod", "PGUSER": "login", "PGPASSWORD": "own"})
    assert (attacked["user"], attacked["password"]) == ("admin", "100%secret")
    dsn = Dsn.parse("postgresql:///?service=prod&sslmode=verify-full&passfile=/run/admin")
    made = login(dsn.without_service())
    found = libpqs(monkeypatch, environment_for({"PGSERVICE": "prod", "PGPASSFILE": "/run/admin"}, made))
    expected = {"user": "login", "password": "own", "dbname": "acme", "host": "db.example", "port": "6432"}
    assert expected | {"sslmode": "verify-full", "options": "-c jit=off"} == {
        name: value for name, value in found.items() if name in {*expected, "sslmode", "options", "service", "passfile"}
    }
    assert made.url.startswith("postgresql://login:own@db.example:6432/acme?")
    assert not any(word in made.url for word in ("service", "admin", "secret"))
    assert "PGSERVICE" not in dsn.environment(user="t", database="d", purpose="psql")
    with pytest.raises(ConfigurationError, match="service 'other' cannot be read"):
        Dsn.parse("service=other").without_service()


def test_the_variables_that_lead_to_the_server_are_kept() -> None:
    """A URL without a host is completed by them; those with credentials are not passed on."""
    inherited = {"PGHOST": "db", "PGPORT": "6432", "PGSSLMODE": "require", "PATH": "/bin"}
    secret = {"PGUSER": "admin", "PGPASSWORD": "s", "PGPASSFILE": "f", "PGSERVICE": "p", "TENANCY_CONTROL_URL": "u"}
    found = environment_for(inherited | secret, login(Dsn.parse("postgresql:///postgres")))
    assert inherited.items() <= found.items()
    assert found.keys() & secret.keys() == {"PGUSER", "PGPASSWORD"}
    assert (found["PGUSER"], found["PGPASSWORD"]) == ("login", "own")
    named = environment_for(inherited, login(Dsn.parse("postgresql://other/postgres")))
    assert (named["PGHOST"], named["PGPORT"]) == ("other", "5432")


async def test_a_reader_that_waits_keeps_nobody_else_waiting() -> None:
    """A pager reads when somebody presses a key; logins are prolonged until then."""
    may_read, written = threading.Event(), []

    class Sink:
        def write(self, data: bytes) -> None:
            assert may_read.wait(10), "the event loop waits for the reader"
            written.append(data)

        def flush(self) -> None:
            pass

    source, sink = asyncio.StreamReader(), Sink()
    source.feed_data(b"one\ntwo\nrest")
    source.feed_eof()
    asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(may_read.set))
    await _pass_on(source, sink, b"acme: ")  # type: ignore[arg-type]
    assert b"".join(written) == b"acme: one\nacme: two\nacme: rest\n"
