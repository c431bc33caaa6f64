"""``GET /export``: the bound tenant's data alone, one at a time, and never half of it unnoticed."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Message

from tenancy_orm import Tenancy
from tenancy_orm.asgi import ExportEndpoint, TenancyMiddleware
from tenancy_orm.config import ExportConfig
from tenancy_orm.errors import CrossTenantError, ExportError
from tenancy_orm.exports import manager
from tenancy_orm.operations import Operations
from tests.integration.exports.conftest import Execute
from tests.support.asgi import http_scope, serve
from tests.support.waiting import until

TABLES = """
CREATE TABLE people (id int PRIMARY KEY, name text);
GRANT SELECT ON people TO PUBLIC;
INSERT INTO people SELECT n, 'of ' || current_database() FROM generate_series(1, 3) n;
"""


def application(tenancy: Tenancy, **options: Any) -> Starlette:
    """An application as the page shows it."""
    return Starlette(
        routes=[Route("/export", ExportEndpoint(**options))],
        middleware=[Middleware(TenancyMiddleware, tenancy=tenancy)],
    )


@asynccontextmanager
async def client(tenancy: Tenancy, key: str, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of that application, over a real socket."""
    async with (
        serve(application(tenancy, **options)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": key}, timeout=60) as http,
    ):
        yield http


async def key_of(tenancy: Tenancy, slug: str, *scopes: str) -> str:
    """A key with scopes."""
    return (await tenancy.keys.issue(slug, scopes=list(scopes or ("export",)))).text


def read(archive: zipfile.ZipFile, path: str) -> list[Any]:
    return [json.loads(line) for line in archive.read(path).splitlines()]


async def test_a_tenant_fetches_its_own_data(tenancy: Tenancy, execute: Execute) -> None:
    """As a ZIP file with a name; other scopes, methods and formats are refused before anything is read."""
    acme, globex = [(await tenancy.tenants.create(slug)).tenant for slug in ("acme", "globex")]
    for tenant in (acme, globex):
        await execute(tenant, TABLES)
    assert acme.placement is not None
    async with client(tenancy, await key_of(tenancy, "acme"), exclude=["people:id"]) as http:
        answer = await http.get("/export")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/zip")
        assert answer.headers["content-disposition"].startswith('attachment; filename="acme-2')
        assert answer.headers["cache-control"] == "no-store"
        archive = zipfile.ZipFile(io.BytesIO(answer.content))
        assert archive.testzip() is None
        assert read(archive, "data/public.people.jsonl") == [{"name": f"of {acme.placement.database}"}] * 3
        assert json.loads(archive.read("manifest.json"))["tenant"]["slug"] == "acme"
        csv = zipfile.ZipFile(io.BytesIO((await http.get("/export?format=csv")).content))
        assert csv.read("data/public.people.csv").splitlines()[0] == b"name"
        assert (await http.get("/export?format=xml")).json()["detail"] == "format is one of jsonl, csv"
        assert (await http.post("/export")).status_code == 405
        refused = await http.get("/export", headers={"X-API-Key": await key_of(tenancy, "acme", "notes:read")})
        assert (refused.status_code, refused.json()["scope"]) == (403, "export")
        assert (await http.get("/export", headers={"X-API-Key": ""})).status_code == 401
    entries = await tenancy.audit.events(tenant=acme, action="tenant.export")
    assert [entry.actor.kind for entry in entries] == ["key", "key"]
    assert await tenancy.audit.events(tenant=globex, action="tenant.export") == []
    async with tenancy.scope("acme"):
        with pytest.raises(CrossTenantError):
            async with tenancy.exports.open("globex"):
                pass


async def test_rows_that_a_policy_hides_are_never_left_out_in_silence(tenancy: Tenancy, execute: Execute) -> None:
    acme = (await tenancy.tenants.create("acme")).tenant
    await execute(
        acme,
        TABLES + "ALTER TABLE people ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON people USING (id = 1);"
        "CREATE TABLE inner_log (n int); REVOKE ALL ON inner_log FROM PUBLIC",
    )
    # what it would read, if nothing refused it
    assert await tenancy.fetch_value("SELECT count(*) FROM people", tenant="acme") == 1
    with pytest.raises(ExportError, match=r"row security hides rows of public\.people"):
        async with tenancy.exports.open("acme"):
            pass
    async with tenancy.exports.open("acme", exclude=["people"]) as export:
        assert "people" not in str([table.path for table in export.plan.tables])
    (opened, refused) = await Operations(tenancy.internals.control).list(tenant_id=acme.id)
    assert (opened.state, refused.state) == ("done", "failed")


Sent = list[Message]


class Held:
    """A request to the application itself, with a client that reads nothing until it is let go."""

    def __init__(self, tenancy: Tenancy, key: str) -> None:
        self.sent: Sent = []
        self.go_on, self.leave = asyncio.Event(), asyncio.Event()
        self._received = False
        self._app = application(tenancy)
        self.task = asyncio.ensure_future(
            self._app(http_scope("/export", [("X-API-Key", key)]), self._receive, self._send)
        )

    async def _receive(self) -> Message:
        if self._received:
            await self.leave.wait()
            return {"type": "http.disconnect"}
        self._received = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        if len(self.sent) > 1:
            await self.go_on.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])


async def test_one_export_at_a_time_and_a_client_that_leaves_ends_it(tenancy: Tenancy, execute: Execute) -> None:
    acme = (await tenancy.tenants.create("acme")).tenant
    await execute(acme, TABLES)
    key = await key_of(tenancy, "acme")
    first = Held(tenancy, key)
    await until(lambda: len(first.sent) > 1)
    second = Held(tenancy, key)
    second.go_on.set()
    await second.task
    assert second.sent[0]["status"] == 409
    assert (b"retry-after", b"30") in second.sent[0]["headers"]
    first.leave.set()
    with pytest.raises(ClientDisconnect):
        await first.task
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(io.BytesIO(first.body))
    third = Held(tenancy, key)
    third.go_on.set()
    await third.task
    assert zipfile.ZipFile(io.BytesIO(third.body)).testzip() is None
    assert third.sent[-1] == {"type": "http.response.body", "body": b""}
    found = await Operations(tenancy.internals.control).list(tenant_id=acme.id)
    assert [one.state for one in found] == ["done", "failed", "failed"]
    assert tenancy.internals.router.statistics().servers["default"].in_use == 0


async def test_a_client_that_reads_nothing_and_one_that_takes_too_long_are_cut_off(
    tenancy: Tenancy, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = (await tenancy.tenants.create("acme")).tenant
    await execute(acme, TABLES)
    key = await key_of(tenancy, "acme")

    async def cut(config: ExportConfig, message: str) -> None:
        monkeypatch.setattr(tenancy._lifetime.assembly, "config", tenancy.config.replace(export=config))
        held = Held(tenancy, key)
        with pytest.raises(ExportError, match=message):
            await held.task
        assert held.sent[-1]["more_body"] is True  # the body has no end

    await cut(ExportConfig(stall_timeout=0.1), "the client has read nothing for 0.1 s")
    await cut(ExportConfig(request_timeout=0.5), "it took longer than 0.5 s")


async def test_a_tenant_cannot_fill_the_memory_with_files(
    tenancy: Tenancy, execute: Execute, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Empty large objects cost it nothing, and each takes memory; an operator's export has them all."""
    monkeypatch.setattr(manager, "_MOST_FILES", 3)
    acme = (await tenancy.tenants.create("acme")).tenant
    await execute(
        acme,
        "CREATE TABLE files (content text); GRANT SELECT ON files TO PUBLIC;"
        "INSERT INTO files SELECT repeat('x', 1100000) FROM generate_series(1, 4)",
    )

    async def write(data: bytes) -> None:
        pass

    async with tenancy.exports.open("acme") as export:
        with pytest.raises(ExportError, match="has more than 3 large values"):
            await export.write_to(write)
    async with tenancy.exports.open("acme", exclude=["files"]) as export:
        await export.write_to(write)
    await tenancy.execute("SELECT lo_create(0) FROM generate_series(1, 4)", tenant="acme")
    with pytest.raises(ExportError, match="an operator can export it"):
        async with tenancy.exports.open("acme", exclude=["files"]):
            pass
    report = await tenancy.exports.write("acme", tmp_path / "acme.zip")
    with zipfile.ZipFile(tmp_path / "acme.zip") as archive:
        large = [name for name in archive.namelist() if name.startswith(("large-objects/", "values/"))]
    assert len(large) == 8 and report.left_out == ()


async def test_a_failure_in_mid_stream_is_seen_by_the_client(tenancy: Tenancy, execute: Execute) -> None:
    """PostgreSQL refuses a row after others were sent: the connection is cut, and the file does not open."""
    acme = (await tenancy.tenants.create("acme")).tenant
    await execute(
        acme,
        """
        CREATE TYPE mood AS ENUM ('glad', 'sad');
        CREATE FUNCTION mood_json(mood) RETURNS json LANGUAGE plpgsql AS $$ BEGIN
          IF $1 = 'sad' THEN RAISE EXCEPTION 'cannot be written'; END IF; RETURN '"glad"'; END $$;
        GRANT EXECUTE ON FUNCTION mood_json TO PUBLIC;
        CREATE CAST (mood AS json) WITH FUNCTION mood_json(mood);
        CREATE TABLE moods (m mood);
        GRANT SELECT ON moods TO PUBLIC;
        INSERT INTO moods SELECT 'glad' FROM generate_series(1, 1000);
        INSERT INTO moods VALUES ('sad');
        """,
    )
    async with client(tenancy, await key_of(tenancy, "acme")) as http:
        body = b""
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
            async with http.stream("GET", "/export") as answer:
                assert answer.status_code == 200
                async for piece in answer.aiter_bytes():
                    body += piece
    assert body.startswith(b"PK")
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(io.BytesIO(body))
    (operation,) = await Operations(tenancy.internals.control).list(tenant_id=acme.id)
    assert operation.state == "failed"
    assert "cannot be written" in str(operation.error)
