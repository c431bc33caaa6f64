import os
from contextlib import asynccontextmanager

os.environ["DATABASE_URL"] = os.environ["TEST_DATABASE_URL"]
os.environ["TENANCY_CONTROL_URL"] = os.environ["TEST_CONTROL_URL"]
os.environ["JWT_SECRET"] = "for tests alone: thirty-two bytes"

import httpx
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import text

from app import app
from database import engine, tenancy


@pytest.fixture(scope="session")
def schema():
    command.upgrade(Config("alembic.ini"), "head")


@pytest.fixture(scope="session")
async def opened(schema):
    await tenancy.open(initialise=True)
    yield
    await tenancy.close()


@pytest.fixture(autouse=True)
async def empty_database(opened):
    async for tenant in tenancy.tenants.iterate():
        await tenancy.tenants.delete(tenant)
        await tenancy.tenants.purge(tenant)
    async with engine.begin() as connection:
        await connection.execute(text("TRUNCATE organisations, users CASCADE"))


@asynccontextmanager
async def person_of(slug):
    """A client that has signed up with a new organisation, and is logged in."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://testserver") as client:
        form = {"slug": slug, "name": slug.title(), "email": f"mara@{slug}.example", "password": "correct horse"}
        assert (await client.post("/signup", json=form)).status_code == 201
        yield client


@pytest.fixture
async def acme():
    async with person_of("acme") as client:
        yield client


@pytest.fixture
async def globex():
    async with person_of("globex") as client:
        yield client


@pytest.fixture
def database_of():
    """Opens a session on the database that has an organisation's tickets."""
    return tenancy.session
