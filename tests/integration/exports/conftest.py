"""Tenants with tables of every kind, made by the owner of tenants' databases."""

from __future__ import annotations

import json
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tenancy_orm import Tenancy, Tenant

Execute = Callable[[Tenant, str], Awaitable[None]]


@asynccontextmanager
async def inside(tenancy: Tenancy, tenant: Tenant) -> AsyncIterator[asyncpg.Connection[Any]]:
    """An administrator's connection to a tenant's database, in which tables belong to the owner of all of them."""
    assert tenant.placement is not None
    connection = await tenancy.internals.provisioner.connect_admin(tenant.placement.server, tenant.placement.database)
    try:
        await connection.execute(f'SET ROLE "{tenancy.internals.provisioner.names.owner}"')
        yield connection
    finally:
        await connection.close()


@pytest.fixture
def execute(tenancy: Tenancy) -> Execute:
    """Runs statements in a tenant's database as the owner of its tables."""

    async def run(tenant: Tenant, sql: str) -> None:
        async with inside(tenancy, tenant) as connection:
            await connection.execute(sql)

    return run


def names_in(directory: Path) -> list[str]:
    """What a directory has."""
    return sorted(path.name for path in directory.iterdir())


class Unpacked:
    """The files of an archive, by path; JSON and JSON Lines are read."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            self.files = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        else:
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
                self.files = {info.filename: archive.read(info) for info in archive.infolist()}

    def __getitem__(self, path: str) -> bytes:
        return self.files[path]

    @property
    def manifest(self) -> Any:
        return json.loads(self["manifest.json"])

    @property
    def tables(self) -> dict[str, Any]:
        """What schema.json says of each table, by its name with the schema."""
        return {f"{one['schema']}.{one['name']}": one for one in json.loads(self["schema.json"])["tables"]}

    def text(self, table: str) -> str:
        return self[self.tables[table]["file"]].decode()

    def rows(self, table: str) -> list[Any]:
        return [json.loads(line) for line in self.text(table).splitlines()]
