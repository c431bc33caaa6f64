"""The root of the command line and the commands on tenants."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from ..housekeeping import HousekeepingReport
from ..provisioning import Difference, ReconcileReport
from ..registry.lifecycle import check_transition
from ..registry.rows import TenantPage
from ..tenancy import Tenancy
from ..tenant import Status, Tenant
from . import (
    adopt,
    audit,
    backup,
    backup_recovery,
    backup_restore,
    call,
    clone,
    config,
    dev,
    domains,
    drill,
    each,
    erasure,
    export,
    jobs,
    keys,
    members,
    migrate,
    migrate_compatible,
    migrate_preflight,
    migrate_runs,
    migrate_undo,  # noqa: F401 - its commands are those of migrate
    move,
    operations,
    quotas,
    rebuild,
    revocations,
    schedule,
    secrets,
    seed,
    servers,
    sql,
    template,
    tiers,
    usage,
    warm_pool,
)
from .metadata import Metadata, MetadataFilter, NewMetadata, SetMetadata, UnsetMetadata, parse_merge, parse_metadata
from .output import Column, console, note, print_fields, print_json, print_report, print_table, tenant_fields
from .runtime import Json, TenantArgument, Yes, confirm, days_from_now, exit_on_error, fail, operator, run

app = typer.Typer(
    name="tenancy",
    help="Give every tenant its own PostgreSQL database.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(config.app, name="config")
app.add_typer(keys.app, name="keys")
app.add_typer(members.app, name="members")
app.add_typer(revocations.app, name="revocations")
app.add_typer(migrate.app, name="migrate")
migrate.app.command("preflight")(migrate_preflight.preflight)
migrate.app.command("compatible")(migrate_compatible.compatible)
migrate_runs.register(migrate.app)
app.add_typer(quotas.app, name="quotas")
app.add_typer(usage.app, name="usage")
app.add_typer(tiers.app, name="tiers")
app.add_typer(template.app, name="template")
app.add_typer(warm_pool.app, name="warm-pool")
app.add_typer(servers.app, name="servers")
app.add_typer(domains.app, name="domains")
app.add_typer(jobs.app, name="jobs")
app.add_typer(operations.app, name="operations")
app.add_typer(schedule.app, name="schedule")
app.add_typer(audit.app, name="audit")
app.add_typer(erasure.app, name="erasure")
app.add_typer(backup.app, name="backup")
backup_restore.register(backup.app)
backup_recovery.register(backup.app)
app.command("drill")(drill.drill)
app.add_typer(secrets.app, name="secrets")
app.command("init")(dev.init)
app.command("dev")(dev.dev)
app.command("psql")(dev.psql)
app.command("secret")(dev.secret)
app.command("sql")(sql.sql)
app.command("each", cls=each.EachCommand)(each.each)
app.command("url")(each.url)
app.command("export")(export.export)
app.command("run")(call.call)
app.command("seed")(seed.seed)
app.command("adopt")(adopt.adopt)
app.command("clone")(clone.clone)
app.command("rebuild")(rebuild.rebuild)
app.command("worker")(jobs.worker)
app.command("move")(move.move)
app.command("rebalance")(move.rebalance)

# at 80 columns: slug, status, tier and id
_LISTED = (
    "slug",
    Column("status", keep=True),
    "tier",
    Column("revision", drop=2),
    Column("created", drop=3),
    Column("id", keep=True),
)

Reason = Annotated[str | None, typer.Option("--reason", "-r", help="Why; recorded in the audit log.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tenancy-orm {installed_version('tenancy-orm')}")
        raise typer.Exit


@app.callback()
def root(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The settings file; tenancy.toml here or above by default.")
    ] = None,
    application: Annotated[
        str | None, typer.Option("--app", help="The application's Tenancy or TenancyConfig, as module:attribute.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Give every tenant its own PostgreSQL database."""
    if config is not None:
        os.environ["TENANCY_CONFIG"] = str(config)
    if application is not None:
        os.environ["TENANCY_APP"] = application


def show_tenant(fields: dict[str, Any], as_json: bool) -> None:
    """Print one tenant."""
    if as_json:
        print_json(fields)
    else:
        print_fields(fields["slug"], fields)


@app.command()
def create(
    slug: Annotated[str, typer.Argument(help="1 to 63 of a-z, 0-9 and inner hyphens; a letter first.")],
    tier: Annotated[str | None, typer.Option(help="A configured tier; the default tier if not given.")] = None,
    metadata: Metadata = None,
    trial: Annotated[bool, typer.Option("--trial", help="Start as a trial.")] = False,
    trial_days: Annotated[
        float | None, typer.Option(min=0, help="Start as a trial; housekeeping suspends it after this many days.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="The server to place it on; what placement or default_server says if not given.")
    ] = None,
    region: Annotated[
        str | None, typer.Option(help="Where its data has to stay: it is only ever placed on a server of this region.")
    ] = None,
    seeded: Annotated[
        bool, typer.Option("--seed/--no-seed", help="Whether the seeds run that are not in the template.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Create a tenant with its database, and print its API key. The key is not shown again."""
    given = exit_on_error(lambda: parse_metadata(metadata))
    trial_ends_at = None if trial_days is None else days_from_now(trial_days)

    async def command(tenancy: Tenancy) -> dict[str, Any]:
        created = await tenancy.tenants.create(
            slug,
            tier=tier,
            metadata=given,
            status="trial" if trial or trial_ends_at else "active",
            trial_ends_at=trial_ends_at,
            server=server,
            region=region,
            seed=seeded,
            actor=operator(),
        )
        return {"api_key": created.api_key, "key_id": created.key_id, **tenant_fields(created.tenant)}

    fields = run(command)
    if as_json:
        print_json(fields)
        return
    where = f"on server {fields['server']}"
    console.print(f"created [bold]{fields['slug']}[/] ({fields['tier']}) {where} as {fields['id']}", highlight=False)
    console.print("API key, not shown again:", highlight=False)
    # without styles, so that it can be selected and piped
    print(fields["api_key"])


@app.command("list")
def list_tenants(
    status: Annotated[list[str] | None, typer.Option(help="Only these statuses; repeatable.")] = None,
    tier: Annotated[list[str] | None, typer.Option(help="Only these tiers; repeatable.")] = None,
    server: Annotated[str | None, typer.Option(help="Only tenants on this server.")] = None,
    region: Annotated[str | None, typer.Option(help="Only tenants of this region.")] = None,
    slug: Annotated[
        str | None, typer.Option(help="Only slugs that match this pattern: * is any text, ? one character ('ac*').")
    ] = None,
    metadata: MetadataFilter = None,
    count: Annotated[bool, typer.Option("--count", help="Print how many there are, and nothing else.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="How many at most.")] = 100,
    after: Annotated[UUID | None, typer.Option(help="Continue after this id.")] = None,
    as_json: Json = False,
) -> None:
    """List tenants in order of creation, and say on standard error how many there are."""
    given = exit_on_error(lambda: parse_metadata(metadata))

    async def command(tenancy: Tenancy) -> tuple[TenantPage, int]:
        which: Any = {"status": status or (), "tier": tier or (), "server": server, "slug": slug, "metadata": given}
        which["region"] = region
        if count:
            return TenantPage((), None), await tenancy.tenants.count(**which)
        page = await tenancy.tenants.list(**which, limit=limit, after=after)
        if page.next is None and after is None:
            return page, len(page.items)
        return page, await tenancy.tenants.count(**which)

    page, total = run(command)
    if count:
        if as_json:
            print_json({"count": total})
        else:
            print(total)
        return
    if as_json:
        print_json({"items": [tenant_fields(tenant) for tenant in page.items], "next": page.next, "count": total})
        return
    rows = [(x.slug, x.status.value, x.tier, x.schema_revision, x.created_at, x.id) for x in page.items]
    print_table("tenants", _LISTED, rows)
    number = f"{len(page.items)} of {total}" if len(page.items) < total else str(total)
    note(f"{number} tenant{'s' * (total != 1)}" + (f"; next: --after {page.next}" if page.next else ""))


@app.command()
def show(tenant: TenantArgument, as_json: Json = False) -> None:
    """Show one tenant; where seeds are configured, also the versions that its database has, and those it lacks."""

    async def command(tenancy: Tenancy) -> dict[str, Any]:
        found = await tenancy.tenants.get(tenant)
        has_database = found.placement is not None and found.status is not Status.PROVISIONING
        seeds = await seed.read_status(tenancy, [str(found.id)]) if has_database else {}
        cloned = clone.clone_fields(await tenancy.clones.get(found))
        return {**tenant_fields(found), **cloned, **seed.status_fields(seeds.get(found.slug))}

    show_tenant(run(command), as_json)


@app.command()
def update(
    tenant: TenantArgument,
    tier: Annotated[str | None, typer.Option(help="Its new tier.")] = None,
    metadata: NewMetadata = None,
    changed: SetMetadata = None,
    removed: UnsetMetadata = None,
    timezone: Annotated[str | None, typer.Option(help="IANA time zone of its daily and monthly quotas.")] = None,
    trial_days: Annotated[float | None, typer.Option(min=0, help="End its trial this many days from now.")] = None,
    region: Annotated[
        str | None, typer.Option(help="Where its data has to stay, which must be where it is; '' for anywhere.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Change a tenant's tier, metadata, time zone, end of trial or region."""
    given = exit_on_error(lambda: parse_metadata(metadata))
    merge = exit_on_error(lambda: parse_merge(changed, removed))
    if given is not None and merge is not None:
        fail(
            "give --metadata, which replaces all of it, or --set and --unset, which change a part",
            kind="ConfigurationError",
        )
    trial_ends_at = None if trial_days is None else days_from_now(trial_days)

    async def command(tenancy: Tenancy) -> dict[str, Any]:
        found = await tenancy.tenants.update(
            tenant,
            tier=tier,
            metadata=given,
            merge_metadata=merge,
            timezone=timezone,
            region=region,
            trial_ends_at=trial_ends_at,
            actor=operator(),
        )
        return tenant_fields(found)

    show_tenant(run(command), as_json)


def _change(change: Callable[[Tenancy], Awaitable[Tenant]], as_json: bool) -> None:
    async def command(tenancy: Tenancy) -> dict[str, Any]:
        return tenant_fields(await change(tenancy))

    fields = run(command)
    if as_json:
        print_json(fields)
    else:
        console.print(f"[bold]{fields['slug']}[/] is {fields['status']}", highlight=False)


@app.command()
def suspend(tenant: TenantArgument, reason: Reason = None, as_json: Json = False) -> None:
    """Suspend a tenant: refuse its requests and end its connections. Its data is kept."""
    _change(lambda tenancy: tenancy.tenants.suspend(tenant, reason=reason, actor=operator()), as_json)


@app.command()
def activate(tenant: TenantArgument, as_json: Json = False) -> None:
    """Make a tenant active that is suspended, in trial or in maintenance; an active one stays so."""
    _change(lambda tenancy: tenancy.tenants.activate(tenant, actor=operator()), as_json)


@app.command()
def maintain(tenant: TenantArgument, reason: Reason = None, as_json: Json = False) -> None:
    """Put a tenant into maintenance: its requests get 503 until end-maintenance."""
    _change(lambda tenancy: tenancy.tenants.start_maintenance(tenant, reason=reason, actor=operator()), as_json)


@app.command("end-maintenance")
def end_maintenance(tenant: TenantArgument, as_json: Json = False) -> None:
    """End a tenant's maintenance: it gets its previous status back."""
    _change(lambda tenancy: tenancy.tenants.end_maintenance(tenant, actor=operator()), as_json)


@app.command("start-trial")
def start_trial(
    tenant: TenantArgument,
    days: Annotated[float, typer.Option(min=0, help="How many days the trial lasts, from now.")] = 14.0,
    as_json: Json = False,
) -> None:
    """Start another trial of a suspended tenant."""
    ends_at = days_from_now(days)
    _change(lambda tenancy: tenancy.tenants.start_trial(tenant, ends_at=ends_at, actor=operator()), as_json)


@app.command()
def delete(tenant: TenantArgument, reason: Reason = None, as_json: Json = False) -> None:
    """Delete a tenant softly: refuse its keys, and keep its data until it is purged."""
    _change(lambda tenancy: tenancy.tenants.delete(tenant, reason=reason, actor=operator()), as_json)


@app.command()
def restore(tenant: TenantArgument, as_json: Json = False) -> None:
    """Restore a deleted tenant to its previous status."""
    _change(lambda tenancy: tenancy.tenants.restore(tenant, actor=operator()), as_json)


@app.command()
def purge(
    tenant: TenantArgument,
    lost_server: Annotated[
        str | None,
        typer.Option("--lost-server", help="A server that does not exist any more: forget what the tenant has there."),
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove a deleted tenant permanently: its database, role, keys and secrets, and the keys of its backups."""

    async def command(tenancy: Tenancy) -> dict[str, Any]:
        found = await tenancy.tenants.get(tenant)
        # before the question, which is of no use for a tenant that is not deleted
        if found.status is not Status.PURGED:
            check_transition(found.slug, found.status, Status.PURGED)
        if not yes and not confirm(f"Permanently remove the database of {found.slug}?"):
            fail("nothing was removed")
        await tenancy.tenants.purge(found, lost_server=lost_server, actor=operator())
        certificate = await tenancy.erasures.complete(found.id, actor=operator())
        erased = {"erased_at": certificate.issued_at, "backup_keys": len(certificate.backup_keys)}
        return {"id": str(found.id), "slug": found.slug, "status": "purged", **erased}

    fields = run(command)
    if as_json:
        print_json(fields)
    else:
        console.print(
            f"[bold]{fields['slug']}[/] is purged; its certificate: tenancy erasure certificate {fields['id']}",
            highlight=False,
        )


@app.command()
def rename(
    tenant: TenantArgument,
    slug: Annotated[str, typer.Argument(help="The new slug.")],
    redirect_days: Annotated[float, typer.Option(min=0, help="How many days the old slug redirects.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Give a tenant another slug. The old one redirects for a time, and no other tenant can have it until then."""

    async def command(tenancy: Tenancy) -> dict[str, Any]:
        changed = await tenancy.tenants.rename(tenant, slug, redirect_seconds=redirect_days * 86_400, actor=operator())
        return tenant_fields(changed)

    show_tenant(run(command), as_json)


@app.command("run-maintenance", hidden=True)  # an alias
@app.command()
def housekeeping(as_json: Json = False) -> None:
    """Do what is due: end trials, suspend, purge after retention, reconcile. Run it from a timer."""

    async def command(tenancy: Tenancy) -> Any:
        return await tenancy.run_housekeeping(actor=operator())

    report = run(command)
    _show_housekeeping(report, as_json=as_json)
    if report.errors:
        raise typer.Exit(1)


@app.command()
def watch(
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two checks.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Check once, and print what was ended.")] = False,
    as_json: Json = False,
) -> None:
    """End tenants' sessions that would block a server for the others. Run it as a service that is always connected."""

    async def watch_once(tenancy: Tenancy) -> Any:
        return await tenancy.internals.provisioner.end_excessive_sessions(actor=operator())

    async def watch_forever(tenancy: Tenancy) -> None:
        await tenancy.internals.provisioner.watchdog.watch(every=every, actor=operator())

    if not once:
        run(watch_forever)
        return
    report = run(watch_once)
    print_report("watch", report, as_json=as_json)
    if report.errors:
        raise typer.Exit(1)


@app.command()
def reconcile(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit status 1 if anything differs.")] = False,
    adopt_marker: Annotated[
        list[str] | None,
        typer.Option(help="Set the missing marker of this tenant's database, which must be its own; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Finish or undo what was interrupted, and mend tenants' databases and roles that are not as created."""

    async def command(tenancy: Tenancy) -> ReconcileReport:
        adopt = [str((await tenancy.tenants.get(tenant)).id) for tenant in adopt_marker or ()]
        return await tenancy.internals.provisioner.reconcile(check=check, adopt=adopt, actor=operator())

    report = run(command)
    if as_json:
        print_json(report)
    else:
        _show_reconciled(report, check=check)
    if not (report.clean if check else report.complete):
        raise typer.Exit(1)


def _show_housekeeping(report: HousekeepingReport, *, as_json: bool) -> None:
    reconciled = report.chores.get("reconcile")
    if as_json or not isinstance(reconciled, ReconcileReport):
        print_report("housekeeping", report, as_json=as_json)
        return
    # as reconcile prints them: a line each
    chores = {**report.chores, "reconcile": replace(reconciled, differences=())}
    print_report("housekeeping", replace(report, chores=chores), as_json=False)
    _show_differences(reconciled.differences)


def _show_reconciled(report: ReconcileReport, *, check: bool) -> None:
    names = [field.name for field in fields(report) if field.name != "differences"]
    print_fields("would be reconciled" if check else "reconcile", {name: getattr(report, name) for name in names})
    _show_differences(report.differences, with_remedies=not check)


def _show_differences(differences: Sequence[Difference], *, with_remedies: bool = True) -> None:
    if differences:
        rows = [
            (x.tenant, x.kind, "yes" if x.dangerous else "no", "yes" if x.mended else "no", x.detail)
            for x in differences
        ]
        print_table("differences", ("tenant", "what", "dangerous", "mended", "found"), rows)
    if with_remedies:
        for x in differences:
            if not x.mended and x.remedy:
                console.print(f"a superuser has to run, in database {x.database}:", highlight=False)
                print(f"{x.remedy};")
