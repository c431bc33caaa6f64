"""``tenancy each`` and ``tenancy url``: other programs on tenants' databases, by temporary logins."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any, BinaryIO

import typer
from typer.core import TyperCommand

from ..errors import TenancyError, counted
from ..postgres.parameters import ENVIRONMENT
from ..provisioning.logins.temporary_logins import DEFAULT_CONNECTIONS, LONGEST_SECONDS, TemporaryLogin
from ..tenancy import Tenancy
from ..tenant import Tenant
from .output import note, print_json
from .runtime import EXIT_FAILED, Json, TenantArgument, duration, fail, operator, run, run_stoppable
from .selection import All, Also, Named, Selection, Statuses, Tiers

_LONGEST_LINE = 1 << 20  # bytes of a line that are kept until its end is known
_END_SECONDS = 5.0  # how long a command may take to end once it was told to
_COMMAND = "tenancy_command"
_OF_THE_SERVER = frozenset({*ENVIRONMENT.values(), "PGHOST", "PGPORT"}) - {"PGPASSFILE", "PGSERVICE", "PGOPTIONS"}

Ttl = Annotated[str, typer.Option(help="How long the login is valid, such as 10m.")]


class EachCommand(TyperCommand):
    """A command that takes another one after ``--``, which click would add to its arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep what is after the first ``--`` for the function."""
        if "--" in args:
            end = args.index("--")
            ctx.meta[_COMMAND] = tuple(args[end + 1 :])
            args = args[:end]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Show the command in the usage."""
        return [*super().collect_usage_pieces(ctx), "-- COMMAND [ARGS]..."]


def each(
    ctx: typer.Context,
    tenants: Named = None,
    tenant: Also = None,
    tier: Tiers = None,
    status: Statuses = None,
    everyone: All = False,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="How many commands at once.")] = 4,
    keep_going: Annotated[bool, typer.Option("--keep-going", "-k", help="Start the others after a failure.")] = False,
    ttl: Ttl = "10m",
) -> None:
    """Run a command for each tenant, with a login to its database in the environment. Exit status 1 if any failed.

    The command gets TENANCY_TENANT_ID, TENANCY_TENANT_SLUG, DATABASE_URL and libpq's PG* variables, and no other
    TENANCY_* variable. The login is made for this run and dropped after it. Each line of output begins with the slug.
    """
    command: tuple[str, ...] = ctx.meta.get(_COMMAND, ())
    if not command:
        fail("there is no command: give one after --", kind="ConfigurationError")
    if shutil.which(command[0]) is None:
        fail(f"there is no program {command[0]!r}", kind="ConfigurationError")
    selection = Selection.of([*(tenants or ()), *(tenant or ())], tier, status, everyone)
    limit = duration(ttl, longest=timedelta(seconds=LONGEST_SECONDS))
    assert limit is not None  # noqa: S101 - for the type checker

    async def work(tenancy: Tenancy) -> Runs:
        runs = Runs(tenancy, command, seconds=limit.total_seconds(), keep_going=keep_going)
        await runs.run(await selection.find(tenancy), concurrency)
        return runs

    finished = run_stoppable(work, stopped="stopped: the commands were ended")
    finished.tell()
    if finished.failed or finished.waiting:
        raise typer.Exit(EXIT_FAILED)


@dataclass
class Runs:
    """The commands of one call."""

    tenancy: Tenancy
    command: Sequence[str]
    seconds: float
    keep_going: bool
    failed: dict[str, str] = field(default_factory=dict)
    waiting: deque[Tenant] = field(default_factory=deque)
    total: int = 0

    async def run(self, tenants: Sequence[Tenant], concurrency: int) -> None:
        """Run the command for each tenant, several at once; a cancellation ends those that run."""
        self.waiting, self.total = deque(tenants), len(tenants)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, self.total)):
                    group.create_task(self._work())
        except ExceptionGroup as exc:
            raise exc.exceptions[0] from None  # whoever reads the output has left

    def tell(self) -> None:
        """List the failures on standard error."""
        for slug, reason in self.failed.items():
            note(f"{slug}: {reason}")
        if self.waiting:
            note(f"not started: {', '.join(tenant.slug for tenant in self.waiting)} (--keep-going starts them)")
        if self.failed:
            note(f"failed for {len(self.failed)} of {counted(self.total)}")

    async def _work(self) -> None:
        while self.waiting and (self.keep_going or not self.failed):
            tenant = self.waiting.popleft()
            try:
                status = await self._run_for(tenant)
            except (TenancyError, OSError) as exc:
                if isinstance(exc, BrokenPipeError):
                    raise
                self.failed[tenant.slug] = str(exc)
                continue
            if status < 0:
                self.failed[tenant.slug] = f"ended by {signal.Signals(-status).name}"
            elif status:
                self.failed[tenant.slug] = f"exit status {status}"

    async def _run_for(self, tenant: Tenant) -> int:
        logins = self.tenancy.internals.provisioner.logins
        async with logins.open(tenant, seconds=self.seconds, purpose="tenancy-each", actor=operator()) as login:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                env=environment_for(os.environ, login),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                # a group of its own: it is ended with what it has started, and before its login is dropped
                start_new_session=True,
            )
            ended = False
            try:
                assert process.stdout is not None and process.stderr is not None  # noqa: S101 - for the type checker
                prefix = f"{tenant.slug}: ".encode()
                await asyncio.gather(
                    _pass_on(process.stdout, sys.stdout.buffer, prefix),
                    _pass_on(process.stderr, sys.stderr.buffer, prefix),
                )
                status = await process.wait()
                ended = True
                return status
            finally:
                if not ended:
                    await _end(process)


def environment_for(inherited: Mapping[str, str], login: TemporaryLogin) -> dict[str, str]:
    """Return the environment of a tenant's command: with its login, and without this program's own credentials."""
    kept = {
        name: value
        for name, value in inherited.items()
        # where a server's URL does not say how to reach it, these do
        if name in _OF_THE_SERVER or not name.startswith(("TENANCY_", "PG"))
    }
    own = {"TENANCY_TENANT_ID": str(login.tenant.id), "TENANCY_TENANT_SLUG": login.tenant.slug}
    return {**kept, **login.environment(), **own}


async def _pass_on(source: asyncio.StreamReader, sink: BinaryIO, prefix: bytes) -> None:
    """Write what a command writes, line by line, each after ``prefix``; lines of several commands are never mixed."""
    rest = b""
    while chunk := await source.read(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        if lines:
            await asyncio.to_thread(_write, sink, b"".join(prefix + line + b"\n" for line in lines))
    if rest:
        await asyncio.to_thread(_write, sink, prefix + rest + b"\n")


def _write(sink: BinaryIO, data: bytes) -> None:
    """Write in a thread: whoever reads it may take long, and logins must be prolonged."""
    sink.write(data)
    sink.flush()


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a command, and what it has started, which may have outlived it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(_END_SECONDS):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def url(
    tenant: TenantArgument,
    ttl: Ttl = "10m",
    connections: Annotated[int, typer.Option(min=1, max=1_000, help="How many at once.")] = DEFAULT_CONNECTIONS,
    as_json: Json = False,
) -> None:
    """Print the URL of a short-lived login to a tenant's database, with its password. Audited."""
    limit = duration(ttl, longest=timedelta(seconds=LONGEST_SECONDS))
    assert limit is not None  # noqa: S101 - for the type checker

    async def command(tenancy: Tenancy) -> TemporaryLogin:
        return await tenancy.internals.provisioner.logins.issue(
            await tenancy.tenants.get(tenant),
            seconds=limit.total_seconds(),
            connection_limit=connections,
            purpose="tenancy-url",
            actor=operator(),
        )

    login = run(command)
    if as_json:
        print_json({"url": login.url, "role": login.role, "expires_at": login.expires_at})
        return
    print(login.url)
    note(f"valid until {login.expires_at:%Y-%m-%d %H:%M:%S %Z}")


__all__ = ["EachCommand", "Runs", "each", "environment_for", "url"]
