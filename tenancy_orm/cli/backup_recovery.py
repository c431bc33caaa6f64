"""``tenancy backup base``, ``wal`` and ``window``: what one tenant can be brought back to a point in time with."""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import typer

from ..restores.recovery import BaseBackup, BaseReport, RecoveryWindow, WalEvent
from ..tenancy import Tenancy
from .output import Column, console, json_text, note, print_json, print_table
from .runtime import Json, fail, operator, run, run_stoppable

Server = Annotated[
    str | None, typer.Option("--server", "-s", help="The server; the only or the default one where none is named.")
]


def base(
    server: Server = None,
    listed: Annotated[bool, typer.Option("--list", help="List the base backups, and take none.")] = False,
    verify: Annotated[
        str | None, typer.Option("--verify", help="Verify the base backup of this id, or the newest; and take none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take a base backup of a whole server, verify it, and delete what no time needs that is kept."""
    if listed and verify is not None:
        fail("--list and --verify cannot be combined")
    if listed:
        _list(server, as_json)
    elif verify is not None:
        _verify(server, None if verify == "newest" else verify, as_json)
    else:
        _take(server, as_json)


def _take(server: str | None, as_json: bool) -> None:
    async def command(tenancy: Tenancy) -> BaseReport:
        return await tenancy.recovery.take_base(server, actor=operator())

    report = run_stoppable(command)
    if as_json:
        print_json(report)
        return
    taken = report.taken
    console.print(
        f"base backup {taken.id} of server {taken.server}: {taken.size_bytes:,} bytes, verified", markup=False
    )
    for pruned in report.pruned:
        note(f"deleted {pruned.id}: no time that can still be recovered needs it")


def _verify(server: str | None, chosen: str | None, as_json: bool) -> None:
    async def command(tenancy: Tenancy) -> BaseBackup:
        return await tenancy.recovery.verify_base(server, base=chosen)

    verified = run(command)
    if as_json:
        print_json(verified)
    else:
        console.print(f"base backup {verified.id} of server {verified.server} is undamaged", markup=False)


def _list(server: str | None, as_json: bool) -> None:
    async def command(tenancy: Tenancy) -> list[BaseBackup]:
        return list(await tenancy.recovery.bases(server))

    found = run(command)
    if as_json:
        print_json(found)
        return
    columns = (Column("base", keep=True), "server", "version", "ended", "bytes", Column("first WAL", drop=1))
    rows = [(one.id, one.server, one.version, one.ended_at, one.size_bytes, one.first_segment) for one in found]
    print_table("base backups", columns, rows)


def wal(
    server: Server = None,
    drop_slot: Annotated[
        bool,
        typer.Option("--drop-slot", help="Receive nothing, and let the server keep nothing more for this."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Receive a server's WAL as it is written, until SIGINT or SIGTERM. Run it as a service, one for each server."""

    def show(event: WalEvent) -> None:
        if event.kind == "received":
            return  # several a minute
        if as_json:
            # one line each, as they come
            print(json_text({"kind": event.kind, "text": event.text}), flush=True)
        else:
            note(f"{event.kind}: {event.text}")

    async def command(tenancy: Tenancy) -> None:
        if drop_slot:
            await tenancy.recovery.drop_slot(server)
            return
        main = asyncio.current_task()
        assert main is not None  # noqa: S101 - for the type checker
        for number in (signal.SIGINT, signal.SIGTERM):
            # once: a second cancellation would interrupt the end of the program that receives
            asyncio.get_running_loop().add_signal_handler(number, lambda: main.cancelling() or main.cancel())
        try:
            await tenancy.recovery.receive_wal(server, progress=show)
        except asyncio.CancelledError:
            main.uncancel()

    run(command)


def window(server: Server = None, as_json: Json = False) -> None:
    """Show the times that tenants of a server can be brought back to."""

    async def command(tenancy: Tenancy) -> RecoveryWindow:
        return await tenancy.recovery.window(server)

    found = run(command)
    if as_json:
        print_json(found)
        return
    if found.oldest is None:
        console.print(f"server {found.server}: there is no base backup; no time can be recovered", markup=False)
        note(f"take one with: tenancy backup base --server {found.server}")
        return
    newest = "no transaction is received yet" if found.newest is None else f"to {found.newest.isoformat()}"
    console.print(f"server {found.server}: from {found.oldest.isoformat()} {newest}", markup=False)
    for begin, end in found.gaps:
        first = "its beginning" if begin is None else begin.isoformat()
        last = "the next base backup" if end is None else end.isoformat()
        console.print(f"WAL is missing: no time from {first} to {last} can be recovered", markup=False)


def register(app: typer.Typer) -> None:
    """Add the commands to ``tenancy backup``."""
    app.command("base")(base)
    app.command("wal")(wal)
    app.command("window")(window)


__all__ = ["register"]
