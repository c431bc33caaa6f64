"""``tenancy move`` and ``tenancy rebalance``: tenants go to other servers while they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import Progress as ProgressBar

from ..moves import MovePlan, MoveReport
from ..operations import Operation
from ..tenancy import Tenancy
from .output import Column, TenantBar, console, note, print_json, print_table, progress_bar
from .runtime import EXIT_FAILED, TENANT_NAMES, Json, Yes, confirm, fail, operator, run

Offline = Annotated[
    bool, typer.Option("--offline", help="Copy it by a dump, in maintenance, instead of by logical replication.")
]
NoWayBack = Annotated[
    bool,
    typer.Option("--no-way-back", help="The former database does not follow, which saves a worker and a slot each."),
]
Concurrency = Annotated[
    int | None, typer.Option(min=1, max=16, help="Tenants at once; the setting move.concurrency by default.")
]


def move(
    tenant: Annotated[str | None, typer.Argument(help=f"{TENANT_NAMES}.", show_default=False)] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="The server; the one that placement chooses where it is not given.")
    ] = None,
    offline: Offline = False,
    no_way_back: NoWayBack = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Go back to the former server; what was written since is there as well.")
    ] = False,
    confirmed: Annotated[
        bool, typer.Option("--confirm", help="Drop the former database; there is no way back then.")
    ] = False,
    all_from: Annotated[
        str | None, typer.Option("--all-from", help="Move all tenants of this server, which is in drain.")
    ] = None,
    concurrency: Concurrency = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Move a tenant to another server while it is used; its sessions wait for a moment. See also: tenancy rebalance."""
    if (tenant is None) == (all_from is None):
        fail("name a tenant, or give --all-from SERVER", kind="ConfigurationError")
    if (rollback or confirmed) and (
        tenant is None or to is not None or offline or no_way_back or (rollback and confirmed)
    ):
        fail("--rollback and --confirm take a tenant, and nothing else", kind="ConfigurationError")
    if all_from is not None:
        _move_all(all_from, to, offline, not no_way_back, concurrency, as_json)
        return

    async def command(tenancy: Tenancy) -> Operation:
        assert tenant is not None  # noqa: S101 - for the type checker: one of them is given
        if rollback:
            return await tenancy.moves.rollback(tenant, actor=operator())
        if confirmed:
            return await tenancy.moves.confirm(tenant, actor=operator())
        progress = None if as_json else note
        return await tenancy.moves.move(
            tenant, to=to, offline=offline, way_back=not no_way_back, progress=progress, actor=operator()
        )

    if confirmed and not yes and not confirm(f"drop the former database of {tenant}? There is no way back then."):
        fail("nothing was changed")
    found = run(command)
    if as_json:
        print_json(found)
    else:
        _show(found)


def rebalance(
    apply: Annotated[bool, typer.Option("--apply", help="Do it.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Moves at most.")] = 100,
    offline: Offline = False,
    no_way_back: NoWayBack = False,
    concurrency: Concurrency = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Propose which tenants should be on other servers, and why: drain, capacity, weights, the placement policy."""

    async def propose(tenancy: Tenancy) -> MovePlan:
        return await tenancy.moves.plan(limit=limit)

    plan = run(propose)
    if not apply:
        if as_json:
            print_json(_plan_fields(plan))
        else:
            _show_plan(plan)
        return
    if not as_json:
        _show_plan(plan)
    if plan.moves and not yes and not confirm(f"move {len(plan.moves)} tenants?"):
        fail("nothing was changed")

    async def command(tenancy: Tenancy, bar: ProgressBar) -> MoveReport:
        return await tenancy.moves.apply(
            plan,
            offline=offline,
            way_back=not no_way_back,
            concurrency=concurrency,
            progress=TenantBar(bar, "move"),
            actor=operator(),
        )

    with progress_bar(shown=not as_json) as bar:
        report = run(lambda tenancy: command(tenancy, bar))
    _report(report, as_json)


def _move_all(
    server: str, to: str | None, offline: bool, way_back: bool, concurrency: int | None, as_json: bool
) -> None:
    async def command(tenancy: Tenancy, bar: ProgressBar) -> MoveReport:
        return await tenancy.moves.move_all(
            server,
            to=to,
            offline=offline,
            way_back=way_back,
            concurrency=concurrency,
            progress=TenantBar(bar, "move"),
            actor=operator(),
        )

    with progress_bar(shown=not as_json) as bar:
        report = run(lambda tenancy: command(tenancy, bar))
    _report(report, as_json)


def _show(found: Operation) -> None:
    detail = found.detail
    source, target = detail["from"]["server"], detail["to"]["server"]
    if found.state == "waiting":
        pause = detail.get("pause_seconds")
        waited = "" if pause is None else f"; its sessions waited for {pause:.2f} s"
        console.print(f"{found.slug} is on {target}, it was on {source}{waited}", highlight=False)
        if ended := detail.get("ended_sessions"):
            note(f"{ended} sessions were ended, since their transactions were longer than move.drain_seconds")
        _show_notes(detail)
        if detail.get("reverse") == "following":
            note(f"until {detail['confirm_by']}: tenancy move {found.slug} --rollback; or: --confirm")
        else:
            note(f"there is no way back by --rollback: {detail.get('reverse')}")
            note(f"drop the former database: tenancy move {found.slug} --confirm")
    elif found.state == "undone":
        console.print(f"{found.slug} is on {source} again", highlight=False)
    elif found.state == "done":
        console.print(f"{found.slug} stays on {target}; its database on {source} was dropped", highlight=False)
    else:
        console.print(f"{found.slug} is on {source}: move {found.id} is {found.state}: {found.error}", highlight=False)


def _show_notes(detail: Mapping[str, Any]) -> None:
    objects, tables = detail.get("large_objects", 0), detail.get("unlogged_tables", 0)
    if objects or tables:
        how = "with the dump" if detail["offline"] else "within the pause"
        note(f"copied {how}: {objects} large objects, {tables} unlogged tables")
    if inexact := detail.get("found_by_equal_values"):
        note(
            f"no key: {', '.join(inexact)}; where rows are equal but not identical, such as 1.0 and 1.00, the move "
            "may have updated or deleted another one of them in the new database"
        )


def _plan_fields(plan: MovePlan) -> dict[str, Any]:
    return {
        "moves": [
            {
                "tenant": one.tenant.slug,
                "from": one.moved_from,
                "to": one.moved_to,
                "size_bytes": one.size_bytes,
                "reason": one.reason,
            }
            for one in plan.moves
        ],
        "servers": [asdict(one) for one in plan.servers],
        "stuck": plan.stuck,
    }


def _show_plan(plan: MovePlan) -> None:
    rows = [(one.tenant.slug, one.moved_from, one.moved_to, one.size_bytes, one.reason) for one in plan.moves]
    if rows:
        columns = ("tenant", "from", "to", Column("bytes", drop=1), "reason")
        print_table("moves", columns, rows)
        servers = [
            (one.server, one.state, one.weight, one.tenants, one.tenants_after, one.size_bytes, one.size_bytes_after)
            for one in plan.servers
        ]
        sizes = (Column("bytes", drop=1), Column("bytes after", drop=1))
        named = ("server", "state", "weight", "tenants", "after", *sizes)
        print_table("servers", named, servers)
    else:
        console.print("no tenant needs to be moved", highlight=False)
    for slug, reason in plan.stuck.items():
        note(f"no server takes {slug}: {reason}")


def _report(report: MoveReport, as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        moved = [one for one in report.outcomes if one.error is None]
        console.print(f"moved {len(moved)}, failed {len(report.failures)}", highlight=False)
        if moved:
            print_table("moved", ("tenant", "from", "to"), [(one.slug, one.moved_from, one.moved_to) for one in moved])
        if lost := [one for one in moved if one.reverse != "following"]:
            print_table("no way back by --rollback", ("tenant", "reason"), [(one.slug, one.reverse) for one in lost])
        if report.failures:
            print_table("failed", ("tenant", "error"), [(one.slug, one.error) for one in report.failures])
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


__all__ = ["move", "rebalance"]
