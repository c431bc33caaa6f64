"""The notes of a team: for its members and programs, and those that it has published for everybody."""

from __future__ import annotations

from html import escape

from sqlalchemy import select
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tenancy_orm import current_tenant
from tenancy_orm.asgi import demand_scopes, require_scope

from .login import tenancy_of
from .models import Note
from .requests import read_fields


@require_scope("notes:read")
async def read(request: Request) -> Response:
    async with tenancy_of(request).session() as session:  # the database of the request's team
        found = await session.scalars(select(Note).order_by(Note.id))
        return JSONResponse([{"text": note.text, "author": note.author, "published": note.published} for note in found])


async def write(request: Request) -> Response:
    credential = demand_scopes(request, "notes:write")
    fields = await read_fields(request, "text", optional=["published"])
    async with tenancy_of(request).transaction() as session:
        published = fields.get("published") == "yes"
        session.add(Note(text=fields["text"], author=credential.subject, published=published))
    return Response(status_code=201)


async def live(websocket: WebSocket) -> None:
    """Write a note with each message. The middleware closes it when the person logs out or is removed."""
    credential = demand_scopes(websocket, "notes:write")
    await websocket.accept()
    async for text in websocket.iter_text():
        async with tenancy_of(websocket).transaction() as session:
            session.add(Note(text=text, author=credential.subject))
        await websocket.send_text("saved")


async def board(request: Request) -> Response:
    """A page for everybody. Its visitor has no scopes, so the query itself says what everybody may see."""
    async with tenancy_of(request).session() as session:
        found = await session.scalars(select(Note.text).where(Note.published).order_by(Note.id))
        items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return HTMLResponse(f"<h1>{escape(current_tenant().slug)}</h1><ul>{items}</ul>")


routes = [
    Route("/notes", read, methods=["GET"]),
    Route("/notes", write, methods=["POST"]),
    WebSocketRoute("/live", live),
    Route("/p/board", board, methods=["GET"]),
]
