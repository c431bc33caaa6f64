"""Releases of one application, side by side: each with migrations and a web application of its own."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.asgi import TenancyMiddleware
from tests.support.fleet import Fleet, open_fleet
from tests.support.projects import Project

RATING = """
op.execute("ALTER TYPE mood RENAME TO old_mood")
op.execute("CREATE TYPE mood AS ENUM ('good', 'bad', 'ugly')")
op.execute("ALTER TABLE notes ALTER mood TYPE mood USING mood::text::mood")
op.execute("DROP TYPE old_mood")
op.alter_column("notes", "id", type_=sa.BigInteger)
op.add_column("notes", sa.Column("rating", sa.Integer))
"""
NO_RATING = 'op.drop_column("notes", "rating")'
MOOD = """
op.execute("CREATE TYPE mood AS ENUM ('good', 'bad')")
op.add_column("notes", sa.Column("mood", sa.Text))
op.execute("ALTER TABLE notes ALTER mood TYPE mood USING mood::mood")
op.execute("INSERT INTO notes (body, mood) VALUES ('hello', 'good')")
"""


@dataclass
class Release:
    """A version of the application: its ``Tenancy``, and a client of its web application."""

    fleet: Fleet
    client: httpx.AsyncClient

    @property
    def tenancy(self) -> Tenancy:
        return self.fleet.tenancy

    async def get(self, key: str) -> int:
        return (await self.client.get("/notes", headers={"X-API-Key": key})).status_code


def application(tenancy: Tenancy, columns: str) -> Starlette:
    """Reads notes in the second and third statement of a transaction, with statements that the driver prepares."""

    async def notes(request: Request) -> JSONResponse:
        async with tenancy.transaction() as session:
            await session.execute(text("SELECT 1"))
            await session.execute(text("UPDATE notes SET mood = :mood"), {"mood": "good"})
            rows = await session.execute(text(f"SELECT {columns} FROM notes"))
            return JSONResponse([list(row) for row in rows])

    return Starlette(routes=[Route("/notes", notes)], middleware=[Middleware(TenancyMiddleware, tenancy=tenancy)])


@asynccontextmanager
async def released(config: TenancyConfig, columns: str, *, initialise: bool = False) -> AsyncIterator[Release]:
    # a busy machine may take longer than 2 s for all requests at once
    patient = config.replace(directory={"timeout": 30.0})
    async with open_fleet(patient, initialise=initialise) as fleet:
        transport = httpx.ASGITransport(application(fleet.tenancy, columns), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            yield Release(fleet, client)


def next_project(project: Project) -> Project:
    """The next release's directory: ``project`` at its head, 0002, and the revision 0003."""
    project.add("0002", MOOD, down="0001")
    root = project.root.parent / "next"
    shutil.copytree(project.root, root)
    new = Project(root)
    new.add("0003", RATING, NO_RATING, down="0002")
    return new


async def create(release: Release, slug: str) -> str:
    """Create a tenant, and return its key."""
    created = await release.tenancy.tenants.create(slug)
    release.fleet.tenants[slug] = created.tenant
    return str(created.api_key)
