"""Invalidations: every process is notified of a change at once, and knows when it cannot be."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tenancy_orm.authentication.credential import Credential
from tenancy_orm.control.notifications import Change, Listener
from tenancy_orm.errors import InvalidCredentialError
from tenancy_orm.events import Event, EventBus, ListenerLost, ListenerRestored
from tenancy_orm.keys.format import parse_key
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.tenant import Status
from tests.support.control import ControlPlane, control_plane
from tests.support.directory_process import described, use
from tests.support.proxy import Proxy, proxied
from tests.support.registry import synchronise
from tests.support.shell import ROOT, environment
from tests.support.waiting import HANGS, until
from tests.support.warm import Program, start_module

WITHIN = 0.25
"""Seconds within which a change must be known everywhere."""


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[ControlPlane]:
    """A control plane with a listening directory."""
    async with control_plane(control_url) as opened:
        yield opened


LISTENERS = "FROM pg_stat_activity WHERE application_name = 'tenancy-listener' AND datname = current_database()"


async def terminate_listeners(plane: ControlPlane) -> int:
    """End the backends that listen on this database."""
    query = f"SELECT pg_terminate_backend(pid) {LISTENERS}"
    async with plane.control.connect() as connection:
        return len((await connection.execute(text(query))).all())


@asynccontextmanager
async def processes(
    count: int, url: str, *credentials: str | Credential, ttl: float = 30.0, listen_url: str | None = None
) -> AsyncIterator[list[Program]]:
    """Other processes, each with a directory of its own that knows ``credentials``: keys, and those of other kinds."""
    command = ["tests.support.directory_process", url, str(ttl), listen_url or url, described(credentials)]
    started: list[Program] = []
    try:
        while len(started) < count:
            started.append(await start_module(*command, cwd=ROOT, env=environment(), after=["tests.support.control"]))
        async with asyncio.timeout(60):
            for process in started:
                assert await line(process) == "known"
        yield started
    finally:
        for process in started:
            process.kill()
            await process.wait()


async def line(process: Program) -> str:
    """The next line that a process prints."""
    return (await process.stdout.readline()).decode().strip()


async def refusals(process: Program, count: int) -> tuple[list[str], float, float]:
    """Why each of the credentials of a process was refused, when the last one was, and when one was last admitted."""
    lines = sorted([(await line(process)).split(" ", 3) for _ in range(count)], key=lambda found: int(found[0]))
    refused, admitted = (max(float(found[field]) for found in lines) for field in (1, 2))
    return [found[3] for found in lines], refused, admitted


# --- every process --------------------------------------------------------------------------------------------------


async def everyone(plane: ControlPlane, number: int = 0) -> list[str | Credential]:
    """A key, and a token and a session for each way in which one can end, of the tenant and people of this number."""
    tenant, key = await plane.tenant(f"acme{number}")
    async with plane.control.transaction() as connection:
        for subject in ("revoked-member", "removed-member", "revoked-session"):
            await connection.execute(
                text("INSERT INTO tenancy.members VALUES (:tenant, :subject, '{owner}')"),
                {"tenant": tenant.id, "subject": f"{subject}{number}"},
            )
    slugs = (tenant.slug,)
    return [
        key,
        Credential("token", f"one{number}", tenants=slugs, id=f"revoked-token{number}"),
        Credential("token", f"revoked-person{number}", tenants=slugs, id=f"another-token{number}"),
        Credential("token", f"revoked-member{number}", id=f"third-token{number}"),
        Credential("token", f"removed-member{number}", id=f"fourth-token{number}"),
        Credential("session", f"revoked-session{number}"),
        Credential("session", f"two{number}", tenants=slugs, id=f"session-id{number}"),
    ]


ENDS = ["revoked", "revoked", "revoked", "revoked", "no member", "revoked", "revoked"]
"""Why each of them is refused after ``end_all``."""


async def end_all(plane: ControlPlane, key: str | Credential, number: int = 0) -> float:
    """End each of ``everyone``; returns when."""
    assert isinstance(key, str)
    ids = [f"('token', '{value}{number}')" for value in ("revoked-token", "session-id")]
    people = [f"('subject', '{value}{number}')" for value in ("revoked-person", "revoked-member", "revoked-session")]
    async with plane.control.transaction() as connection:
        values = ", ".join(ids + people)
        await connection.execute(text(f"INSERT INTO tenancy.revocations (kind, value) VALUES {values}"))
        await connection.execute(text(f"DELETE FROM tenancy.members WHERE subject = 'removed-member{number}'"))
        await connection.execute(
            text("UPDATE tenancy.api_keys SET revoked_at = now() WHERE id = :id"),
            {"id": parse_key(key, "ten_live").key_id},
        )
    return time.time()


async def test_what_is_revoked_stops_working_in_every_process_within_a_quarter_of_a_second(
    plane: ControlPlane, control_url: str
) -> None:
    """Credentials of every kind, although each process has cached them for another hour.

    The fastest of a few, since others use this machine too.
    """
    rounds = [await everyone(plane, number) for number in range(5)]
    taken = []
    async with processes(3, control_url, *chain(*rounds), ttl=3_600.0) as others:
        for number, credentials in enumerate(rounds):
            ended = await end_all(plane, credentials[0], number)
            async with asyncio.timeout(HANGS):
                found = [await refusals(process, len(credentials)) for process in others]
            assert [reasons for reasons, *_ in found] == [ENDS] * 3
            taken.append(max(at for _, at, _ in found) - ended)
    assert min(taken) < WITHIN


async def test_a_deleted_tenants_key_stops_working_in_every_process(plane: ControlPlane, control_url: str) -> None:
    """A change of status is notified as a change of a key is; no other credential allows the tenant any more."""
    made = [await plane.tenant(f"acme{number}") for number in range(5)]
    credentials: list[str | Credential] = []
    for tenant, key in made:
        credentials += [key, Credential("token", "one", tenants=(tenant.slug,))]
    taken = []
    async with processes(2, control_url, *credentials, ttl=3_600.0) as others:
        for tenant, _ in made:
            await plane.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")
            deleted = time.time()
            async with asyncio.timeout(HANGS):
                found = [await refusals(process, 2) for process in others]
            assert [reasons for reasons, *_ in found] == [["tenant deleted", "no member"]] * 2
            taken.append(max(at for _, at, _ in found) - deleted)
    assert min(taken) < WITHIN


async def test_without_a_listener_what_is_revoked_stops_working_within_the_ttl(
    plane: ControlPlane, control_url: str
) -> None:
    """The listener is cut off for good; the cache of another process relies on its TTL alone."""
    ttl = 2.0
    credentials = await everyone(plane)
    async with (
        proxied(control_url) as proxy,
        processes(1, control_url, *credentials, ttl=ttl, listen_url=proxy.url(control_url)) as (other,),
    ):
        proxy.refuse()
        ended = await end_all(plane, credentials[0])
        async with asyncio.timeout(HANGS):
            reasons, _, admitted = await refusals(other, len(credentials))
    assert reasons == ENDS
    assert admitted <= ended + ttl


# --- one process ----------------------------------------------------------------------------------------------------


async def test_changes_in_the_registry_invalidate_what_is_remembered(plane: ControlPlane) -> None:
    """Whoever made it: an operator with psql, for example."""
    tenant, key = await plane.tenant("acme")
    changes = [
        "UPDATE tenancy.tenants SET metadata = '{\"a\": 1}'",
        "UPDATE tenancy.tenants SET tier = 'pro'",
        "UPDATE tenancy.tenants SET quotas = '{\"users\": 1}'",
        "UPDATE tenancy.tenants SET sealed_password = 'another'",
        "UPDATE tenancy.tenants SET server = 'second'",
        "UPDATE tenancy.tenants SET database_name = database_name || '_moved'",
        "UPDATE tenancy.tenants SET role_name = role_name || '_moved'",
        "UPDATE tenancy.tenants SET timezone = 'Europe/Rome'",
        "UPDATE tenancy.tenants SET trial_ends_at = now() + interval '1 day'",
        "UPDATE tenancy.tenants SET reason = 'because'",
        "UPDATE tenancy.tenants SET status = 'suspended'",
        "UPDATE tenancy.tenants SET slug = 'acme-2'",
        "UPDATE tenancy.api_keys SET scopes = '{a}'",
        "UPDATE tenancy.api_keys SET networks = '{192.0.2.0/24}'",
        "UPDATE tenancy.api_keys SET expires_at = now() + interval '1 day'",
        "UPDATE tenancy.api_keys SET digest = digest",
        "UPDATE tenancy.api_keys SET digest_version = digest_version",
        "DELETE FROM tenancy.api_keys",
    ]
    source = "192.0.2.1"
    servers = dict.fromkeys(("default", "second"), ("127.0.0.1", 5432))
    await synchronise(plane.control, plane.config.tiers, servers)
    for change in changes:
        await plane.directory.authenticate(key, source=source)
        async with plane.control.transaction() as connection:
            await connection.execute(text(change))
        await until(lambda: plane.directory.peek(key, source) is None)
        if "tenants" in change:
            assert plane.directory.peek_tenant(tenant) is None, change
    with pytest.raises(InvalidCredentialError):
        await plane.directory.authenticate(key, source=source)


async def test_uses_and_progress_are_not_notified(plane: ControlPlane) -> None:
    """A NOTIFY takes a lock of the whole server at commit: changes that nobody caches do without it."""
    tenant, key = await plane.tenant("acme")
    await plane.directory.authenticate(key)
    async with plane.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.api_keys SET last_used_at = now()"))
        await connection.execute(text("UPDATE tenancy.tenants SET step = 'x', schema_revision = 'r1'"))
    marker = await plane.key(tenant)
    await plane.directory.authenticate(marker.text)
    await plane.keys.revoke(marker.key_id)
    await until(lambda: plane.directory.peek(marker.text) is None)
    assert plane.directory.peek(key) is not None


async def test_what_was_missed_is_looked_up_again_when_the_listener_is_back(plane: ControlPlane) -> None:
    """Its backend is killed and credentials end unnoticed; the loss and the return are emitted and logged."""
    credentials = await everyone(plane)
    used = [one if isinstance(one, str) else json.loads(described([one]))[0] for one in credentials]
    assert [await use(plane.directory, one) for one in used] == [None] * len(used)
    tables = ("api_keys", "members", "revocations")
    async with plane.control.transaction() as connection:
        # nobody is notified of this
        for table in tables:
            await connection.execute(text(f"ALTER TABLE tenancy.{table} DISABLE TRIGGER USER"))
    await end_all(plane, credentials[0])
    async with plane.control.transaction() as connection:
        for table in tables:
            await connection.execute(text(f"ALTER TABLE tenancy.{table} ENABLE TRIGGER USER"))
    assert [await use(plane.directory, one) for one in used] == [None] * len(used)
    assert await terminate_listeners(plane) == 1
    await until(lambda: plane.of(ListenerRestored))
    assert len(plane.of(ListenerLost)) == 1
    assert plane.directory.statistics.listening
    assert [await use(plane.directory, one) for one in used] == ENDS


async def test_the_directory_opens_without_a_listener(control_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """An application starts without the listener, logs that, and listens once it can."""
    async with proxied(control_url) as proxy:
        proxy.refuse()
        with caplog.at_level(logging.WARNING, "tenancy_orm.listener"):
            async with control_plane(control_url, control={"listen_url": proxy.url(control_url)}) as plane:
                assert not plane.directory.statistics.listening
                assert "relies on its TTL alone" in caplog.text
                _, key = await plane.tenant("acme")
                await plane.directory.authenticate(key)
                proxy.restore()
                await until(lambda: plane.directory.statistics.listening)
                assert plane.directory.peek(key) is None


# --- the connection -------------------------------------------------------------------------------------------------


class Listening:
    """A listener with short times, and the changes that it received."""

    def __init__(self, url: str, proxy: Proxy) -> None:
        self.changes: list[Change] = []
        self.connects = 0
        self.events: list[Event] = []
        bus = EventBus()
        bus.subscribe(Event, self.events.append)
        self.listener = Listener(
            Dsn.parse(proxy.url(url)),
            on_change=self.changes.append,
            on_connected=self._connected,
            events=bus,
            probe_interval=0.1,
            timeout=0.3,
        )

    def _connected(self) -> None:
        self.connects += 1


@pytest.fixture
async def listening(control_url: str) -> AsyncIterator[tuple[Listening, Proxy]]:
    """An open listener behind a proxy."""
    async with proxied(control_url) as proxy:
        listening = Listening(control_url, proxy)
        await listening.listener.open()
        try:
            yield listening, proxy
        finally:
            await listening.listener.close()


@pytest.mark.parametrize("how", ["cut", "refuse", "swallow"])
async def test_a_lost_connection_is_noticed_and_renewed(listening: tuple[Listening, Proxy], how: str) -> None:
    """Even one that falls silent: it is probed from time to time."""
    one, proxy = listening
    assert one.listener.connected
    getattr(proxy, how)()
    await until(lambda: any(isinstance(event, ListenerLost) for event in one.events))
    proxy.restore()
    await until(lambda: one.listener.connected and one.connects >= 2)
    kinds = [type(event) for event in one.events]
    assert kinds == [ListenerLost, ListenerRestored]


async def test_a_long_loss_is_reported_once(listening: tuple[Listening, Proxy]) -> None:
    """However often connecting fails before that; attempts get rarer."""
    one, proxy = listening
    proxy.refuse()
    before = proxy.connections
    await until(lambda: proxy.connections >= before + 4)
    assert [type(event) for event in one.events] == [ListenerLost]
    assert not one.listener.connected


async def test_a_malformed_notification_stands_for_a_change_of_anything(
    listening: tuple[Listening, Proxy], plane: ControlPlane
) -> None:
    """It only costs a look-up of everything."""
    one, _ = listening
    one.changes.clear()  # the plane's server was added
    tenant_id = uuid4()
    payloads = ["", "nonsense", "[]", '{"t": 1}', '{"t": "x", "k": null, "c": "tenant"}', "null"]
    good = [
        f'{{"t": "{tenant_id}", "k": null, "c": "tenant"}}',
        f'{{"t": "{tenant_id}", "k": "abc", "c": "key"}}',
        f'{{"t": "{tenant_id}", "k": null, "c": "member", "s": "alice"}}',
        '{"t": null, "k": null, "c": "revocation", "j": "token"}',
    ]
    async with plane.control.transaction() as connection:
        for payload in [*payloads, *good]:
            await connection.execute(text("SELECT pg_notify('tenancy', :payload)"), {"payload": payload})
    await until(lambda: len(one.changes) == len(payloads) + len(good))
    assert one.changes[:-4] == [Change(None, None, "malformed")] * len(payloads)
    assert one.changes[-4:] == [
        Change(tenant_id, None, "tenant"),
        Change(tenant_id, "abc", "key"),
        Change(tenant_id, None, "member", subject="alice"),
        Change(None, None, "revocation", token_id="token"),
    ]


async def test_closing_ends_the_backend(plane: ControlPlane, control_url: str) -> None:
    """Nothing is left behind on the server."""
    async with control_plane(control_url, initialise=False):
        assert await listeners(plane) == 2

    async def one_is_left() -> bool:
        return await listeners(plane) == 1

    await until(one_is_left)


async def listeners(plane: ControlPlane) -> int:
    """How many backends listen on this database."""
    async with plane.control.connect() as connection:
        return int(await connection.scalar(text(f"SELECT count(*) {LISTENERS}")))


async def test_no_secret_is_shown(listening: tuple[Listening, Proxy], control_url: str) -> None:
    """The listener has a URL with a password."""
    password = make_url(control_url).password
    assert isinstance(password, str)
    assert password not in repr(listening[0].listener)
