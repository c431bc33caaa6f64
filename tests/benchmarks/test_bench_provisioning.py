"""What creating a tenant costs beyond what PostgreSQL asks for.

Run it with ``make bench ARGS='-k provisioning'``; on another server with ``TENANCY_TEST_DSN``. The raw side has what it
needs at hand: an open administrative connection and the finished template. Both sides take turns, so that what else
the machine does, and PostgreSQL's checkpoints, fall on both alike.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import ModuleType
from typing import Any

import asyncpg
import pytest

from tenancy_orm.keys.format import generate_key
from tenancy_orm.provisioning.creation import pipeline
from tenancy_orm.provisioning.rights import grants
from tenancy_orm.provisioning.server_objects import databases, roles
from tenancy_orm.registry.rows import uuid7
from tenancy_orm.secrets.keyring import new_password
from tenancy_orm.servers.server import Server
from tests.support.postgres import Postgres
from tests.support.provisioning import ScriptSchema, Workshop, open_workshop

# 6 tables, 12 indexes besides the primary keys
SCHEMA = "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);" + "".join(
    f"CREATE TABLE t{i} (id bigserial PRIMARY KEY, a text, b integer, c timestamptz DEFAULT now());"
    f"CREATE INDEX ON t{i} (a); CREATE INDEX ON t{i} (b, c);"
    for i in range(6)
)
ROUNDS = 40
AT_ONCE = 4
MANY = 1_000


@pytest.fixture
async def workshop(postgres: Postgres, control_url: str, name_prefix: str) -> AsyncIterator[Workshop]:
    """A provisioner with a template."""
    opened = await open_workshop(
        control_url=control_url,
        admin_url=postgres.admin_url,
        name_prefix=name_prefix,
        schema=ScriptSchema(SCHEMA),
        provisioning={"concurrency": AT_ONCE},
    )
    try:
        await opened.provisioner.template("default")
        yield opened
    finally:
        await opened.close()


class Stopwatch:
    """Milliseconds by what they were spent on."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def watch(self, patch: pytest.MonkeyPatch, owner: Any, name: str, label: str = "") -> None:
        """Time every call of a coroutine function."""
        function: Callable[..., Awaitable[Any]] = getattr(owner, name)

        async def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return await function(*args, **options)
            finally:
                self.spent.setdefault(label or name, []).append((time.perf_counter() - started) * 1e3)

        patch.setattr(owner, name, timed)

    def lines(self) -> list[str]:
        """The medians."""
        return [f"  {name:30} {statistics.median(spent):8.2f}" for name, spent in self.spent.items()]


class Raw:
    """What there is no way around, done by hand: a database, a role with a password, and its first login."""

    def __init__(self, postgres: Postgres, template: str, prefix: str, watch: Stopwatch) -> None:
        self._postgres = postgres
        self._template = template
        self._prefix = prefix
        self._watch = watch

    async def create(self, admin: Any) -> None:
        """Make one."""
        name, password = f"{self._prefix}_{uuid7().hex}", new_password()
        times = [time.perf_counter()]
        await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{self._template}"')
        times.append(time.perf_counter())
        await admin.execute(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{password}'")
        times.append(time.perf_counter())
        connection = await asyncpg.connect(self._postgres.url(name, user=name, password=password))
        await connection.fetchval("SELECT 1")
        await connection.close()
        times.append(time.perf_counter())
        for label, begun, ended in zip(("CREATE DATABASE", "CREATE ROLE", "connect"), times, times[1:], strict=False):
            self._watch.spent.setdefault(f"raw: {label}", []).append((ended - begun) * 1e3)


def report(capsys: pytest.CaptureFixture[str], title: str, lines: list[str]) -> None:
    """Print it past pytest."""
    with capsys.disabled():
        print(f"\n{title}")
        for line in lines:
            print(f"  {line}")


async def elapsed(work: Awaitable[Any]) -> float:
    """Milliseconds that it takes."""
    started = time.perf_counter()
    await work
    return (time.perf_counter() - started) * 1e3


@pytest.mark.timeout(600)
async def test_a_creation(
    workshop: Workshop,
    postgres: Postgres,
    name_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tenant, complete and proved, against the bare statements. The goal is at most 1.5 times."""
    template = (await workshop.provisioner.template("default")).name
    watch, parts = Stopwatch(), Stopwatch()
    raw = Raw(postgres, template, name_prefix, parts)
    for owner, names in {
        workshop.registry: ("register", "record_step", "complete"),
        roles: ("create",),
        databases: ("create", "open_to_owner"),
        grants: ("grant_and_mark",),
        Server: ("connect_admin", "connect_tenant"),
        pipeline: ("prove",),
    }.items():
        for name in names:
            label = f"{owner.__name__.rpartition('.')[2]}.{name}" if isinstance(owner, ModuleType) else name
            parts.watch(monkeypatch, owner, name, label)

    async def create(number: int) -> None:
        draft = workshop.draft(f"t{number}")
        await workshop.provisioner.create(draft, key=generate_key("ten_test"))

    async with postgres.connect() as admin:
        for number in range(ROUNDS + 2):
            for label, work in (("raw", raw.create(admin)), ("tenant", create(number))):
                spent = await elapsed(work)
                if number >= 2:  # the first ones map shared memory and fill caches, on both sides
                    watch.spent.setdefault(label, []).append(spent)
    ours, theirs = watch.spent["tenant"], watch.spent["raw"]
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    medians = statistics.median(ours) / statistics.median(theirs)
    report(
        capsys,
        f"creating a tenant, PostgreSQL {postgres.version}, {ROUNDS} each in turns (median ms)",
        [
            *watch.lines(),
            f"  {'ratio, median of pairs':30} {statistics.median(ratios):8.2f}",
            f"  {'ratio of medians':30} {medians:8.2f}",
            "of which",
            *parts.lines(),
        ],
    )


@pytest.mark.timeout(600)
async def test_creations_at_once(
    workshop: Workshop, postgres: Postgres, name_prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty at once, four of them running, against the bare statements four at a time."""
    template = (await workshop.provisioner.template("default")).name
    raw = Raw(postgres, template, name_prefix, Stopwatch())
    spent: dict[str, list[float]] = {"raw": [], "tenants": []}

    async def by_hand() -> None:
        async with postgres.connect() as admin:
            for _ in range(ROUNDS // AT_ONCE):
                await raw.create(admin)

    for turn in range(3):
        spent["raw"].append(await elapsed(asyncio.gather(*(by_hand() for _ in range(AT_ONCE)))))
        creations = (workshop.create(f"t{turn}-{number}") for number in range(ROUNDS))
        spent["tenants"].append(await elapsed(asyncio.gather(*creations)))
    rates = {label: ROUNDS / statistics.median(times) * 1e3 for label, times in spent.items()}
    report(
        capsys,
        f"{ROUNDS} creations at once, {AT_ONCE} running, PostgreSQL {postgres.version} (a second)",
        [
            *(f"{label:32} {rate:8.1f}" for label, rate in rates.items()),
            f"{'ratio of times':32} {rates['raw'] / rates['tenants']:8.2f}",
        ],
    )


@pytest.mark.timeout(1_800)
async def test_a_thousand_creations_at_once(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """All are asked for at the same moment; every one succeeds, and four run at a time."""
    done: list[float] = []

    async def create(number: int) -> None:
        await workshop.create(f"many-{number}")
        done.append(time.perf_counter() - started)

    started = time.perf_counter()
    ended = await asyncio.gather(*(create(number) for number in range(MANY)), return_exceptions=True)
    failed = [error for error in ended if error is not None]
    assert failed == []
    assert await workshop.consistent()
    report(
        capsys,
        f"{MANY} creations at once, {AT_ONCE} running",
        [f"{'a second':32} {MANY / done[-1]:8.1f}", f"{'the last one after (s)':32} {done[-1]:8.1f}"],
    )
