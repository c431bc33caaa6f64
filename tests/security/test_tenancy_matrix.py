"""The tenancy matrix finds what leaks, and the examples leak nothing."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from itsdangerous import TimestampSigner

from tenancy_orm import Tenancy
from tenancy_orm.tenant import Tenant
from tenancy_orm.testing.embedded import EmbeddedServer
from tenancy_orm.testing.matrix import check
from tests.support.leaky import LEAKS, create_leaky
from tests.support.postgres import Postgres


async def test_every_leak_is_found_and_nothing_else(tenancy: Tenancy) -> None:
    """Each mistake is reported with the way that the owner was named; routes without one are not."""
    report = await check(create_leaky(tenancy), tenancy)
    found: dict[tuple[str, str], set[str]] = {}
    for one in report.leaks:
        found.setdefault((one.method, one.path), set()).add(one.named)
    assert found.keys() == LEAKS.keys() | {("HEAD", path) for method, path in found if method == "HEAD"}
    for route, named in LEAKS.items():
        assert any(one.startswith(named) for one in found[route]), (route, found[route])
    assert not report.unreached
    answered = {one.path for one in report.answered}
    assert "/healthz" in answered and "/docs" not in answered


async def prepare(tenancy: Tenancy) -> None:
    """Make the tables of the control database."""
    await tenancy.open(initialise=True)
    await tenancy.close()


FOR_PEOPLE = {
    *("POST /me/logout", "POST /me/logout-everywhere", "GET /me/tenants", "HEAD /me/tenants", "POST /me/teams"),
    *("POST /me/invitations", "DELETE /members/{subject}"),
}
"""The routes of the team notes that refuse keys."""


@pytest.fixture
def server(postgres: Postgres) -> Iterator[Postgres]:
    """A server with pgvector: the embedded one, also where the run uses a server of somebody else's."""
    if postgres.data_dir is not None:
        yield postgres
        return
    with EmbeddedServer.for_tests() as embedded:
        yield Postgres(embedded.url(), embedded.server_version, postgres.run, postgres.worker)


@asynccontextmanager
async def installation(server: Postgres, **more: str) -> AsyncIterator[dict[str, str]]:
    """Settings of a new control database, which is dropped at the end with its tenants."""
    name, prefix = server.new_name(), f"mx{secrets.token_hex(4)}"
    url = await server.create_database(name)
    try:
        yield {
            "TENANCY_CONTROL_URL": url,
            "TENANCY_SERVERS": f"default={server.admin_url}",
            "TENANCY_ENCRYPTION_KEYS": f"1:{base64.b64encode(secrets.token_bytes(32)).decode()}",
            "TENANCY_NAME_PREFIX": prefix,
            **more,
        }
    finally:
        await server.drop_database(name)
        await server.drop_all(prefix)


async def test_the_agent_platform_leaks_nothing(server: Postgres) -> None:
    """All routes of the example refuse everybody else; each is reached by the owner first."""
    from examples.agent_platform import app, settings
    from examples.agent_platform.models import EMBEDDING_DIMENSIONS

    vector = [1.0, *([0.0] * (EMBEDDING_DIMENSIONS - 1))]
    examples = {
        "POST /memories": lambda own: {"agent_id": str(own.id("agents")), "content": own.text(), "embedding": vector},
        "POST /memories/search": {"embedding": vector},
    }
    async with installation(server) as environ:
        tenancy = Tenancy(settings.create_config(environ))
        await prepare(tenancy)
        async with tenancy:
            report = await check(app.create_app(tenancy), tenancy, public=["/healthz"], examples=examples)
            assert (report.findings, report.unreached) == ([], {}), str(report)
            assert await tenancy.tenants.count(status=("trial", "active", "suspended", "deleted")) == 0


async def test_the_team_notes_leak_nothing(postgres: Postgres) -> None:
    """Neither to keys nor to people: no route of the example answers anybody with another team's data."""
    from examples.team_notes import app, settings

    people = postgres.new_name()
    secret = secrets.token_hex(32)
    url = await postgres.create_database(people)

    async def logged_in(tenancy: Tenancy, tenant: Tenant) -> dict[str, str]:
        person = str(uuid4())
        await tenancy.members.add(tenant, person, ["owner"])
        session = {"person": person, "id": secrets.token_urlsafe(16), "at": datetime.now(UTC).timestamp()}
        signed = TimestampSigner(secret).sign(base64.b64encode(json.dumps(session).encode())).decode()
        return {"Cookie": f"__Host-session={signed}", "Origin": "http://testserver"}

    examples = {
        "POST /notes": lambda own: {"text": own.text()},
        "WEBSOCKET /live": lambda own: [own.text()],
        "POST /keys": lambda own: {"name": own.text()},
        "POST /invitations": lambda own: {"email": own.text("email"), "role": "reader"},
        "POST /me/teams": lambda own: {"slug": own.text()},
        "POST /signup": lambda own: {"email": own.text("email"), "password": own.text("password")},
    }
    async with installation(postgres) as environ:
        tenancy = Tenancy(settings.create_config(environ))
        own = settings.Settings(secret, secrets.token_hex(32), url.replace("postgresql://", "postgresql+asyncpg://"))
        await prepare(tenancy)
        try:
            for credentials in (None, logged_in):
                report = await check(
                    app.create_app(tenancy, own),
                    tenancy,
                    public=["/healthz", "/signup", "/login", "/webhooks/payments", "/p/*"],
                    examples=examples,
                    credentials=credentials,
                    beside_others=True,
                )
                assert report.leaks == [], str(report)
                # what is a person's own is served at any host and path
                assert all(one.path.startswith("/me/") for one in report.answered), str(report)
                unreached = set(report.unreached)
                assert unreached <= (FOR_PEOPLE if credentials is None else {"POST /me/invitations"}), str(report)
        finally:
            await postgres.drop_database(people)
