"""Databases of somebody else, which are to become tenants: each with a role of its own that owns it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from tenancy_orm.secrets.keyring import new_password
from tests.support.postgres import Postgres


@dataclass(frozen=True)
class ForeignDatabase:
    """A database of a role that is no administrator.

    Args:
        postgres: Its server.
        name: Its name, and that of the role.
        url: With the role's login.
        password: The role's.
    """

    postgres: Postgres
    name: str
    url: str
    password: str

    async def execute(self, sql: str) -> None:
        """Run SQL as its owner."""
        connection = await asyncpg.connect(self.url, timeout=30)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    async def fetch(self, sql: str) -> list[tuple[Any, ...]]:
        """Ask it."""
        async with self.postgres.connect(self.name) as connection:
            return [tuple(row) for row in await connection.fetch(sql)]


@asynccontextmanager
async def foreign_database(postgres: Postgres, sql: str = "") -> AsyncIterator[ForeignDatabase]:
    """Make a database of a role of its own, with what ``sql`` makes as that role; dropped at the end."""
    name, password = postgres.new_name("old"), new_password()
    await postgres.administer(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{password}'")
    await postgres.create_database(name, template="template0", owner=name)
    made = ForeignDatabase(postgres, name, postgres.url(name, user=name, password=password), password)
    try:
        if sql:
            await made.execute(sql)
        yield made
    finally:
        await postgres.drop_database(name)
        await postgres.administer(f'DROP ROLE IF EXISTS "{name}"')
