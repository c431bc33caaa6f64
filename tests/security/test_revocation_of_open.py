"""What a credential has opened ends with it: websockets, streaming responses, and the sessions of both, everywhere.

The connections are opened in a uvicorn of its own; what ends them is done here, in another process.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.authentication.admission import Admission
from tenancy_orm.context import bind
from tenancy_orm.errors import AdmissionEndedError, TenantSuspendedError
from tests.support.asgi import Wire
from tests.support.callers import EVERYONE, KINDS, Caller, Callers
from tests.support.lasting import ALONE
from tests.support.models import Note
from tests.support.proxy import proxied
from tests.support.served import uvicorn_command
from tests.support.waiting import until

DEADLINE = 10.0
WITHIN = 0.25
"""Seconds within which a change must be known everywhere."""

REVOKED, UNAVAILABLE = 4401, 4403
NOTES = ["note of acme"]


@dataclass
class Acme:
    """A tenant with one note, and a key that may do something from here."""

    tenancy: Tenancy
    config: TenancyConfig
    key: str
    key_id: str

    async def sql(self, statement: str) -> None:
        """Change the key's row, as an operator with psql might."""
        async with self.tenancy.internals.control.transaction() as connection:
            await connection.execute(text(statement), {"id": self.key_id})


@pytest.fixture
async def acme(tenancy: Tenancy, tenancy_config: TenancyConfig) -> Acme:
    """The tenant."""
    await tenancy.tenants.create("acme")
    issued = await tenancy.keys.issue("acme", scopes=["notes:read"])
    async with tenancy.transaction("acme") as session:
        session.add(Note(body=NOTES[0]))
    return Acme(tenancy, tenancy_config, issued.text, issued.key_id)


# --- clients --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def websocket(port: int, by: str | Caller, query: str = "", **headers: str) -> AsyncIterator[ClientConnection]:
    """Open a websocket that has read once; by a key, or another caller."""
    caller = Caller.with_key(by) if isinstance(by, str) else by
    more = [(name.replace("_", "-"), value) for name, value in headers.items()]
    async with caller.websocket(port, f"/ws{query}", *more) as opened:
        assert await read(opened) == NOTES
        yield opened


async def read(opened: ClientConnection) -> Any:
    """Have the application read, and return what it has read."""
    async with asyncio.timeout(DEADLINE):
        await opened.send("read")
        return json.loads(await opened.recv())


async def closed(opened: ClientConnection) -> tuple[int, str]:
    """The code and reason that the server closes with, when it does."""
    with pytest.raises(ConnectionClosed) as caught:
        async with asyncio.timeout(DEADLINE):
            while True:
                await opened.recv()
    assert caught.value.rcvd is not None, "the connection was lost without a close"
    return caught.value.rcvd.code, caught.value.rcvd.reason


@asynccontextmanager
async def stream(port: int, by: str | Caller, query: str = "") -> AsyncIterator[Wire]:
    """Open a streaming response, and read the beginning."""
    caller = Caller.with_key(by) if isinstance(by, str) else by
    async with Wire.to(port) as wire:
        wire.ask(caller.path(f"/stream{query}"), caller.headers)
        assert (await wire.head()).status == 200
        assert await chunk(wire) == [0, *NOTES]
        yield wire


async def chunk(wire: Wire) -> Any:
    """The next line of a stream; None at its proper end, an error where it is cut."""
    async with asyncio.timeout(DEADLINE):
        size = int((await wire._reader.readuntil(b"\r\n")).strip(), 16)
        body = (await wire._reader.readexactly(size + 2))[:-2]
    return json.loads(body) if size else None


async def cut(wire: Wire) -> None:
    """Wait until a stream is cut; it must not seem complete."""
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        while await chunk(wire) is not None:
            pass
        pytest.fail("the response was completed")


async def state(port: int) -> dict[str, Any]:
    """What the application says of itself."""
    async with Wire.to(port) as wire:
        found: dict[str, Any] = (await wire.request("/state")).json()
        return found


# --- what ends them -------------------------------------------------------------------------------------------------


async def revoke(acme: Acme) -> None:
    await acme.tenancy.keys.revoke(acme.key_id)


async def suspend(acme: Acme) -> None:
    await acme.tenancy.tenants.suspend("acme")


async def delete(acme: Acme) -> None:
    await acme.tenancy.tenants.delete("acme")


async def maintain(acme: Acme) -> None:
    await acme.tenancy.tenants.start_maintenance("acme")


async def expire(acme: Acme) -> None:
    await acme.sql("UPDATE tenancy.api_keys SET expires_at = now() + interval '300 ms' WHERE id = :id")


async def end_rotated(acme: Acme) -> None:
    await acme.tenancy.keys.rotate(acme.key_id, overlap=0)


async def take_scope(acme: Acme) -> None:
    await acme.sql("UPDATE tenancy.api_keys SET scopes = '{}' WHERE id = :id")


async def narrow(acme: Acme) -> None:
    await acme.sql("UPDATE tenancy.api_keys SET networks = '{192.0.2.0/24}' WHERE id = :id")


async def forget(acme: Acme) -> None:
    await acme.sql("DELETE FROM tenancy.api_keys WHERE id = :id")


async def activate(acme: Acme) -> None:
    await acme.tenancy.tenants.activate("acme")


async def end_maintenance(acme: Acme) -> None:
    await acme.tenancy.tenants.end_maintenance("acme")


ENDINGS = [
    (revoke, REVOKED, "revoked", None),
    (expire, REVOKED, "expired", None),
    (end_rotated, REVOKED, "expired", None),
    (take_scope, REVOKED, "scope", None),
    (narrow, REVOKED, "network", None),
    (forget, REVOKED, "unknown", None),
    (suspend, UNAVAILABLE, "suspended", activate),
    (maintain, UNAVAILABLE, "maintenance", end_maintenance),
    (delete, UNAVAILABLE, "deleted", None),
]
"""How a key ends, the code that websockets are closed with, the reason, and what undoes it for the next."""

REFUSALS = {
    "suspended": "TenantSuspendedError",
    "deleted": "TenantDeletedError",
    "maintenance": "TenantMaintenanceError",
}


async def test_what_is_open_ends(acme: Acme) -> None:
    """A middleware that never looks again lets all read on, where PostgreSQL does not refuse the tenant's role."""
    async with (
        uvicorn_command("tests.support.lasting:create_unwatched", acme.config) as old,
        uvicorn_command("tests.support.lasting:create_watched", acme.config) as new,
    ):
        for end, code, reason, undo in ENDINGS:
            issued = await acme.tenancy.keys.issue("acme", scopes=["notes:read"])
            before = await state(new)
            await check_ending(replace(acme, key=issued.text, key_id=issued.key_id), end, code, old, new)
            found = await state(new)
            if undo is not None:
                await undo(acme)

            expected = REFUSALS.get(reason, "AdmissionEndedError")
            now = Counter({(what, error): count for what, error, count in found["refused"]})
            now.subtract({(what, error): count for what, error, count in before["refused"]})
            refused = {what: error for (what, error), count in now.items() if count}
            kinds = ["stream", "stream", "websocket"]
            ended = found["ended"][len(before["ended"]) :]
            first = refused.pop("open session")
            if code == UNAVAILABLE:
                # PostgreSQL, or the tenant's status, may have been the first to refuse the session and the stream
                first, kinds = expected, sorted(kind for kind, *_ in ended)
                assert set(kinds) == {"stream", "websocket"}
            assert {first, *refused.values()} == {expected}, reason
            assert set(refused) == {"new session", "named session", "scope", "manager"}
            assert sorted(ended) == [[kind, reason, issued.key_id, "127.0.0.1"] for kind in kinds]


async def check_ending(acme: Acme, end: Callable[[Acme], Awaitable[None]], code: int, old: int, new: int) -> None:
    """Open connections with a key at the process that does not watch and at the one that does, and end the key."""
    async with (
        websocket(old, acme.key) as unwatched,
        stream(old, acme.key) as unwatched_stream,
        websocket(new, acme.key, "?work=1") as watched,
        stream(new, acme.key) as watched_stream,
        stream(new, acme.key, "?idle=1") as idle_stream,
    ):
        await end(acme)
        assert await closed(watched) == (
            code,
            "credential no longer valid" if code == REVOKED else "tenant not available",
        )
        await cut(watched_stream)
        await cut(idle_stream)
        await until(lambda: idle(new))
        if code == REVOKED:
            # not because the tenant could not be read any more
            assert await read(unwatched) == NOTES, "the attack must work"
            for _ in range(3):
                assert (await chunk(unwatched_stream))[1:] == NOTES


WAYS = [
    *((kind, Callers.revoke, "revoked") for kind in KINDS),
    *((kind, Callers.revoke_subject, "revoked") for kind in ("token", "member", "session")),
    ("member", Callers.remove, "revoked"),
    ("member", Callers.demote, "scope"),
    *((kind, Callers.wait, "expired") for kind in ("token", "cookie", "member", "session")),
]
"""By which kind of credential, how it ends, and the reason."""


async def test_what_is_open_ends_whatever_opened_it(acme: Acme) -> None:
    """Every way in which tokens, sessions and memberships end; and the tenant's suspension for all, visitors too."""
    callers = Callers(acme.tenancy)
    async with (
        uvicorn_command("tests.support.lasting:create_unwatched", acme.config) as old,
        uvicorn_command("tests.support.lasting:create_watched", acme.config) as new,
        AsyncExitStack() as stack,
    ):
        opened = []
        for kind, end, reason in WAYS:
            caller = await callers.make(kind, "acme", expires=3.0 if end is Callers.wait else 600.0)
            unwatched, watched = [await stack.enter_async_context(websocket(port, caller)) for port in (old, new)]
            streaming = await stack.enter_async_context(stream(new, caller))
            opened.append((caller, end, reason, unwatched, watched, streaming))
        others = [await callers.make(kind, "acme") for kind in EVERYONE]
        lasting = [
            (
                await stack.enter_async_context(websocket(new, caller)),
                await stack.enter_async_context(stream(new, caller)),
            )
            for caller in others
        ]
        for caller, end, reason, unwatched, watched, streaming in opened:
            await end(callers, caller)
            assert await closed(watched) == (REVOKED, "credential no longer valid"), (caller.kind, reason)
            await cut(streaming)
            assert await read(unwatched) == NOTES, "the attack must work"
        expected = [
            [what, reason, caller.id, "127.0.0.1"]
            for caller, _, reason, *_ in opened
            for what in ("stream", "websocket")
        ]
        assert sorted((await state(new))["ended"]) == sorted(expected)
        for socket, _ in lasting:
            assert await read(socket) == NOTES, "what is not concerned goes on"
        await suspend(acme)
        for caller, (socket, streaming) in zip(others, lasting, strict=True):
            assert await closed(socket) == (UNAVAILABLE, "tenant not available"), caller.kind
            await cut(streaming)
        await until(lambda: idle(new))


async def test_what_is_open_without_a_tenant_ends_too(acme: Acme) -> None:
    """On a path that binds none: with its token, its person, its time, or the key and its tenant; no membership."""
    callers = Callers(acme.tenancy)
    ways = [
        *((kind, Callers.revoke) for kind in KINDS),
        *((kind, Callers.revoke_subject) for kind in ("token", "member", "session")),
        *((kind, Callers.wait) for kind in ("token", "session")),
    ]
    async with (
        uvicorn_command("tests.support.lasting:create_watched", acme.config) as port,
        AsyncExitStack() as stack,
    ):
        person = await callers.make("member", "acme")
        lasting = await stack.enter_async_context(person.websocket(port, f"{ALONE}/ws"))
        await callers.remove(person)
        opened = []
        for kind, end in ways:
            caller = await callers.make(kind, "acme", expires=3.0 if end is Callers.wait else 600.0)
            socket = await stack.enter_async_context(caller.websocket(port, f"{ALONE}/ws"))
            await socket.send("1")
            assert await socket.recv() == "1"
            wire = await stack.enter_async_context(Wire.to(port))
            wire.ask(caller.path(f"{ALONE}/stream"), caller.headers)
            assert (await wire.head()).status == 200
            assert await chunk(wire) == 0
            opened.append((caller, end, socket, wire))
        for caller, end, socket, wire in opened:
            await end(callers, caller)
            assert await closed(socket) == (REVOKED, "credential no longer valid"), caller.kind
            await cut(wire)
        await lasting.send("2")
        assert await lasting.recv() == "2"
        await lasting.close()
        await until(lambda: idle(port))


async def idle(port: int) -> bool:
    """Whether nothing is left of what was open."""
    found = await state(port)
    return (found["watched"], found["tasks"]) == (0, 0)


async def test_a_websocket_is_closed_within_a_quarter_of_a_second(acme: Acme) -> None:
    """The fastest of a few, since others use this machine too."""
    callers = Callers(acme.tenancy)
    ways = [
        ("key", Callers.revoke),
        ("token", Callers.revoke),
        ("session", Callers.revoke_subject),
        ("member", Callers.remove),
    ]
    async with uvicorn_command("tests.support.lasting:create_watched", acme.config) as port:
        for kind, end in ways:
            taken = []
            for _ in range(5):
                caller = await callers.make(kind, "acme")
                async with websocket(port, caller) as opened:
                    await end(callers, caller)
                    ended = asyncio.get_running_loop().time()
                    assert (await closed(opened))[0] == REVOKED
                    taken.append(asyncio.get_running_loop().time() - ended)
            assert min(taken) < WITHIN, kind


async def test_every_process_ends_what_it_has_open(acme: Acme) -> None:
    """Those that serve it elsewhere too, and none admits it again."""
    callers = Callers(acme.tenancy)
    async with (
        uvicorn_command("tests.support.lasting:create_watched", acme.config) as first,
        uvicorn_command("tests.support.lasting:create_watched", acme.config) as second,
    ):
        for kind in KINDS:
            caller = await callers.make(kind, "acme")
            async with websocket(first, caller) as one, websocket(second, caller) as other:
                await callers.revoke(caller)
                assert [await closed(one), await closed(other)] == [(REVOKED, "credential no longer valid")] * 2
                for port in (first, second):
                    with pytest.raises(InvalidStatus, match="401"):
                        async with websocket(port, caller):
                            pass


async def test_a_key_ends_at_its_time(acme: Acme) -> None:
    """Nothing notifies that: a clock runs for what is open."""
    async with uvicorn_command("tests.support.lasting:create_watched", acme.config) as port:
        # once the program has started, which may take longer
        issued = await acme.tenancy.keys.issue("acme", expires_at=datetime.now(UTC) + timedelta(seconds=3))
        async with websocket(port, issued.text, "?work=1") as opened:
            assert (await closed(opened))[0] == REVOKED
        await until(lambda: idle(port))
        assert ["open session", "AdmissionEndedError", 1] in (await state(port))["refused"]


async def test_without_a_listener_what_is_open_ends_within_the_ttl(acme: Acme, control_url: str) -> None:
    """The listener is cut off for good."""
    callers = Callers(acme.tenancy)
    token, member = [await callers.make(kind, "acme") for kind in ("token", "member")]
    async with proxied(control_url) as proxy:
        config = acme.config.replace(directory={"ttl": 1.0}, control={"listen_url": proxy.url(control_url)})
        async with (
            uvicorn_command("tests.support.lasting:create_watched", config) as port,
            websocket(port, acme.key, "?work=1") as opened,
            stream(port, acme.key, "?idle=1") as streaming,
            websocket(port, token) as by_token,
            websocket(port, member) as by_member,
        ):
            proxy.refuse()
            await until(lambda: deaf(port))
            await revoke(acme)
            await callers.revoke(token)
            await callers.remove(member)
            for socket in (opened, by_token, by_member):
                assert (await closed(socket))[0] == REVOKED
            await cut(streaming)
            await until(lambda: idle(port))


async def test_without_the_control_database_what_is_open_ends_after_the_grace_time(
    acme: Acme, control_url: str
) -> None:
    """One process alone has lost it, so the key is revoked elsewhere; a long grace time lets it read on."""
    callers = Callers(acme.tenancy)
    member = await callers.make("member", "acme")
    async with proxied(control_url) as proxy:
        config = acme.config.replace(control_url=proxy.url(control_url), directory={"ttl": 1.0})
        async with (
            uvicorn_command(
                "tests.support.lasting:create_watched", config.replace(directory={"grace": 3_600.0})
            ) as old,
            uvicorn_command("tests.support.lasting:create_watched", config.replace(directory={"grace": 1.0})) as new,
            websocket(old, acme.key) as patient,
            websocket(new, acme.key) as watched,
            stream(new, acme.key, "?idle=1") as idle_stream,
            websocket(new, member) as by_member,
        ):
            proxy.refuse()
            await revoke(acme)
            await callers.remove(member)
            for socket in (watched, by_member):
                assert await closed(socket) == (REVOKED, "credential no longer valid")
            await cut(idle_stream)
            assert await read(patient) == NOTES, "the attack must work"
            await until(lambda: idle(new))
            assert {reason for _, reason, *_ in (await state(new))["ended"]} == {"unverified"}
            proxy.restore()
            assert (await closed(patient))[0] == REVOKED


async def test_a_stream_that_has_sent_nothing_yet_ends(acme: Acme) -> None:
    """It waits for its first event, with its headers sent; one that is never watched sends it."""
    async with (
        uvicorn_command("tests.support.lasting:create_unwatched", acme.config) as old,
        uvicorn_command("tests.support.lasting:create_watched", acme.config) as new,
        Wire.to(old) as unwatched,
        Wire.to(new) as watched,
    ):
        for wire in (unwatched, watched):
            wire.ask("/stream?silent=1", [("X-API-Key", acme.key)])
            assert (await wire.head()).status == 200
        await revoke(acme)
        await cut(watched)
        async with Wire.to(old) as wire:
            await wire.request("/state?speak=1")
        assert await chunk(unwatched) == [0, *NOTES], "the attack must work"


async def deaf(port: int) -> bool:
    """Whether the application gets no notifications."""
    return not (await state(port))["listening"]


async def test_an_open_session_is_refused_at_its_next_use(acme: Acme) -> None:
    """A statement, the next rows of a stream, and the commit of what was written before; and all is rolled back."""
    tenancy = acme.tenancy
    tenant = (await tenancy.internals.directory.authenticate(acme.key)).tenant
    counting = "SELECT count(*) FROM notes"
    with bind(replace(tenant, admission=None)):
        async with tenancy.session() as session:
            await revoke(acme)
            assert await session.scalar(text(counting)) == 1, "the attack must work"

    issued = await tenancy.keys.issue("acme")
    tenant = (await tenancy.internals.directory.authenticate(issued.text)).tenant
    with bind(tenant):
        lease = tenancy.quotas.leased(tenant, "api_calls")
        await lease.consume()
        async with tenancy.session() as session, tenancy.session() as writing, tenancy.session() as lent:
            driver = (await (await lent.connection()).get_raw_connection()).driver_connection
            assert driver is not None
            prepared = await driver.prepare(counting)
            assert await prepared.fetchval() == await driver.fetchval(counting) == 1
            rows = await session.stream(text("SELECT generate_series(1, 10000)"))
            assert await rows.fetchone() == (1,)
            await writing.execute(text("INSERT INTO notes (body) VALUES ('written before')"))
            await tenancy.keys.revoke(issued.key_id)
            await until(lambda: isinstance(tenant.admission, Admission) and tenant.admission.ended)
            with pytest.raises(AdmissionEndedError):
                await rows.fetchall()
            with pytest.raises(AdmissionEndedError):
                await session.execute(text(counting))
            with pytest.raises(AdmissionEndedError):
                await writing.commit()
            for use in (lambda: driver.fetchval(counting), prepared.fetchval, lambda: session.scalar(text(counting))):
                with pytest.raises(AdmissionEndedError):
                    await use()
            # lent to a task that is nobody's, it is still this request's
            for work in (lent.scalar(text(counting)), lent.commit()):
                with pytest.raises(AdmissionEndedError):
                    await asyncio.create_task(work, context=Context())
            with pytest.raises(AdmissionEndedError):
                lease.try_consume()
        for attempt in (
            tenancy.fetch_value(counting),
            tenancy.fetch_value(counting, tenant="acme"),
            tenancy.run(tenant, tenancy.fetch_value, counting),
            asyncio.create_task(tenancy.fetch_value(counting)),
            tenancy.quotas.usage("acme"),
            tenancy.keys.list("acme"),
            tenancy.keys.issue("acme"),
        ):
            with pytest.raises(AdmissionEndedError):
                await attempt
        outside = asyncio.create_task(tenancy.fetch_value(counting, tenant="acme"), context=Context())
        assert await outside == 1, "nothing was committed, and what has a context of its own goes on"


async def test_a_suspension_amid_a_session_is_told_as_one(acme: Acme) -> None:
    """PostgreSQL has ended the connection by then: giving that back must not replace the error."""
    tenancy = acme.tenancy
    tenant = (await tenancy.internals.directory.authenticate(acme.key)).tenant
    with bind(tenant), pytest.raises(TenantSuspendedError):
        async with tenancy.session() as session:
            await session.execute(text("INSERT INTO notes (body) VALUES ('never committed')"))
            driver = (await (await session.connection()).get_raw_connection()).driver_connection
            assert driver is not None
            await asyncio.create_task(suspend(acme), context=Context())
            await until(
                lambda: driver.is_closed() and isinstance(tenant.admission, Admission) and tenant.admission.ended
            )
            await session.execute(text("SELECT 1"))


# --- what goes on ---------------------------------------------------------------------------------------------------

UNCHANGED = [
    "UPDATE tenancy.api_keys SET scopes = '{notes:read,notes:write}' WHERE id = :id",
    "UPDATE tenancy.api_keys SET scopes = '{*}' WHERE id = :id",
    "UPDATE tenancy.api_keys SET networks = '{127.0.0.0/8}' WHERE id = :id",
    "UPDATE tenancy.api_keys SET expires_at = now() + interval '1 day' WHERE id = :id",
    "UPDATE tenancy.api_keys SET revoked_at = now() WHERE id <> :id",
    "UPDATE tenancy.tenants SET slug = 'renamed', tier = 'pro', metadata = '{\"a\": 1}' WHERE :id <> ''",
]


async def test_changes_that_leave_a_key_valid_disturb_nothing(acme: Acme) -> None:
    """A wider scope, a later end, a network that admits the source, another key, another name of the tenant."""
    async with (
        uvicorn_command("tests.support.lasting:create_watched", acme.config) as port,
        websocket(port, acme.key) as opened,
    ):
        for change in UNCHANGED:
            await acme.sql(change)
            assert await read(opened) == NOTES
        # all notifications have arrived, since this one has
        await revoke(acme)
        assert (await closed(opened))[0] == REVOKED


async def test_an_operator_s_websocket_outlasts_maintenance(acme: Acme) -> None:
    """It was opened during it; it ends with the key, as every other."""
    await maintain(acme)
    async with uvicorn_command("tests.support.lasting:create_watched", acme.config) as port:
        with pytest.raises(InvalidStatus):
            async with websocket(port, acme.key):
                pass
        async with websocket(port, acme.key, X_Operator="yes") as opened:
            await acme.tenancy.tenants.update("acme", metadata={"a": 1})
            assert await read(opened) == NOTES
            await acme.tenancy.tenants.end_maintenance("acme")
            assert await read(opened) == NOTES
            await suspend(acme)
            assert (await closed(opened))[0] == UNAVAILABLE


async def test_nothing_is_left_of_many_websockets(acme: Acme) -> None:
    """However they end: by their peers, by the loss of the connection, or with the key."""
    async with uvicorn_command("tests.support.lasting:create_watched", acme.config) as port:
        for _ in range(20):
            async with websocket(port, acme.key):
                pass
            async with websocket(port, acme.key) as lost:
                lost.transport.abort()
            async with stream(port, acme.key):
                pass
        await until(lambda: idle(port))
        opened = [websocket(port, acme.key) for _ in range(20)]
        clients = [await manager.__aenter__() for manager in opened]
        assert (await state(port))["watched"] == 20
        await revoke(acme)
        assert {await closed(client) for client in clients} == {(REVOKED, "credential no longer valid")}
        for manager in opened:
            await manager.__aexit__(None, None, None)
        await until(lambda: idle(port))
