"""``tenancy tiers``: the tiers in force."""

from __future__ import annotations

import typer

from ..tenancy import Tenancy
from ..tenants.tiers import TierChanges, differing
from .output import note, print_json, print_report, print_table
from .runtime import Json, operator, run

app = typer.Typer(help="Show the tiers in force, and put the configured ones in force.", no_args_is_help=True)


@app.command("list")
def list_tiers(as_json: Json = False) -> None:
    """List the weights and limits of the tiers in force, and the configured tiers that differ."""

    async def command(
        tenancy: Tenancy,
    ) -> tuple[dict[str, dict[str, dict[str, object]]], dict[str, float], tuple[str, ...]]:
        in_force, weights = await tenancy.tiers.limits_and_weights()
        return in_force, weights, differing(in_force, tenancy.config.tiers, weights)

    found, weights, names = run(command)
    if as_json:
        print_json({"in_force": found, "weights": weights, "differing": names})
        return
    rows: list[tuple[object, ...]] = []
    for tier, limits in found.items():
        weight = f"{weights[tier]:g}"
        if not limits:
            rows.append((tier, weight, "-", "-", "-"))
        for resource, limit in limits.items():
            amount = "unlimited" if limit["amount"] is None else limit["amount"]
            rows.append((tier, weight, resource, amount, limit["period"]))
    print_table("tiers in force", ("tier", "weight", "resource", "amount", "period"), rows)
    if names:
        note(f"configured differently: {', '.join(names)}; to put them in force: tenancy tiers apply")


@app.command()
def apply(as_json: Json = False) -> None:
    """Put the configured tiers in force, in every process at once. Run it on deployment. Audited."""

    async def command(tenancy: Tenancy) -> TierChanges:
        return await tenancy.tiers.apply(tenancy.config.tiers, actor=operator())

    changes = run(command)
    print_report("tiers", changes, as_json=as_json)
