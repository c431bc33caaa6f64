"""``tenancy servers pgbouncer``: the configuration of a PgBouncer for tenants' sessions, and a check of one."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..control.names import Names
from ..errors import ConfigurationError, MissingExtraError
from ..postgres import connections
from ..provisioning.server_objects.scram import scram_verifier
from ..servers.pgbouncer import PgBouncerFiles, files, new_password, parse_version
from ..servers.pgbouncer_check import Caller, Finding, check_function, check_logins, check_settings
from ..servers.server import Server
from ..tenancy import Tenancy
from ..tenant import Status
from .output import console, print_json
from .runtime import EXIT_FAILED, Json, fail, given_url, run

_USERLIST = "userlist.txt"


def pgbouncer(
    server: Annotated[str | None, typer.Argument(help="The server's name; not needed where there is one.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A directory to write the files into; they are printed where None.")
    ] = None,
    for_version: Annotated[str, typer.Option("--for", help="The oldest version of PgBouncer they are for.")] = "1.25",
    processes: Annotated[int, typer.Option(min=1, help="How many processes of the application connect.")] = 4,
    poolers: Annotated[int, typer.Option(min=1, help="How many PgBouncers serve this server.")] = 1,
    check: Annotated[bool, typer.Option("--check", help="Ask the one at the server's address of tenants.")] = False,
    console_url: Annotated[
        str | None,
        typer.Option(
            "--console",
            help="With --check: the URL of its console, to compare its settings; - reads it from the standard "
            "input, $NAME from a variable.",
        ),
    ] = None,
    directory: Annotated[
        str, typer.Option(help="Where PgBouncer will find userlist.txt, whatever --out is.")
    ] = "/etc/pgbouncer",
    as_json: Json = False,
) -> None:
    """Make the configuration of a PgBouncer for tenants' sessions, or check a running one."""
    if console_url and not check:
        fail("--console needs --check")
    if check:
        _check(server, poolers, console_url and given_url(console_url), as_json=as_json)
        return
    password = _password_in(out) or new_password()

    async def command(tenancy: Tenancy) -> PgBouncerFiles:
        found = _chosen(tenancy, server)
        admin = await found.connect_admin()
        try:
            facts = await found.learn(admin)
            await found.read_settings(admin)
        finally:
            await connections.close(admin)
        return files(
            found.name,
            found.dsn,
            _names(tenancy),
            tenancy.config,
            verifier=scram_verifier(password, iterations=4096),
            password=password,
            version=parse_version(for_version),
            accepted=facts.connections,
            database=facts.database,
            least_limit=_least_limit(tenancy),
            settings=found.session_settings,
            processes=processes,
            poolers=poolers,
            directory=directory,
        )

    made = run(command)
    if out is not None:
        _write(out, made)
    if as_json:
        fields = {"pgbouncer.ini": made.ini, "auth_query.sql": made.sql, "pool_size": made.pool_size}
        # in a file it stays there; without one nobody else has the password that belongs to the verifier
        print_json(fields if out is not None else {**fields, _USERLIST: made.userlist})
    elif out is not None:
        console.print(f"wrote pgbouncer.ini, auth_query.sql and {_USERLIST} to {out}", highlight=False)
    else:
        for name, text in (("pgbouncer.ini", made.ini), ("auth_query.sql", made.sql), (_USERLIST, made.userlist)):
            typer.echo(f"{'--' if name.endswith('sql') else ';'} ----- {name}\n{text}")


def _check(server: str | None, poolers: int, console_url: str | None, *, as_json: bool) -> None:
    shown = None
    if console_url is not None:
        try:
            from ..sync.pgbouncer_console import read_console
        except ImportError as exc:
            raise MissingExtraError("psycopg", "sync") from exc

        def read() -> tuple[str, dict[str, str]]:
            return read_console(console_url)

        shown = read

    async def command(tenancy: Tenancy) -> list[Finding]:
        found, names = _chosen(tenancy, server), _names(tenancy)
        if found.traffic.dsn == found.dsn:
            raise ConfigurationError(
                f"tenants' sessions connect to server {found.name!r} directly; give the pooler's address: tenancy "
                f"servers update {found.name} --tenants 'postgresql://HOST:6432?statement_cache_size=0'"
            )
        admin = await found.connect_admin()
        try:
            findings = await check_function(admin, names)
        finally:
            await connections.close(admin)
        page = await tenancy.tenants.list(status=(Status.ACTIVE, Status.TRIAL), server=found.name, limit=2)
        callers = [
            Caller(one.slug, one.placement.role, one.placement.database, tenancy.internals.provisioner.password(one))
            for one in page.items
            if one.placement is not None
        ]
        if callers:
            findings += await check_logins(found, callers[0], callers[1] if len(callers) > 1 else None)
        else:
            findings.append(Finding(False, f"server {found.name} has no tenant to log in as; create one"))
        if shown is not None:
            version, settings = await asyncio.to_thread(shown)
            findings += check_settings(settings, version, _least_limit(tenancy) // poolers, names)
        return findings

    findings = run(command)
    if as_json:
        print_json([asdict(one) for one in findings])
    else:
        for one in findings:
            console.print(f"{'ok ' if one.ok else 'no '} {one.text}", highlight=False, markup=False, soft_wrap=True)
    if not all(one.ok for one in findings):
        raise typer.Exit(EXIT_FAILED)


def _chosen(tenancy: Tenancy, name: str | None) -> Server:
    servers = tenancy.internals.servers
    if name is None:
        if len(servers) != 1:
            raise ConfigurationError(f"there are several servers, {', '.join(servers)}: name one")
        name = next(iter(servers))
    return servers[name]


def _names(tenancy: Tenancy) -> Names:
    return Names(tenancy.config.name_prefix, tenancy.internals.control.installation)


def _least_limit(tenancy: Tenancy) -> int:
    return min(tier.connection_limit for tier in tenancy.config.tiers.values())


def _password_in(out: Path | None) -> str | None:
    """The password of an earlier run, which the role on the server has already."""
    if out is None or not (out / _USERLIST).exists():
        return None
    try:
        # "user" "password", quoted as in JSON: a password of ours has no quotes and backslashes
        _, _, password = (out / _USERLIST).read_text("utf-8").strip().partition(" ")
        found = json.loads(password)
        return str(found)
    except (OSError, ValueError) as exc:
        return fail(f"{out / _USERLIST} was not written by this command; choose another directory: {exc}")


def _write(out: Path, made: PgBouncerFiles) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "pgbouncer.ini").write_text(made.ini, "utf-8")
        descriptor = os.open(out / _USERLIST, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(made.userlist)
        (out / "auth_query.sql").write_text(made.sql, "utf-8")
    except OSError as exc:
        fail(f"the files cannot be written: {exc}")


__all__ = ["pgbouncer"]
