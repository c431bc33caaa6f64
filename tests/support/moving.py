"""Two servers of a test module's own between which tenants are moved, and what writes to a tenant during that."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import psycopg
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.tenant import Tenant
from tests.support.models import Base
from tests.support.replication import TestServer, primary_server

_SETTINGS: Mapping[str, str] = {
    "wal_level": "logical",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
    "max_prepared_transactions": "5",
}
_TENANTS = "SELECT datname FROM pg_database WHERE datname LIKE '%\\_t\\_%'"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two servers."""

    one: TestServer
    two: TestServer

    def on(self, name: str) -> TestServer:
        """The server of this name."""
        return self.one if name == "one" else self.two

    def rows(self, tenant: Tenant, query: str) -> list[tuple[Any, ...]]:
        """What a query returns in the tenant's database, as the superuser."""
        assert tenant.placement is not None
        return rows(self.on(tenant.placement.server), tenant.placement.database, query)

    def left(self, prefix: str) -> list[str]:
        """The slots, subscriptions, publications and logins of moves that an installation has on either server."""
        found = []
        for server in (self.one, self.two):
            for query in (
                "SELECT 'slot ' || slot_name FROM pg_replication_slots",
                "SELECT 'subscription ' || subname FROM pg_subscription",
                f"SELECT 'login ' || rolname FROM pg_roles WHERE rolname ~ '^{prefix}_.*_[vx]_'",
            ):
                found += [row[0] for row in rows(server, "postgres", query)]
            for (name,) in rows(server, "postgres", f"{_TENANTS} AND starts_with(datname, '{prefix}')"):
                found += [row[0] for row in rows(server, name, "SELECT 'publication ' || pubname FROM pg_publication")]
        return found

    def databases(self, prefix: str) -> list[str]:
        """The names of an installation's tenants' databases, each with its server's name."""
        query = f"{_TENANTS} AND starts_with(datname, '{prefix}')"
        return [f"{name}:{row[0]}" for name in ("one", "two") for row in rows(self.on(name), "postgres", query)]

    def writable(self, tenant: Tenant) -> list[str]:
        """The servers on which the tenant's role can connect to a tenant's database."""
        assert tenant.placement is not None
        query = (
            f"SELECT 1 FROM pg_database d JOIN pg_roles r ON r.rolname = '{tenant.placement.role}' AND r.rolcanlogin "
            "WHERE datname LIKE '%\\_t\\_%' AND has_database_privilege(r.oid, d.oid, 'CONNECT')"
        )
        return [name for name in ("one", "two") for _ in rows(self.on(name), "postgres", query)]


def rows(server: TestServer, database: str, query: str) -> list[tuple[Any, ...]]:
    """What a query returns in a database, as the superuser."""
    with psycopg.connect(server.url(database), autocommit=True) as connection:
        cursor = connection.execute(query.encode())
        return cursor.fetchall() if cursor.description else []


@contextmanager
def pair_of_servers(*versions: int, settings: Mapping[str, str] = MappingProxyType({})) -> Iterator[Pair]:
    """Run two servers for the body, of these versions of PostgreSQL, with further settings."""
    first, second = versions or (18, 18)
    with (
        primary_server(version=first, settings={**_SETTINGS, **settings}) as one,
        primary_server(version=second, settings={**_SETTINGS, **settings}) as two,
    ):
        yield Pair(one, two)


def moving_config(pair: Pair, control_url: str, name_prefix: str, **options: Any) -> TenancyConfig:
    """A configuration with both servers; new tenants are on the first."""
    return TenancyConfig(
        **{
            "control_url": control_url,
            "servers": {"one": pair.one.url("postgres"), "two": pair.two.url("postgres")},
            "default_server": "one",
            "metadata": Base.metadata,
            "encryption_keys": {"1": base64.b64encode(secrets.token_bytes(32)).decode()},
            "name_prefix": name_prefix,
            **options,
        }
    )


class Writer:
    """Writes numbers in transactions, one after the other, and changes the rows again, in one long session."""

    def __init__(self, tenancy: Tenancy, tenant: Tenant, name: str) -> None:
        self._tenancy, self._tenant, self._name = tenancy, tenant, name
        self.written: list[str] = []
        self.errors: list[BaseException] = []
        self.stopped = False

    async def run(self) -> None:
        """Write until ``stopped``; an error is noted, and the writer goes on."""
        while not self.stopped:
            try:
                async with self._tenancy.session(self._tenant.id) as session:
                    while not self.stopped:
                        body = f"{self._name}-{len(self.written) + len(self.errors)}"
                        insert = "INSERT INTO notes (body) VALUES (:body) RETURNING id"
                        number = await session.scalar(text(insert), {"body": f"{body}-new"})
                        await session.execute(
                            text("UPDATE notes SET body = :body WHERE id = :id"), {"body": body, "id": number}
                        )
                        await session.commit()
                        self.written.append(body)
                        # other processes need the machine as well
                        await asyncio.sleep(0.005)
            except Exception as exc:  # noqa: BLE001 - the test looks at them
                self.errors.append(exc)
                await asyncio.sleep(0.01)


@asynccontextmanager
async def writing(tenant: Tenant, *tenancies: Tenancy, each: int = 2) -> AsyncIterator[list[Writer]]:
    """Have several sessions of each process write to a tenant for the body; they have ended after it."""
    writers = [
        Writer(tenancy, tenant, f"{number}.{n}") for number, tenancy in enumerate(tenancies) for n in range(each)
    ]
    tasks = [asyncio.create_task(writer.run()) for writer in writers]
    try:
        yield writers
    finally:
        for writer in writers:
            writer.stopped = True
        await asyncio.gather(*tasks)
