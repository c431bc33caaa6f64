"""The id of a request: where it comes from, where it goes, and that it says nothing else."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from uuid import UUID

import pytest
from starlette.types import Receive, Scope, Send

from tenancy_orm import current_request_id
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.correlation import current_labels, log_fields
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.telemetry import TenantLogFilter
from tests.support.asgi import MemoryTenancy, Wire, messages, request, serve, websocket_scope

KEY = ("X-API-Key", "key-acme")


class Application:
    """Answers with what its logs would have, and an id of its own making that must not confuse anyone."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if self.error is not None:
            raise self.error
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept", "headers": [(b"x-seen", str(current_request_id()).encode())]})
            return
        seen = str(log_fields()).encode()
        headers = [(b"X-Request-Id", b"of the application"), (b"x-seen", str(current_request_id()).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": seen})


@pytest.fixture
def tenancy() -> MemoryTenancy:
    """With one tenant."""
    made = MemoryTenancy()
    made.add("acme")
    return made


def guarded(tenancy: MemoryTenancy, app: Any = None, **options: Any) -> TenancyMiddleware:
    return TenancyMiddleware(app or Application(), tenancy=tenancy.as_tenancy(), **{"request_id": True, **options})


async def test_an_id_that_was_sent_is_kept_and_sent_back(tenancy: MemoryTenancy) -> None:
    """Once, also where the application sets one; and it is gone with the request."""
    answer = await request(guarded(tenancy), headers=[KEY, ("X-Request-ID", "edge-1:a/b")])
    assert answer.header("x-request-id") == answer.header("x-seen") == "edge-1:a/b"
    assert "'acme'" in answer.body.decode() and "edge-1:a/b" in answer.body.decode()
    assert current_labels() is None


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [""],
        ["x" * 129],
        ["a b"],
        ['a"b'],
        ["a\tb"],
        ["a{b}"],
        ["a%(b)s"],
        ["-a"],
        ["a,b"],
        ["\xe4"],
        ["one", "two"],
        ["one", "one"],
    ],
)
async def test_an_id_that_could_forge_a_log_is_replaced(tenancy: MemoryTenancy, sent: list[str]) -> None:
    """By a random UUID, as where none or several were sent."""
    answer = await request(guarded(tenancy), headers=[KEY, *(("X-Request-ID", value) for value in sent)])
    made = answer.header("x-request-id")
    assert made is not None and made not in sent
    assert UUID(made).version == 4 and UUID(made).variant == "specified in RFC 4122" and len(made) == 32
    other = await request(guarded(tenancy), headers=[KEY])
    assert other.header("x-request-id") != made


async def test_ids_that_were_sent_can_be_ignored(tenancy: MemoryTenancy) -> None:
    """Where the application faces the world itself; and without the option there are none."""
    sent = [KEY, ("X-Request-ID", "edge-1")]
    assert (await request(guarded(tenancy, request_id="new"), headers=sent)).header("x-seen") != "edge-1"
    without = await request(guarded(tenancy, request_id=False), headers=sent)
    assert (without.header("x-seen"), without.header("x-request-id")) == ("None", "of the application")
    with pytest.raises(ConfigurationError, match="request_id"):
        guarded(tenancy, request_id="yes")


async def test_a_refusal_names_the_request(tenancy: MemoryTenancy) -> None:
    """In the document and in the header; also of a handshake, and for a path without a credential."""
    app = guarded(tenancy)
    answer = await request(app, headers=[("X-Request-ID", "edge-1")])
    assert (answer.status, answer.header("x-request-id"), answer.json()["request_id"]) == (401, "edge-1", "edge-1")
    assert "request_id" not in (await request(guarded(tenancy, request_id=False))).json()
    extensions: dict[str, Any] = {"extensions": {"websocket.http.response": {}}}
    start, _ = await messages(app, websocket_scope(headers=[("X-Request-ID", "edge-2")], **extensions))
    assert (b"x-request-id", b"edge-2") in start["headers"]
    opened, *_ = await messages(app, websocket_scope(headers=[KEY, ("X-Request-ID", "edge-3")]))
    assert opened["headers"] == [(b"x-seen", b"edge-3")]
    assert (await request(app, "/healthz", [("X-Request-ID", "edge-4")])).header("x-seen") == "edge-4"


async def test_requests_at_once_do_not_mix(tenancy: MemoryTenancy) -> None:
    """Each has its own, in its tasks as well."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0)
        inner = await asyncio.create_task(asyncio.to_thread(current_request_id))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-seen", str(inner).encode())]})
        await send({"type": "http.response.body"})

    guard = guarded(tenancy, app)
    answers = await asyncio.gather(*(request(guard, headers=[KEY, ("X-Request-ID", f"r{n}")]) for n in range(8)))
    assert [answer.header("x-seen") for answer in answers] == [f"r{n}" for n in range(8)]


class Records(logging.Handler):
    """Keeps what it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(tenant_id)s|%(tenant)s|%(request_id)s|%(name)s"))
        self.addFilter(TenantLogFilter())

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(self.format(record))


async def test_the_server_s_own_logs_name_tenant_and_request(tenancy: MemoryTenancy) -> None:
    """The access log, which is written while nobody is bound; and the error that the application raised, after it."""
    records = Records()
    app = Application()
    access, errors = logging.getLogger("uvicorn.access"), logging.getLogger("uvicorn.error")
    level = access.level
    access.addHandler(records)
    errors.addHandler(records)
    access.setLevel(logging.INFO)
    try:
        async with serve(guarded(tenancy, app), access_log=True) as port, Wire.to(port) as wire:
            await wire.request("/", [KEY, ("X-Request-ID", "edge-1")])
            app.error = ZeroDivisionError()
            await wire.request("/", [KEY, ("X-Request-ID", "edge-2")])
        async with serve(guarded(tenancy, app, request_id=False), access_log=True) as port, Wire.to(port) as wire:
            app.error = None
            await wire.request("/", [KEY, ("X-Request-ID", "edge-3")])
    finally:
        access.removeHandler(records)
        errors.removeHandler(records)
        access.setLevel(level)
    lines = [line for line in records.lines if "uvicorn.access" in line or "edge" in line]
    acme = f"{UUID(int=1)}|acme"
    assert [line for line in lines if "access" in line] == [
        f"{acme}|edge-1|uvicorn.access",
        # the server's own answer to an error, after the request; the record of the error names it
        "|||uvicorn.access",
        "|||uvicorn.access",
    ]
    assert any(line.startswith(f"{acme}|edge-2|uvicorn.error\nTraceback") for line in lines)


async def test_an_error_says_which_request_it_ended(tenancy: MemoryTenancy) -> None:
    """Also one of this package that has no answer, and one that takes no attribute is left as it is."""

    class Slotted(BaseException):
        __slots__ = ()

        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    app = Application()
    for error in (ZeroDivisionError(), ConfigurationError("x"), Slotted()):
        app.error = error  # type: ignore[assignment]
        with pytest.raises(type(error)):
            await request(guarded(tenancy, app), headers=[KEY, ("X-Request-ID", "edge-1")])
        record = logging.makeLogRecord({"exc_info": (type(error), error, None)})
        TenantLogFilter("-").filter(record)
        assert (record.tenant, record.request_id) == (  # type: ignore[attr-defined]
            ("-", "-") if isinstance(error, Slotted) else ("acme", "edge-1")
        )
