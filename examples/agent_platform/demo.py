"""The platform's features in a minute, on an embedded PostgreSQL: ``python -m examples.agent_platform.demo``.

The demo checks everything that it shows, and fails if something is not as expected. It leaves nothing behind, even if
it is stopped by Ctrl-C.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tenancy_orm import Tenancy
from tenancy_orm.runs import TenantOutcome
from tenancy_orm.testing.embedded import EmbeddedProvider, ProvidedServer

from .models import EMBEDDING_DIMENSIONS
from .settings import create_config

HERE = Path(__file__).parent
SLUGS = ("acme", "globex", "initech")
DOMAIN = "example.test"
SHUTDOWN_SECONDS = 10.0
START_SECONDS = 30.0
SUSPENSION_SECONDS = 5.0
INTERRUPTED = 130

REVISION = '''\
"""Let agents be archived.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("agents", sa.Column("archived_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_agents_archived_at", "agents", ["archived_at"])


def downgrade() -> None:
    op.drop_index("ix_agents_archived_at", table_name="agents")
    op.drop_column("agents", "archived_at")
'''


class DemoError(Exception):
    """Something was not as the demo expects."""


def expect(holds: bool, what: str) -> None:
    """Raise unless ``what`` ``holds``."""
    if not holds:
        raise DemoError(f"not as expected: {what}")


@dataclass
class Output:
    """Prints the demo's steps, their results, and how long each one took."""

    console: Console = field(default_factory=lambda: Console(highlight=False))
    times: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print a step's title, run the body and measure its time."""
        self.console.print(f"\n[bold cyan]{len(self.times) + 1}. {title}[/]")
        started = time.perf_counter()
        yield
        self.times.append((title, time.perf_counter() - started))

    def result(self, what: str) -> None:
        """Print one result that was as expected."""
        self.console.print(f"   [green]✓[/] {what}", soft_wrap=True)

    def table(self, title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        """Print a table."""
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


class ProgressBar(Progress):
    """A progress bar for a fleet migration."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("   {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=console)
        self.task = self.add_task("upgrading", total=None)

    def total(self, count: int) -> None:
        """Show how many tenants there are."""
        self.update(self.task, total=count)

    def done(self, outcome: TenantOutcome) -> None:
        """Show that one more is done."""
        self.update(self.task, advance=1, description=f"upgraded {outcome.slug}")


@asynccontextmanager
async def postgresql(directory: Path) -> AsyncIterator[ProvidedServer]:
    """Run an embedded PostgreSQL, and delete it at the end."""
    opening = asyncio.create_task(EmbeddedProvider().open(f"embedded:{directory}"))
    try:
        # if this is interrupted during the start, the server is stopped once it has started
        yield await asyncio.shield(opening)
    finally:
        provided = await opening
        await provided.close()
        await asyncio.to_thread(provided.server.remove)


@asynccontextmanager
async def serve(settings: dict[str, str], log: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Run the example under uvicorn in another process; yield a client for it."""
    # only the demo's settings: the caller's TENANCY_* variables must not reach the server
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TENANCY_")}
    with socket.create_server(("127.0.0.1", 0)) as listener, log.open("wb") as output:
        port = listener.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "uvicorn", "examples.agent_platform.app:app"),
            *("--fd", str(listener.fileno()), "--no-access-log"),
            cwd=HERE.parents[1],
            env={**inherited, **settings},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            # Ctrl-C reaches only this process, which then stops the server
            start_new_session=True,
        )
    # the process has inherited the socket: it answers requests that are queued there, and they fail if it dies
    try:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=START_SECONDS, trust_env=False) as client:
            yield client
    finally:
        await asyncio.shield(stop(process))


async def stop(process: asyncio.subprocess.Process) -> None:
    """Terminate a process that was started here; kill it if it does not end in time."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


async def call(
    client: httpx.AsyncClient, method: str, path: str, *, key: str | None, host: str = "", **options: Any
) -> httpx.Response:
    """Send a request with an API key, to the sub-domain ``host`` if one is given."""
    headers = {} if key is None else {"X-API-Key": key}
    if host:
        headers["Host"] = f"{host}.{DOMAIN}"
    return await client.request(method, path, headers=headers, **options)


async def create(client: httpx.AsyncClient, path: str, key: str, **body: Any) -> dict[str, Any]:
    """Create a row and return it."""
    answer = await call(client, "POST", path, key=key, json=body)
    expect(answer.status_code == 201, f"POST {path} answers 201, not {answer.status_code}: {answer.text}")
    row: dict[str, Any] = answer.json()
    return row


async def eventually(ask: Callable[[], Awaitable[httpx.Response]], status: int) -> float:
    """Repeat a request until its answer has ``status``; return the seconds that took."""
    started = time.perf_counter()
    while (answer := await ask()).status_code != status:
        waited = time.perf_counter() - started
        expect(waited < SUSPENSION_SECONDS, f"{status} within {SUSPENSION_SECONDS} s, not {answer.status_code}")
        await asyncio.sleep(0.005)
    return time.perf_counter() - started


# --- the steps ------------------------------------------------------------------------------------------------------


async def provision(output: Output, tenancy: Tenancy) -> dict[str, str]:
    """Create the tenants; return their API keys by slug."""
    keys = {}
    for slug in SLUGS:
        started = time.perf_counter()
        created = await tenancy.tenants.create(slug, tier="pro")
        keys[slug] = created.api_key
        milliseconds = (time.perf_counter() - started) * 1000
        placement = created.tenant.placement
        expect(created.tenant.schema_revision == "0001", f"{slug} is created at revision 0001")
        database = placement.database if placement else "none"
        expect(database.endswith(created.id.hex), f"{slug} has a database named after its id, not {database}")
        output.result(f"[bold]{slug}[/]: database {database}, in {milliseconds:.0f} ms")
    return keys


async def fill(output: Output, client: httpx.AsyncClient, keys: dict[str, str]) -> None:
    """Give every tenant a user, an agent and a memory, over HTTP."""
    for slug, key in keys.items():
        user = await create(client, "/users", key, email=f"ada@{slug}.test", name="Ada")
        agent = await create(client, "/agents", key, owner_id=user["id"], name=f"{slug} assistant", model="small-1")
        # the same embedding everywhere: if one tenant's search reached another's memories, it would find them
        await create(
            client,
            "/memories",
            key,
            agent_id=agent["id"],
            content=f"the secret of {slug}",
            embedding=[1.0] * EMBEDDING_DIMENSIONS,
        )
    output.result(f"a user, an agent and a memory for each of {len(keys)} tenants")


async def show_own_rows(output: Output, client: httpx.AsyncClient, keys: dict[str, str]) -> None:
    """Check that lists and searches return the key's own rows and no others."""
    search = {"embedding": [1.0] * EMBEDDING_DIMENSIONS}
    for slug, key in keys.items():
        agents = (await call(client, "GET", "/agents", key=key)).json()["items"]
        names = [agent["name"] for agent in agents]
        expect(names == [f"{slug} assistant"], f"the agents of {slug} are its own, not {names}")
        found = (await call(client, "POST", "/memories/search", key=key, json=search)).json()["items"]
        texts = [match["memory"]["content"] for match in found]
        expect(texts == [f"the secret of {slug}"], f"{slug} finds its own memory alone, not {texts}")
        output.result(f"key of [bold]{slug}[/]: agents {names}, memories {texts}")


async def show_foreign_id(output: Output, client: httpx.AsyncClient, keys: dict[str, str]) -> None:
    """Check that the id of another tenant's row is not found with a key."""
    ours, theirs = SLUGS[:2]
    agent = (await call(client, "GET", "/agents", key=keys[theirs])).json()["items"][0]["id"]
    own = await call(client, "GET", f"/agents/{agent}", key=keys[theirs])
    expect(own.status_code == 200, f"{theirs} reads its agent, not {own.status_code}")
    foreign = await call(client, "GET", f"/agents/{agent}", key=keys[ours])
    expect(foreign.status_code == 404, f"{ours} does not find {theirs}'s agent, not {foreign.status_code}")
    output.result(f"key of [bold]{ours}[/], id of {theirs}'s agent: 404")


def spoil(key: str) -> str:
    """Return ``key`` with another last character."""
    return key[:-1] + ("A" if key[-1] != "A" else "B")


async def show_refusals(output: Output, client: httpx.AsyncClient, keys: dict[str, str]) -> None:
    """Check that no key, a wrong key and another tenant's key are refused."""
    ours, theirs = SLUGS[:2]
    key = keys[ours]
    cases = [
        ("no key", None, "", 401),
        ("a wrong key", spoil(key), "", 401),
        (f"{ours}'s key on {ours}.{DOMAIN}", key, ours, 200),
        (f"{ours}'s key on {theirs}.{DOMAIN}", key, theirs, 403),
    ]
    for what, sent, host, status in cases:
        answer = await call(client, "GET", "/agents", key=sent, host=host)
        expect(answer.status_code == status, f"{what} gets {status}, not {answer.status_code}: {answer.text}")
        output.result(f"{what}: {status}")


async def show_suspension(output: Output, tenancy: Tenancy, client: httpx.AsyncClient, keys: dict[str, str]) -> None:
    """Check that the running server refuses a suspended tenant, and accepts it again after activation."""
    slug = SLUGS[2]

    def ask() -> Awaitable[httpx.Response]:
        return call(client, "GET", "/agents", key=keys[slug])

    await tenancy.tenants.suspend(slug, reason="unpaid invoice")
    seconds = await eventually(ask, 403)
    output.result(f"[bold]{slug}[/] suspended: 403 (effective after {seconds * 1000:.0f} ms)")
    others = await call(client, "GET", "/agents", key=keys[SLUGS[0]])
    expect(others.status_code == 200, f"{SLUGS[0]} is served as before, not {others.status_code}")
    await tenancy.tenants.activate(slug)
    await eventually(ask, 200)
    output.result(f"[bold]{slug}[/] activated again: 200")


async def upgrade(output: Output, tenancy: Tenancy) -> None:
    """Upgrade the fleet to the new revision under a progress bar, and check every database."""
    with ProgressBar(output.console) as bar:
        report = await tenancy.migrations.upgrade("head", progress=bar)
    expect(report.ok, f"no tenant failed: {report.reasons}")
    changed = sorted(outcome.slug for outcome in report.changed)
    expect(changed == sorted(SLUGS), f"all tenants were upgraded, not {changed}")
    for slug in SLUGS:
        found = await tenancy.fetch_value(
            "SELECT count(*) FROM information_schema.columns"
            " WHERE table_name = 'agents' AND column_name = 'archived_at'",
            tenant=slug,
        )
        expect(found == 1, f"the new column is in the database of {slug}")
    output.result("every tenant's database has the new column")


async def show_revisions(output: Output, tenancy: Tenancy) -> None:
    """Print the revision of each tenant's database."""
    fleet = await tenancy.migrations.status(verify=True)
    rows = [(x.slug, str(x.revision), "yes" if x.at_head else "no") for x in fleet]
    expect(sorted(rows) == [(slug, "0002", "yes") for slug in sorted(SLUGS)], f"all are at head: {rows}")
    output.table("The fleet's revisions", ("tenant", "revision", "at head"), rows)


async def run_steps(output: Output, directory: Path) -> None:
    """Run every step in ``directory``."""
    migrations = directory / "migrations"
    shutil.copytree(HERE / "migrations", migrations, ignore=shutil.ignore_patterns("__pycache__"))
    async with AsyncExitStack() as stack:
        with output.step("Start an embedded PostgreSQL 18"):
            provided = await stack.enter_async_context(postgresql(directory / "postgresql"))
            expect(provided.server.version == 18, f"PostgreSQL 18, not {provided.server.version}")
            output.result(f"{provided.server.server_version}, at 127.0.0.1:{provided.server.port}")
        (directory / "tenancy.toml").touch()
        settings = {
            # an empty file, so that a tenancy.toml in the working directory is not read
            "TENANCY_CONFIG": str(directory / "tenancy.toml"),
            "TENANCY_CONTROL_URL": provided.control_url,
            "TENANCY_SERVERS": f"default={provided.server_url}",
            "TENANCY_ENCRYPTION_KEYS": f"1:{provided.encryption_key}",
            "TENANCY_MIGRATIONS": str(migrations),
        }
        with output.step("Initialise the control database"):
            tenancy = Tenancy(create_config(settings))
            await tenancy.open(initialise=True)
            stack.push_async_callback(tenancy.close)
            found = (await tenancy.tenants.list()).items
            expect(not found, f"a new control database knows no tenants, not {found}")
            output.result("ready, without tenants")
        with output.step("Build the template database by running the migrations"):
            template = await tenancy.internals.provisioner.template("default")
            expect(template.revision == "0001", f"the template is at 0001, not {template.revision}")
            output.result(f"{template.name}, at revision {template.revision}")
        with output.step("Provision three tenants from the template"):
            keys = await provision(output, tenancy)
        with output.step("Start the example under uvicorn"):
            serving = serve(settings, directory / "uvicorn.log")
            client = await stack.enter_async_context(serving)
            answer = await client.get("/healthz")
            expect(answer.status_code == 200, f"/healthz answers 200, not {answer.status_code}")
            output.result(f"{client.base_url} answers")
        await serve_tenants(output, tenancy, client, keys)
        with output.step("Add one Alembic revision and upgrade all tenants"):
            (migrations / "versions" / "0002_archive_agents.py").write_text(REVISION)
            await upgrade(output, tenancy)
        with output.step("Ask every database for its revision"):
            await show_revisions(output, tenancy)
            await show_own_rows(output, client, keys)
        with output.step("Stop the servers and clean up"):
            await stack.aclose()
            expect(not provided.server.is_running(), "PostgreSQL has stopped")
            expect(not provided.server.data_dir.exists(), "its data is gone")
            output.result("no process and no data is left")


async def serve_tenants(output: Output, tenancy: Tenancy, client: httpx.AsyncClient, keys: dict[str, str]) -> None:
    """Run the steps that send requests to the running server."""
    with output.step("Fill each tenant over HTTP"):
        await fill(output, client, keys)
    with output.step("Each key sees only its own rows"):
        await show_own_rows(output, client, keys)
        await show_foreign_id(output, client, keys)
    with output.step("Refuse no key, a wrong key and another tenant's key"):
        await show_refusals(output, client, keys)
    with output.step("Suspend a tenant while the server runs"):
        await show_suspension(output, tenancy, client, keys)


async def interruptible(work: Coroutine[Any, Any, None]) -> bool:
    """Run ``work``; return False if Ctrl-C or SIGTERM ended it. A second Ctrl-C does not interrupt the clean-up."""
    task = asyncio.create_task(work)
    stopping = False

    def ask() -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    try:
        await task
    except asyncio.CancelledError:
        if not stopping:
            raise
    return not stopping


def main() -> int:
    """Run the demo; return the exit status: 0 only if everything was as expected."""
    output = Output()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tenancy-demo-") as name:
        # for root, PostgreSQL runs under another account, which has to traverse this directory
        Path(name).chmod(0o711)
        try:
            finished = asyncio.run(interruptible(run_steps(output, Path(name))))
        except Exception as exc:  # noqa: BLE001 - any error is printed, and the demo fails
            report_failure(output, exc, Path(name) / "uvicorn.log")
            return 1
    if not finished:
        output.console.print("\n[yellow]interrupted; everything is cleaned up[/]")
        return INTERRUPTED
    rows = [(title, f"{seconds:.2f} s") for title, seconds in output.times]
    rows.append(("[bold]All[/]", f"[bold]{time.perf_counter() - started:.2f} s[/]"))
    output.console.print()
    output.table("Time by step", ("step", "time"), rows)
    output.console.print("[bold green]Everything was as expected.[/]")
    return 0


def report_failure(output: Output, exc: Exception, log: Path) -> None:
    """Print the error, and the end of the server's log."""
    if isinstance(exc, DemoError):
        output.console.print(f"[bold red]{escape(str(exc))}[/]")
    else:
        output.console.print_exception(show_locals=False)
    if log.exists() and (lines := log.read_text(errors="replace").splitlines()):
        output.console.print("[bold]the end of the server's log:[/]")
        output.console.print(escape("\n".join(lines[-20:])))


if __name__ == "__main__":
    sys.exit(main())
