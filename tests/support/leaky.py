"""An application with the mistakes that ``pytest --tenancy-matrix`` is there to find, beside routes without one.

None of them is one that the package refuses by itself: each works around what is bound, or keeps data elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any
from uuid import UUID, uuid4

from fastapi import APIRouter, FastAPI, Header, HTTPException, WebSocket
from pydantic import BaseModel
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.websockets import WebSocketDisconnect

from tenancy_orm import Tenancy, current_tenant
from tenancy_orm.asgi import HeaderResolver, TenancyMiddleware
from tenancy_orm.integrations.fastapi import CurrentTenant, TenantSession, TenantTransaction
from tests.support.models import Note

LEAKS = {
    # by the tenant in a path
    ("GET", "/x/tenants/{tenant}/notes"): "path tenant {tenant}",
    ("POST", "/x/tenants/{tenant}/notes"): "path tenant {tenant}",
    # by the object's id alone, in a store that all tenants share
    ("GET", "/files/{file_id}"): "path id {file_id}",
    ("DELETE", "/files/{file_id}"): "path id {file_id}",
    # by the tenant in a query, a header and a body
    ("GET", "/x/search"): "query tenant",
    ("GET", "/x/report"): "header x-tenant-id",
    ("POST", "/x/import"): "body tenant",
    # what all tenants share: a cache, and two globals
    ("GET", "/summary"): "nothing",
    ("GET", "/draft"): "nothing",
    ("GET", "/whoami"): "nothing, at the same time",
    # a websocket that says everything to everybody
    ("WEBSOCKET", "/feed"): "nothing",
    # in a mounted application without an OpenAPI document
    ("GET", "/inner/x/{slug}/notes"): "path tenant {slug}",
}
"""The routes that leak, and how the matrix says that the owner was named."""

SAFE = ("/notes", "/notes/{note_id}", "/healthz", "/inner/notes", "/live", "/drafts")


class NoteInput(BaseModel):
    body: str
    tags: list[str] = []


class Import(BaseModel):
    tenant: str
    body: str


def create_leaky(tenancy: Tenancy) -> FastAPI:
    """Return the application."""
    app = FastAPI(lifespan=tenancy.lifespan)
    app.add_middleware(
        TenancyMiddleware,
        tenancy=tenancy,
        resolvers=[HeaderResolver("X-Tenant")],
        exempt=["/healthz", "/docs", "/x/*", "/inner/x/*"],
    )
    _add_safe(app, tenancy)
    _add_named(app, tenancy)
    _add_shared(app, tenancy)
    return app


async def texts(tenancy: Tenancy, tenant: str | UUID | None) -> list[str]:
    async with tenancy.session(tenant) as session:
        return list(await session.scalars(select(Note.body).order_by(Note.id)))


def _add_safe(app: FastAPI, tenancy: Tenancy) -> None:
    router = APIRouter(prefix="/notes")

    @router.get("")
    async def notes(session: TenantSession) -> list[dict[str, Any]]:
        return [{"id": note.id, "body": note.body} for note in await session.scalars(select(Note))]

    @router.post("", status_code=201)
    async def write(session: TenantTransaction, given: NoteInput) -> dict[str, Any]:
        note = Note(body=given.body)
        session.add(note)
        await session.flush()
        return {"id": note.id}

    @router.get("/{note_id}")
    async def read(session: TenantSession, note_id: int) -> dict[str, Any]:
        if (note := await session.get(Note, note_id)) is None:
            raise HTTPException(404)
        return {"id": note.id, "body": note.body}

    @router.delete("/{note_id}", status_code=204)
    async def delete(session: TenantTransaction, note_id: int) -> None:
        if (note := await session.get(Note, note_id)) is None:
            raise HTTPException(404)
        await session.delete(note)

    @app.websocket("/live")
    async def live(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            async for _ in websocket.iter_text():
                await websocket.send_json(await texts(tenancy, None))
        except WebSocketDisconnect:
            pass

    @app.get("/healthz")
    async def health() -> str:
        return "ok"

    app.include_router(router)


def _add_named(app: FastAPI, tenancy: Tenancy) -> None:
    async def found(named: str) -> list[str]:
        if named not in {tenant.slug async for tenant in tenancy.tenants.iterate()}:
            raise HTTPException(404)
        return await texts(tenancy, named)

    @app.get("/x/tenants/{tenant}/notes")
    async def of_path(tenant: str) -> list[str]:
        return await found(tenant)

    @app.post("/x/tenants/{tenant}/notes", status_code=204)
    async def into_path(tenant: str, given: NoteInput) -> None:
        await found(tenant)
        async with tenancy.transaction(tenant) as session:
            session.add(Note(body=given.body))

    @app.get("/x/search")
    async def of_query(tenant: str = "") -> list[str]:
        return await found(tenant)

    @app.get("/x/report")
    async def of_header(x_tenant_id: Annotated[str, Header()] = "") -> list[str]:
        return await texts(tenancy, x_tenant_id) if len(x_tenant_id) == 36 else await found(x_tenant_id)

    @app.post("/x/import", status_code=204)
    async def of_body(given: Import) -> None:
        await found(given.tenant)
        async with tenancy.transaction(given.tenant) as session:
            session.add(Note(body=given.body))

    async def mounted(request: Request) -> Response:
        return JSONResponse(await found(request.path_params["slug"]))

    async def inside(request: Request) -> Response:
        return JSONResponse(await texts(tenancy, None))

    app.mount("/inner", Starlette(routes=[Route("/x/{slug}/notes", mounted), Route("/notes", inside)]))


def _add_shared(app: FastAPI, tenancy: Tenancy) -> None:
    files: dict[UUID, str] = {}
    cache: dict[str, list[str]] = {}
    state = {"draft": "", "slug": ""}
    sockets: set[WebSocket] = set()

    @app.post("/files", status_code=201)
    async def upload(given: NoteInput, tenant: CurrentTenant) -> dict[str, Any]:
        file_id = uuid4()
        files[file_id] = given.body
        return {"file_id": file_id}

    @app.get("/files/{file_id}")
    async def download(file_id: UUID, tenant: CurrentTenant) -> str:
        if file_id not in files:
            raise HTTPException(404)
        return files[file_id]

    @app.delete("/files/{file_id}", status_code=204)
    async def remove(file_id: UUID, tenant: CurrentTenant) -> None:
        if files.pop(file_id, None) is None:
            raise HTTPException(404)

    @app.get("/summary")
    async def summary(tenant: CurrentTenant) -> list[str]:
        if "summary" not in cache:
            cache["summary"] = await texts(tenancy, None)
        return cache["summary"]

    @app.post("/drafts")
    async def keep(given: NoteInput, tenant: CurrentTenant) -> None:
        state["draft"] = given.body

    @app.get("/draft")
    async def draft(tenant: CurrentTenant) -> str:
        return state["draft"]

    @app.get("/whoami")
    async def whoami(tenant: CurrentTenant) -> str:
        state["slug"] = current_tenant().slug
        await asyncio.sleep(0.01)  # a query, say
        return state["slug"]

    @app.websocket("/feed")
    async def feed(websocket: WebSocket) -> None:
        await websocket.accept()
        sockets.add(websocket)
        try:
            async for text in websocket.iter_text():
                for one in sockets:
                    await one.send_text(text)
        except WebSocketDisconnect:
            pass
        finally:
            sockets.discard(websocket)
