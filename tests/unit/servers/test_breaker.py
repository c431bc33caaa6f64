"""The breaker's states, and the probe that decides them, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from tenancy_orm.config import BreakerConfig
from tenancy_orm.errors import LoginRefusedError, ServerUnavailableError
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.postgres.ping import ping
from tenancy_orm.servers.breaker import Breaker, BreakerState
from tests.support.postgres import Postgres
from tests.support.waiting import until


class Answers:
    """A probe's answers: an error, or None; and how many were asked for at the same time at most."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.asked = self.now = self.most = 0

    async def probe(self) -> None:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        self.now -= 1
        if self.error is not None:
            raise self.error


@asynccontextmanager
async def breaker_of(
    answers: Answers, *, name: str = "eu", is_replica: bool = False, **options: object
) -> AsyncIterator[Breaker]:
    config = BreakerConfig.model_validate({"longest_pause": 0.01, **options})
    breaker = Breaker(name, config, answers.probe, address="db.example:5432", is_replica=is_replica)
    try:
        yield breaker
    finally:
        await breaker.close()


async def test_a_failure_opens_it_only_where_the_probe_fails_too_and_an_answer_closes_it() -> None:
    """However many failures there are, one probe at a time is made; none for what shows that the server answers."""
    answers, changes = Answers(), []
    async with breaker_of(answers) as breaker:
        breaker.on_change(lambda changed: changes.append(changed.state))
        for sqlstate in ("28P01", "28000", "3D000", "42501", "53300"):
            breaker.failed(ServerUnavailableError(server="eu", sqlstate=sqlstate))
        breaker.failed(LoginRefusedError(server="eu", tenant="acme", sqlstate="28P01"))
        assert breaker._probing is None
        for _ in range(100):
            breaker.failed(TimeoutError())
        await until(lambda: breaker._probing is None)
        assert (answers.asked, breaker.state, changes) == (1, BreakerState.CLOSED, [])
        answers.error = ConnectionRefusedError("connection refused")
        for _ in range(100):
            breaker.failed(ServerUnavailableError(server="eu"))
        # an answer is believed for a second
        await until(lambda: breaker.is_open)
        await until(lambda: answers.asked > 5)
        assert answers.most == 1
        with pytest.raises(ServerUnavailableError, match="connection refused; it is asked again") as caught:
            breaker.check(tenant="acme")
        assert (caught.value.server, caught.value.tenant) == ("eu", "acme")
        assert caught.value.retry_after is not None and 0 < caught.value.retry_after < 2
        answers.error = None
        await until(lambda: breaker.state is BreakerState.CLOSED)
        breaker.check()
    assert changes == [BreakerState.OPEN, BreakerState.CLOSED]


@pytest.mark.parametrize(
    ("name", "is_replica", "line"),
    [
        ("eu", False, "server eu does not answer (starting up (57P03)): its tenants are refused until it does"),
        ("eu/1", True, "replica eu/1 does not answer (starting up (57P03)): reads go elsewhere until it does"),
    ],
)
async def test_the_log_says_who_is_concerned(
    name: str, is_replica: bool, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is refused where a replica does not answer."""
    async with breaker_of(Answers(), name=name, is_replica=is_replica) as breaker:
        breaker.failed(asyncpg.CannotConnectNowError("starting up"))
        await until(lambda: not breaker.is_open)
    assert line in caplog.messages
    assert caplog.messages[-1].startswith(f"{line.partition(' does')[0]} answers again")


async def test_a_server_that_says_that_it_is_starting_opens_it_and_it_can_be_off() -> None:
    """Its own word needs no probe; without a breaker nothing is asked."""
    answers = Answers()
    error = asyncpg.CannotConnectNowError("the database system is starting up")
    async with breaker_of(answers) as breaker:
        breaker.failed(error)
        assert breaker.is_open and "starting up" in breaker.reason
        await until(lambda: not breaker.is_open)
    async with breaker_of(answers, enabled=False) as breaker:
        asked = answers.asked
        breaker.failed(error)
        breaker.suspect()
        assert not breaker.is_open and breaker._probing is None and answers.asked == asked
    # of a server that was replaced, on which sessions are open: nobody would stop the probes, or close the breaker
    answers.error = ConnectionRefusedError("connection refused")
    async with breaker_of(answers) as breaker:
        breaker.failed(error)
        await breaker.close()
        breaker.failed(error)
        breaker.suspect()
        assert not breaker.is_open and breaker._probing is None


async def test_the_probe_is_answered_by_whatever_is_postgresql(postgres: Postgres) -> None:
    """One that serves nobody, one that is silent, one that closes, and another program are none."""

    @asynccontextmanager
    async def listening(answer: bytes | None) -> AsyncIterator[str]:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(8)
            if answer is None:
                await reader.read()
            writer.write(answer or b"")
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        async with server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    await ping(Dsn.parse(postgres.admin_url), timeout=10)
    await ping(Dsn.parse(postgres.url("no_such_database", user="nobody", password="x")), timeout=10)
    where = postgres.admin_url.rpartition("@")[2].partition("/")[0]
    fields = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"
    starting = b"NE" + (len(fields) + 4).to_bytes(4, "big") + fields
    for answer, error in (
        (starting, ConnectionRefusedError),
        (None, TimeoutError),
        (b"", ConnectionResetError),
        (b"N", ConnectionResetError),
    ):
        async with listening(answer) as dead:
            with pytest.raises(error):
                await ping(Dsn.parse(f"postgresql://someone@{dead}/x"), timeout=0.3)
            await ping(Dsn.parse(f"postgresql://someone@{dead},{where}/x"), timeout=10)
    async with listening(b"S") as encrypted:
        await ping(Dsn.parse(f"postgresql://someone@{encrypted}/x?sslmode=require"), timeout=10)
