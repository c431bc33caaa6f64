"""A server with one connection, and a tenant with what its key has let in: all in memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.authentication.admission import CredentialState
from tenancy_orm.authentication.admissions import Admissions
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.context import current_tenant_or_none
from tenancy_orm.events import AdmissionEnded
from tenancy_orm.tenant import Tenant
from tests.support.asgi import MemoryTenancy, http_scope, websocket_scope
from tests.support.waiting import until

KEY = ("X-API-Key", "key-acme")


class Server:
    """A server with one connection. ``full``: its peer reads nothing, so that what is sent waits."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.sent: list[Message] = []
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.writable = asyncio.Event()
        self.writable.set()
        self.bound: list[Tenant | None] = []

    async def receive(self) -> Message:
        """What the peer sends."""
        self.bound.append(current_tenant_or_none())
        return await self.incoming.get()

    async def send(self, message: Message) -> None:
        """Keeps what the application sends."""
        self.bound.append(current_tenant_or_none())
        await self.writable.wait()
        self.sent.append(message)

    def serve(self, app: ASGIApp) -> asyncio.Task[None]:
        """Have an application serve the connection."""

        async def run() -> None:
            await app(self.scope, self.receive, self.send)

        return asyncio.create_task(run())

    def types(self) -> list[str]:
        """The types of what was sent."""
        return [message["type"] for message in self.sent]


class Tenants:
    """Acme, and what its key has let in."""

    def __init__(self) -> None:
        self.memory = MemoryTenancy()
        self.admissions = Admissions(self._look_up, is_listening=lambda: True, ttl=60.0, grace=300.0, clock=lambda: 0.0)
        self.acme = self.memory.add("acme")
        self.state: CredentialState | None = CredentialState("acmexxxxxxxxxxxx", self.acme, 0.0)
        self.admission = self.admissions.admit(self.state)
        bound = replace(self.acme, admission=self.admission)
        self.memory.directory.keys[KEY[1]] = Credential("key", "acmexxxxxxxxxxxx", bound=bound)
        self.events: list[AdmissionEnded] = []
        self.memory.events.subscribe(AdmissionEnded, self.events.append)

    async def _look_up(self, granted: CredentialState) -> CredentialState | None:
        return self.state

    def guard(self, app: ASGIApp, **options: Any) -> TenancyMiddleware:
        """The middleware before an application."""
        return TenancyMiddleware(app, tenancy=self.memory.as_tenancy(), **options)

    def revoke(self) -> None:
        """Have all that the key has let in end, soon."""
        self.state = None
        self.admissions.verify("acmexxxxxxxxxxxx")

    async def ended(self) -> None:
        """Wait until the shared admission has ended."""
        await until(lambda: self.admission.ended)


async def finish(task: asyncio.Task[None]) -> None:
    """Wait for an application's end."""
    await asyncio.wait_for(task, 10)


def websocket() -> Server:
    """A websocket that connects."""
    server = Server(websocket_scope(headers=[KEY]))
    server.incoming.put_nowait({"type": "websocket.connect"})
    return server


def stream() -> Server:
    """A request that is complete."""
    server = Server(http_scope(headers=[KEY]))
    server.incoming.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    return server


CLOSE = {"type": "websocket.close", "code": 4401, "reason": "credential no longer valid"}
