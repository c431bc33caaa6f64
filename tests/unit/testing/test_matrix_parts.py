"""The parts of the tenancy matrix that need no database: routes, values, and what an answer shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from fastapi import APIRouter, FastAPI
from litestar import Litestar, get, post, websocket
from litestar.params import FromPath, JSONBody
from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute

from tenancy_orm.testing._matrix_report import Finding, Report
from tenancy_orm.testing._matrix_routes import inner_path, key_header_of, resolvers_of, routes_of
from tenancy_orm.testing._matrix_values import Owned, body_of, made_up, singular


async def endpoint(*_: Any) -> None: ...


class Both(HTTPEndpoint):
    async def get(self, request: Any) -> None: ...

    async def delete(self, request: Any) -> None: ...


class Given(BaseModel):
    name: str = Field(max_length=100, min_length=3)
    note_id: int
    kind: str = Field("a", pattern="^[ab]$")
    parts: list[Given] = []


def names(app: Any) -> set[str]:
    """Its routes, without those of OpenAPI documents."""
    return {
        f"{route}@{route.host}" if route.host else str(route) for route in routes_of(app) if "doc" not in route.path
    }


def test_routes_of_starlette_are_found_wherever_they_are() -> None:
    """In routers, mounted applications behind middleware, hosts, and classes; an application without routes is one."""
    inner = Starlette(routes=[Route("/deep/{id:int}", endpoint, methods=["PUT"]), WebSocketRoute("/live", endpoint)])
    app = GZipMiddleware(
        Starlette(
            routes=[
                Route("/", endpoint),
                Route("/both/{key}", Both),
                Mount("/of/{team}", app=GZipMiddleware(inner)),
                Mount("/router", routes=[Mount("/again", app=Router([Route("/x", endpoint, methods=["POST"])]))]),
                Host("{team}.example.com", app=inner),
                Mount("/files", app=endpoint),
            ]
        )
    )
    assert names(app) == {
        *("GET /", "HEAD /", "GET /both/{key}", "HEAD /both/{key}", "DELETE /both/{key}"),
        *("PUT /of/{team}/deep/{id}", "WEBSOCKET /of/{team}/live", "POST /router/again/x", "GET /files/{path}"),
        *("PUT /deep/{id}@{team}.example.com", "WEBSOCKET /live@{team}.example.com"),
    }
    deep = next(route for route in routes_of(app) if route.path == "/of/{team}/deep/{id}")
    assert deep.parameters == {"team": "str", "id": "int"}
    assert deep.fill({"team": "a", "id": 7}) == "/of/a/deep/7"
    assert (resolvers_of(app), key_header_of(app)) == ((), ("X-API-Key", ""))


def test_fastapi_and_litestar_say_what_their_routes_take() -> None:
    """Included routers have the paths of the application; parameters and bodies are those of the document."""
    api, router, inner = FastAPI(), APIRouter(prefix="/v1"), APIRouter(prefix="/notes")

    @inner.post("/{note_id}", response_model=None)
    async def write(note_id: UUID, given: Given, limit: int = 1) -> None: ...

    @inner.websocket("/live")
    async def live() -> None: ...

    router.include_router(inner)
    api.include_router(router, prefix="/api")
    assert names(api) >= {"POST /api/v1/notes/{note_id}", "WEBSOCKET /api/v1/notes/live"}
    found = next(route for route in routes_of(api) if route.method == "POST")
    assert found.body is not None
    assert set(found.query) == {"limit"}

    owned = Owned("owner", uuid4())
    owned.known.add("notes", "id", 1_234_567)
    body = Given.model_validate(body_of(found.body, owned, owned, all_fields=True, noun="notes"))
    assert body.note_id == 1_234_567
    assert owned.mark in body.name

    @get("/notes/{note_id:int}")
    async def read(note_id: FromPath[int]) -> None: ...

    @post("/notes")
    async def create(data: JSONBody[Given]) -> None: ...

    @websocket("/live")
    async def socket(socket: Any) -> None: ...

    lite = Litestar([read, create])
    assert names(lite) >= {"GET /notes/{note_id}", "POST /notes"}
    assert next(route for route in routes_of(lite) if str(route) == "GET /notes/{note_id}").parameters == {
        "note_id": "int"
    }
    assert next(route for route in routes_of(lite) if str(route) == "POST /notes").body


def test_pages_of_documentation_are_not_the_applications_own() -> None:
    """FastAPI's are walked, and neither counted nor reported where they answer everybody."""
    app = FastAPI()
    app.get("/notes")(endpoint)
    assert {route.path for route in routes_of(app) if not route.is_provided} == {"/notes"}
    assert {route.path for route in routes_of(app) if route.is_provided} >= {"/docs", "/redoc", "/openapi.json"}


def test_an_answer_shows_what_the_caller_has_not_sent() -> None:
    """Neither what it repeats, nor what both tenants have, nor a number within a longer one is evidence."""
    owner, other = Owned("owner-1", uuid4()), Owned("other-1", uuid4())
    text, file = owner.text(), str(uuid4())
    owner.claim(text, "notes.text")
    owner.claim(1_234_567, "notes.id")
    owner.learn({"items": [{"file_id": file, "state": "waiting for it"}]}, "files", label="GET /files")
    other.learn({"items": [{"state": "waiting for it"}]}, "files", label="GET /files")
    owner.assign(other)
    assert owner.shown_in(f'["{text}"]') == ("notes.text",)
    assert owner.shown_in(f"no {text}", sent=f"/notes/{text}") == ()
    assert owner.shown_in("[1234567]") == ("notes.id",)
    assert owner.shown_in("[91234567, 12345678]") == ()
    assert owner.shown_in(file) == ("file.file_id of GET /files",)
    assert owner.shown_in("waiting for it") == ()
    assert owner.shown_in(owner.text()) == ("a text that only it has",)
    owner.spend(file)
    assert owner.shown_in(file) == ()
    assert owner.known.candidates("file_id", None, kind="uuid") == [file]
    with pytest.raises(LookupError, match="no id of 'orders' is known, only of file"):
        owner.id("orders")


def test_what_is_made_up_is_like_what_it_stands_for() -> None:
    """A UUID for a UUID, a number for a number; one of each noun; and a path without the tenant."""
    assert UUID(made_up(uuid4())).version == 4
    assert isinstance(made_up("17"), int)
    assert [singular(noun) for noun in ("notes", "companies", "boxes", "address")] == [
        "note",
        "company",
        "box",
        "address",
    ]
    assert inner_path("/t/acme/x", ()) == "/t/acme/x"


def test_the_report_names_each_leak_once_with_its_remedy() -> None:
    """Several names of one kind are one entry; what is not proven is said."""
    leak = Finding("GET", "/a", "/a?x=1", 200, "another tenant's key", "query x", "data", ("notes.text",))
    again = Finding("GET", "/a", "/a", 200, "another tenant's key", "header X", "data", ("notes.id",))
    answered = Finding("GET", "/b", "/b", 200, "no key", "nothing", "answered")
    report = Report(3, 9, [leak, again, answered], {"GET /c": "404"}, ["GET /p"], {"odd": "no value is known"})
    text = str(report)
    assert "if it comes from a cache or a global" in replace(leak, named="path id {id}").remedy
    assert "GET /b answers, without the owner's data: 200" in text
    assert (report.leaks, report.answered) == ([leak, again], [answered])
    assert text.startswith("3 routes, 9 requests: 1 route leaks\n")
    assert text.count("GET /a shows the owner's data: 200") == 1
    assert "named query x; header X" in text
    assert "shown: notes.text, notes.id" in text
    assert text.count("remedy:") == 2
    assert all(part in text for part in ("GET /c: 404", "odd: no value is known", "public, and so not tried: GET /p"))
