"""The dependencies for FastAPI, on a real PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Security, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.security import APIKeyCookie, APIKeyHeader, HTTPBearer
from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.types import Message

from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.context import current_tenant
from tenancy_orm.errors import ConfigurationError, ReadOnlyError
from tenancy_orm.integrations.fastapi import (
    CurrentCredential,
    CurrentTenancy,
    CurrentTenant,
    ReadSession,
    RequireScope,
    TenantReadSession,
    TenantSession,
    TenantTransaction,
    api_key_header,
    set_security_schemes,
)
from tenancy_orm.tenancy import Tenancy
from tenancy_orm.tenants.manager import CreatedTenant
from tests.support.asgi import http_scope, messages, request, websocket_scope
from tests.support.models import Note
from tests.support.shell import ROOT, environment, python_path

ENDED: list[str] = []


@pytest.fixture
async def acme(tenancy: Tenancy) -> CreatedTenant:
    """A tenant with a note."""
    created = await tenancy.tenants.create("acme")
    async with tenancy.transaction("acme") as session:
        session.add(Note(body="note of acme"))
    return created


@pytest.fixture
def app(tenancy: Tenancy) -> FastAPI:
    """Routes that use every dependency."""
    app = FastAPI()
    app.add_middleware(TenancyMiddleware, tenancy=tenancy, exempt=["/openapi.json", "/open", "/open/never"])
    add_routes(app)
    return app


async def generator() -> AsyncIterator[list[str]]:
    yield [current_tenant().slug]
    ENDED.append(current_tenant().slug)


def plain_generator() -> Iterator[list[str]]:
    yield [current_tenant().slug]
    ENDED.append(current_tenant().slug)


async def bodies(session: Any) -> list[str]:
    return [note.body for note in await session.scalars(select(Note).order_by(Note.id))]


def add_routes(app: FastAPI) -> None:
    @app.get("/notes")
    async def notes(session: TenantSession, tenant: CurrentTenant) -> dict[str, Any]:
        return {"tenant": tenant.slug, "notes": await bodies(session)}

    @app.post("/notes")
    async def create(session: TenantTransaction, body: str) -> dict[str, Any]:
        session.add(Note(body=body))
        await session.flush()
        return {"notes": await bodies(session)}

    @app.post("/uncommitted")
    async def uncommitted(session: TenantSession) -> None:
        session.add(Note(body="never"))
        await session.flush()

    @app.post("/reading")
    async def reading(session: TenantReadSession) -> dict[str, Any]:
        found = await bodies(session)
        with pytest.raises(DBAPIError, match="read-only"):
            await session.execute(insert(Note).values(body="never"))
        return {"notes": found}

    @app.post("/changing")
    async def changing(session: TenantReadSession) -> str:
        (await session.scalars(select(Note))).one().body = "never"
        return "changed"

    @app.get("/anywhere")
    async def anywhere(
        session: Annotated[AsyncSession, ReadSession(replica=True, max_staleness=5.0)],
        primary: Annotated[AsyncSession, ReadSession()],
    ) -> dict[str, Any]:
        found = await bodies(session)
        for one in (session, primary):
            with pytest.raises(DBAPIError, match="read-only"):
                await one.execute(insert(Note).values(body="never"))
        return {"notes": found}

    @app.post("/invalid")
    async def invalid(session: TenantTransaction) -> str:
        session.add(Note(body="x" * 2_000))
        return "committed"

    @app.get("/scoped", dependencies=[RequireScope("notes:read")])
    async def scoped(credential: Annotated[Credential, RequireScope("notes:write")]) -> str:
        return credential.id

    @app.get("/credential")
    async def credential(credential: CurrentCredential) -> str:
        return credential.id

    @app.get("/open")
    async def open_(tenancy: CurrentTenancy) -> bool:
        return tenancy.is_open

    @app.get("/open/never")
    async def mistaken(session: TenantSession) -> None: ...

    @app.get("/plain")
    def plain(tenant: CurrentTenant) -> list[str]:
        return [tenant.slug, current_tenant().slug]

    @app.get("/generators")
    async def generators(
        a: Annotated[list[str], Depends(generator)],
        b: Annotated[list[str], Depends(plain_generator)],
        session: TenantSession,
    ) -> list[str]:
        return [*a, *b, current_tenant().slug, *await bodies(session)]

    @app.get("/stream")
    async def stream(tenancy: CurrentTenancy) -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            async with tenancy.session() as session:
                for body in await bodies(session):
                    yield body

        return StreamingResponse(chunks())

    @app.websocket("/chat")
    async def chat(websocket: WebSocket, session: TenantSession, tenant: CurrentTenant) -> None:
        await websocket.accept()
        await websocket.send_text(f"{tenant.slug}: {await bodies(session)}")
        await websocket.close()

    @app.websocket("/scoped-chat")
    async def scoped_chat(websocket: WebSocket, _: Annotated[Credential, RequireScope("chat")]) -> None:
        await websocket.accept()


async def ask(app: FastAPI, path: str, created: CreatedTenant, method: str = "GET", query: str = "") -> Any:
    return await request(app, path, [("X-API-Key", created.api_key)], method=method, query_string=query.encode())


async def test_the_session_is_on_the_tenants_database(app: FastAPI, tenancy: Tenancy, acme: CreatedTenant) -> None:
    """And the tenant is the key's."""
    globex = await tenancy.tenants.create("globex")
    assert (await ask(app, "/notes", acme)).json() == {"tenant": "acme", "notes": ["note of acme"]}
    assert (await ask(app, "/notes", globex)).json() == {"tenant": "globex", "notes": []}
    assert (await request(app, "/notes")).status == 401


async def test_a_transaction_is_committed_before_the_response(
    app: FastAPI, tenancy: Tenancy, acme: CreatedTenant
) -> None:
    """What a plain session leaves is rolled back."""
    seen: list[Any] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            seen.append(await tenancy.fetch_value("SELECT count(*) FROM notes", tenant="acme"))

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [("X-API-Key", acme.api_key)]
    await app(http_scope("/notes", headers, method="POST", query_string=b"body=written"), receive, send)
    assert seen == [2]
    assert (await ask(app, "/uncommitted", acme, "POST")).status == 200
    assert (await ask(app, "/notes", acme)).json()["notes"] == ["note of acme", "written"]


async def test_a_read_session_reads(app: FastAPI, acme: CreatedTenant) -> None:
    """PostgreSQL refuses what it would write."""
    assert (await ask(app, "/reading", acme, "POST")).json() == {"notes": ["note of acme"]}
    with pytest.raises(ReadOnlyError, match="a Note is to be written"):
        await ask(app, "/changing", acme, "POST")  # before anything was answered
    # where there is no replica, asking for one changes nothing; a bound is checked where the route is defined
    assert (await ask(app, "/anywhere", acme)).json() == {"notes": ["note of acme"]}
    for replica, bound in ((True, 0.0), (False, 5.0)):
        with pytest.raises(ConfigurationError, match="max_staleness"):
            ReadSession(replica=replica, max_staleness=bound)


async def test_a_commit_that_fails_fails_the_request(app: FastAPI, acme: CreatedTenant) -> None:
    """With the database's own error, before anything was answered."""
    with pytest.raises(Exception, match="too long"):
        await ask(app, "/invalid", acme, "POST")
    assert (await ask(app, "/notes", acme)).json()["notes"] == ["note of acme"]


async def test_scopes_add_up(app: FastAPI, tenancy: Tenancy, acme: CreatedTenant) -> None:
    """Those of the route and those of its parameters."""
    for scopes, status in ((["notes:read"], 403), (["notes:read", "notes:write"], 200), (["*"], 200), ([], 403)):
        issued = await tenancy.keys.issue("acme", name="key", scopes=scopes)
        answer = await request(app, "/scoped", [("X-API-Key", issued.text)])
        assert answer.status == status
        if status == 200:
            assert answer.json() == issued.key_id


async def test_generators_run_for_the_tenant_to_their_end(app: FastAPI, acme: CreatedTenant) -> None:
    """With and without async, and so do plain functions."""
    ENDED.clear()
    assert (await ask(app, "/generators", acme)).json() == ["acme", "acme", "acme", "note of acme"]
    assert ENDED == ["acme", "acme"]
    assert (await ask(app, "/plain", acme)).json() == ["acme", "acme"]
    assert (await ask(app, "/credential", acme)).json() == acme.key_id


async def test_a_streaming_response_has_its_tenant(app: FastAPI, acme: CreatedTenant) -> None:
    """It opens a session of its own, since those of the path operation are closed by then."""
    assert (await ask(app, "/stream", acme)).body == b"note of acme"


async def test_websockets_have_the_same_dependencies(app: FastAPI, acme: CreatedTenant) -> None:
    """And are refused before they are accepted."""
    headers = [("X-API-Key", acme.api_key)]
    connect = [{"type": "websocket.connect"}]
    sent = await messages(app, websocket_scope("/chat", headers), connect)
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.send", "websocket.close"]
    assert sent[1]["text"] == "acme: ['note of acme']"
    sent = await messages(app, websocket_scope("/scoped-chat", headers), connect)
    assert [message["type"] for message in sent] == ["websocket.close"]
    sent = await messages(app, websocket_scope("/chat"), connect)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_an_exempt_route_has_the_tenancy_alone(app: FastAPI) -> None:
    """And says 401 where it wants a tenant all the same."""
    assert (await request(app, "/open")).json() is True
    assert (await request(app, "/open/never")).status == 401


async def test_the_openapi_document_shows_the_key(app: FastAPI) -> None:
    """Where a route uses a dependency from here, with its scopes; either way of sending it."""
    document = (await request(app, "/openapi.json")).json()
    schemes = document["components"]["securitySchemes"]
    assert schemes["ApiKey"]["in"] == "header" and schemes["ApiKey"]["name"] == "X-API-Key"
    assert schemes["ApiKeyBearer"]["scheme"] == "bearer"
    operations = {path: next(iter(item.values())) for path, item in document["paths"].items()}
    names = [{name for entry in operations[path]["security"] for name in entry} for path in ("/notes", "/plain")]
    assert names == [{"ApiKey", "ApiKeyBearer"}] * 2
    assert "security" not in operations["/open"]


async def test_the_openapi_document_shows_what_the_application_accepts(app: FastAPI) -> None:
    """In place of the keys, with the scopes; what a route demands besides stays."""
    set_security_schemes(
        app,
        APIKeyCookie(name="__Host-session", scheme_name="Session"),
        HTTPBearer(bearerFormat="JWT", scheme_name="Token"),
    )
    own = APIKeyHeader(name="X-Admin", auto_error=False)

    @app.get("/later", dependencies=[RequireScope("notes:read"), Security(own)])
    async def later() -> None: ...

    for _ in range(2):
        document = (await request(app, "/openapi.json")).json()
        assert document["components"]["securitySchemes"] == {
            "Session": {"type": "apiKey", "in": "cookie", "name": "__Host-session"},
            "Token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
            "APIKeyHeader": {"type": "apiKey", "in": "header", "name": "X-Admin"},
        }
        operations = {path: next(iter(item.values())) for path, item in document["paths"].items()}
        assert operations["/notes"]["security"] == [{"Session": []}, {"Token": []}]
        scopes = ["notes:read"]
        assert operations["/later"]["security"] == [{"Session": scopes}, {"Token": scopes}, {"APIKeyHeader": []}]
        assert "security" not in operations["/open"]


async def test_keys_are_shown_beside_other_credentials(app: FastAPI) -> None:
    """Where they are named; an application that uses no dependency from here is left alone."""
    set_security_schemes(app, api_key_header, APIKeyCookie(name="__Host-session"))
    document = (await request(app, "/openapi.json")).json()
    assert set(document["components"]["securitySchemes"]) == {"ApiKey", "APIKeyCookie"}
    # a second call replaces the first
    set_security_schemes(app, HTTPBearer())
    assert set(app.openapi()["components"]["securitySchemes"]) == {"HTTPBearer"}
    bare = FastAPI()
    before = bare.openapi()
    set_security_schemes(bare, api_key_header)
    assert bare.openapi() == before


@pytest.mark.parametrize(
    "schemes", [(), (object(),), (APIKeyCookie,), (APIKeyCookie(name="a"), APIKeyCookie(name="b"))]
)
def test_what_is_no_scheme_is_refused(schemes: tuple[Any, ...]) -> None:
    """And two of one name, of which the document could show one alone."""
    with pytest.raises(ConfigurationError):
        set_security_schemes(FastAPI(), *schemes)


async def test_an_application_without_the_middleware_is_told(tenancy: Tenancy) -> None:
    """Instead of being answered 401."""
    app = FastAPI()
    add_routes(app)
    for path in ("/notes", "/credential", "/open"):
        with pytest.raises(ConfigurationError, match="TenancyMiddleware"):
            await request(app, path)


def test_a_scope_that_demands_nothing_is_refused() -> None:
    """When the route is made."""
    with pytest.raises(ConfigurationError):
        RequireScope()


def test_without_fastapi_the_extra_is_named() -> None:
    """And what to run."""
    code = "import sys; sys.modules['fastapi'] = None; import tenancy_orm.integrations.fastapi"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(PYTHONPATH=python_path(ROOT)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "MissingExtraError: fastapi is not installed; run: pip install 'tenancy-orm[fastapi]'" in done.stderr
