"""``tenancy servers``: the PostgreSQL servers that hold tenants."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isinf
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import typer

from ..audit.log import AuditLog
from ..config import ServerAddresses, TenancyConfig
from ..connections.rows import ServerLeases
from ..control.database import ControlDatabase
from ..errors import ConfigurationError, SettingError
from ..postgres.dsn import Dsn
from ..server_management.fields import UNSET, Unset
from ..server_management.known_servers import KnownServer
from ..servers import Servers
from ..servers.placement import PlacementExplanation
from ..servers.rows import ServerRow, set_maintenance_database
from ..tenancy import Tenancy
from .output import console, errors, print_fields, print_json, print_table
from .pgbouncer import pgbouncer
from .preparation import prepare_server
from .runtime import (
    TENANT_NAMES,
    Json,
    Yes,
    confirm,
    exit_on_error,
    fail,
    given_url,
    load_tenancy,
    operator,
    run,
    variable,
)

T = TypeVar("T")

app = typer.Typer(help="The servers that hold tenants: add, change, drain and remove them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The server's name.")]
Tenants = Annotated[
    str | None,
    typer.Option(
        "--tenants", help="Where tenants' sessions connect to, host and port: a pooler, for example; '' for none."
    ),
]
Replicas = Annotated[
    list[str] | None,
    typer.Option("--replica", help="A standby that follows it, host and port; repeatable, '' for none."),
]
Peer = Annotated[
    str | None,
    typer.Option("--peer", help="Where other servers reach it while a tenant is moved, host and port; '' for none."),
]
AskPassword = Annotated[
    bool, typer.Option("--password", help="Ask for the administrator's password, which the URL does not have.")
]
PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the administrator's password from the standard input.")
]
PasswordVariable = Annotated[
    str | None, typer.Option("--password-variable", help="Read the administrator's password from this variable.")
]
Region = Annotated[str | None, typer.Option(help="Where it is, as tenants name it; '' for no region.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="What placement may want to know, name=value; repeatable.")
]
Capacity = Annotated[
    str | None, typer.Option(help="How many tenants it may hold, deleted ones too; 'none' for any number.")
]
Weight = Annotated[float | None, typer.Option(help="Its share of new tenants, in proportion to the other weights.")]
MaxConnections = Annotated[
    str | None,
    typer.Option(help="Connections of all processes together; 'none' for as many as the server offers."),
]
MaxOpening = Annotated[str | None, typer.Option(help="Logins at once; 'none' for the default.")]


@app.command()
def add(
    server: Name,
    url: Annotated[
        str,
        typer.Argument(help="Its administrative URL; - reads it from the standard input, $NAME from a variable."),
    ],
    tenants: Tenants = None,
    replica: Replicas = None,
    peer: Peer = None,
    ask_password: AskPassword = False,
    password_stdin: PasswordStdin = False,
    password_variable: PasswordVariable = None,
    region: Region = None,
    label: Labels = None,
    capacity: Capacity = None,
    weight: Weight = None,
    max_connections: MaxConnections = None,
    max_opening: MaxOpening = None,
    drain: Annotated[bool, typer.Option("--drain", help="Add it in drain: it takes no tenants yet.")] = False,
    same_cluster: Annotated[
        bool, typer.Option("--same-cluster", help="Accept a cluster that is a server already, by another name.")
    ] = False,
    keep_access: Annotated[
        list[str] | None,
        typer.Option("--keep-access", help="A role, 'all' or 'connected': who would lose access keeps it; repeatable."),
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Add a server. It is verified, and prepared as tenancy init does; its addresses are sealed in its row."""
    addresses = _addresses(url, tenants, replica, peer, ask_password, password_stdin, password_variable)
    options: dict[str, Any] = {
        "region": region or None,
        "labels": _labels(label) or {},
        "capacity": _number(capacity),
        "weight": 1.0 if weight is None else weight,
        "max_connections": _number(max_connections),
        "max_opening": _number(max_opening),
    }

    async def check(tenancy: Tenancy) -> tuple[TenancyConfig, bool]:
        return tenancy.config, any(found.name == server for found in await tenancy.servers.list())

    config, known = run(check)
    if not known:
        prepare_server(config, server, addresses, keep=keep_access or (), yes=yes, as_json=as_json)

    async def command(tenancy: Tenancy) -> ServerRow:
        return await tenancy.servers.add(
            server, addresses, drain=drain, same_cluster=same_cluster, actor=operator(), **options
        )

    row = run(command)
    if as_json:
        print_json(_row_fields(row))
    else:
        state = " in drain" if drain else ""
        console.print(f"added server {row.name} at {row.host}:{row.port}{state}", highlight=False)


@app.command("list")
def list_servers(as_json: Json = False) -> None:
    """List the servers, where their addresses come from, and how many tenants each holds."""

    async def command(tenancy: Tenancy) -> list[KnownServer]:
        return await tenancy.servers.list()

    found = run(command)
    if as_json:
        print_json([_known_fields(server) for server in found])
        return
    columns = (
        *("server", "address", "tenants' address", "replicas", "from", "region", "state", "tenants", "capacity"),
        *("weight", "maintenance database"),
    )
    rows = [
        (
            known.name,
            f"{known.row.host}:{known.row.port}",
            known.tenants_address,
            len(known.replicas),
            known.source,
            known.row.region,
            known.row.state,
            known.row.tenants,
            known.row.capacity,
            f"{known.row.weight:g}",
            known.row.maintenance_database,
        )
        for known in found
    ]
    print_table("servers", columns, rows)
    for known in found:
        for warning in known.warnings:
            errors.print(f"server {known.name}: {warning}", markup=False, highlight=False)


@app.command()
def show(server: Name, as_json: Json = False) -> None:
    """Show one server."""

    async def command(tenancy: Tenancy) -> KnownServer:
        return await tenancy.servers.get(server)

    fields = _known_fields(run(command))
    if as_json:
        print_json(fields)
    else:
        print_fields(server, fields)


@app.command()
def update(
    server: Name,
    url: Annotated[
        str | None,
        typer.Option(
            "--admin", help="Its new administrative URL; - reads it from the standard input, $NAME a variable."
        ),
    ] = None,
    tenants: Tenants = None,
    replica: Replicas = None,
    peer: Peer = None,
    ask_password: AskPassword = False,
    password_stdin: PasswordStdin = False,
    password_variable: PasswordVariable = None,
    from_settings: Annotated[
        bool, typer.Option("--from-settings", help="Put the addresses of this process's settings into its row.")
    ] = False,
    accept_identity: Annotated[
        bool, typer.Option("--accept-identity", help="Accept another cluster: its tenants were moved there.")
    ] = False,
    region: Region = None,
    label: Labels = None,
    capacity: Capacity = None,
    weight: Weight = None,
    max_connections: MaxConnections = None,
    max_opening: MaxOpening = None,
    as_json: Json = False,
) -> None:
    """Change a server; what is not given stays. Every process follows without a restart."""
    if url is None and (ask_password or password_stdin or password_variable):
        fail("give --admin as well, for the password", kind="ConfigurationError")
    password = (ask_password, password_stdin, password_variable)
    admin = None if url is None else _addresses(url, None, None, None, *password).admin
    options: dict[str, Any] = {
        "tenants_address": UNSET if tenants is None else tenants or None,
        "replicas": UNSET if replica is None else [one for one in replica if one],
        "peer_address": UNSET if peer is None else peer or None,
        "region": UNSET if region is None else region or None,
        "labels": UNSET if label is None else _labels(label) or {},
        "capacity": _number_or_unset(capacity),
        "weight": UNSET if weight is None else weight,
        "max_connections": _number_or_unset(max_connections),
        "max_opening": _number_or_unset(max_opening),
    }

    moves = from_settings or any(one is not None for one in (admin, tenants, replica, peer))

    async def command(tenancy: Tenancy) -> tuple[ServerRow, bool]:
        was_in_row = not moves or (await tenancy.servers.get(server)).source == "row"
        changed = await tenancy.servers.update(
            server,
            addresses=admin,
            from_settings=from_settings,
            accept_identity=accept_identity,
            actor=operator(),
            **options,
        )
        return changed, was_in_row

    row, was_in_row = run(command)
    _print_row(row, "changed", as_json)
    if not was_in_row:
        errors.print(
            f"the addresses of server {server} are in its row from now on; what the settings say is ignored",
            markup=False,
            highlight=False,
        )


@app.command()
def drain(server: Name, as_json: Json = False) -> None:
    """Place no new tenants on a server; those that it has stay."""

    async def command(tenancy: Tenancy) -> ServerRow:
        return await tenancy.servers.drain(server, actor=operator())

    _print_row(run(command), "in drain", as_json)


@app.command()
def activate(server: Name, as_json: Json = False) -> None:
    """Let a server in drain take tenants again."""

    async def command(tenancy: Tenancy) -> ServerRow:
        return await tenancy.servers.activate(server, actor=operator())

    _print_row(run(command), "active", as_json)


@app.command()
def remove(
    server: Name,
    drop_templates: Annotated[
        bool, typer.Option("--drop-templates", help="Drop its templates and warm databases first.")
    ] = False,
    forget_templates: Annotated[
        bool,
        typer.Option("--forget-templates", help="Leave its templates and warm databases: the server does not exist."),
    ] = False,
    yes: Yes = False,
) -> None:
    """Remove a server that holds no tenants any more."""
    if drop_templates and forget_templates:
        fail("give --drop-templates or --forget-templates, not both", kind="ConfigurationError")
    if not yes and not confirm(f"Remove server {server}?"):
        fail("nothing was changed")

    async def command(tenancy: Tenancy) -> None:
        await tenancy.servers.remove(
            server,
            templates="drop" if drop_templates else "forget" if forget_templates else "refuse",
            actor=operator(),
        )

    run(command)
    console.print(f"removed server {server}", highlight=False)


@app.command()
def explain(
    tenant: Annotated[str | None, typer.Argument(help=f"{TENANT_NAMES}; a new tenant if not given.")] = None,
    tier: Annotated[
        str | None, typer.Option(help="The tier; the tenant's own, or the default tier, if not given.")
    ] = None,
    region: Annotated[str | None, typer.Option(help="The region; the tenant's own if not given.")] = None,
    server: Annotated[str | None, typer.Option(help="The server that would be asked for.")] = None,
    as_json: Json = False,
) -> None:
    """Say on which server a tenant would be placed now, and why not on the others."""

    async def command(tenancy: Tenancy) -> PlacementExplanation:
        return await tenancy.servers.explain(tenant, tier=tier, region=region, server=server)

    found = run(command)
    if as_json:
        print_json(found)
        return
    columns = ("server", "region", "tenants", "capacity", "score", "verdict")
    print_table("placement", columns, [_verdict(one, found.current) for one in found.servers])
    subject = f"tenant {found.request.slug}" if found.request.slug else "a new tenant"
    where = f"would be placed on {found.chosen}" if found.chosen else "would not be placed"
    if found.current is not None:
        where = f"is on {found.current}, and {where} now"
    line = f"{subject} (tier {found.request.tier}, region {found.request.region or 'any'}) {where}: {found.rule}"
    console.print(line, markup=False, highlight=False)


@app.command("connections")
def show_connections(as_json: Json = False) -> None:
    """Show which process has leased how many connections to which server, and the caps that they share."""

    async def command(tenancy: Tenancy) -> list[ServerLeases]:
        leases = tenancy.internals.leases
        # without this command's own
        return [
            replace(found, leases=tuple(row for row in found.leases if row.process not in leases.processes))
            for found in await leases.read()
            if _is_there(tenancy.internals.servers, found.server)
        ]

    found = run(command)
    if as_json:
        print_json(
            [
                {
                    **asdict(server),
                    "counted_ago": None if isinf(server.counted_ago) else round(server.counted_ago, 1),
                    "leases": [{**asdict(row), "borrowed": row.borrowed} for row in server.leases],
                }
                for server in found
            ]
        )
        return
    print_table(
        "servers",
        ("server", "cap", "leased", "accepted by the server", "used by others"),
        [(one.server, one.cap, sum(row.granted for row in one.leases), one.accepted, one.others) for one in found],
    )
    columns = ("server", "host", "pid", "guaranteed", "borrowed", "leased", "in use", "state")
    print_table(
        "processes",
        columns,
        [
            (one.server, row.host, row.pid, row.guaranteed, row.borrowed, row.granted, row.in_use, row.state)
            for one in found
            for row in one.leases
        ],
    )


@app.command("set-maintenance-database")
def set_database(
    server: Name,
    database: Annotated[str, typer.Argument(help="The database that its administrative URL names from now on.")],
    yes: Yes = False,
) -> None:
    """Let a server's administrative URL name another database. Stop every process first. Audited."""
    if not yes and not confirm("Is every process that uses this installation stopped?"):
        fail("nothing was changed")

    # without opening the Tenancy, which is refused where the URL names the new database already
    async def command() -> str | None:
        config = load_tenancy().config
        if config.is_embedded:
            raise ConfigurationError("an embedded server's maintenance database does not change")
        control = ControlDatabase(config.control_url, direct=config.listen_dsn)
        try:
            await control.open()
            return await set_maintenance_database(control, AuditLog(control), server, database, actor=operator())
        finally:
            await control.close()

    former = exit_on_error(lambda: asyncio.run(command()))
    console.print(f"the maintenance database of {server} was {former} and is {database}", highlight=False)


app.command("pgbouncer")(pgbouncer)


# --- what was given ---------------------------------------------------------------------------------------------------


def _addresses(
    url: str,
    tenants: str | None,
    replicas: Sequence[str] | None,
    peer: str | None,
    ask_password: bool,
    password_stdin: bool,
    password_variable: str | None,
) -> ServerAddresses:
    if sum((ask_password, password_stdin, password_variable is not None)) > 1 or (url == "-" and password_stdin):
        fail("the password can come from one place only", kind="ConfigurationError")
    visible = url != "-" and not url.startswith("$")
    url = given_url(url)
    password = None
    if ask_password:
        password = typer.prompt("Password", hide_input=True, err=True)
    elif password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    elif password_variable is not None:
        password = variable(password_variable)
    if password is not None:
        url = _with_password(url, password)
    elif visible and _has_password(url):
        errors.print(
            "the password is in the command, where other users of this machine can see it while it runs: use "
            "--password, --password-stdin or --password-variable",
            markup=False,
        )
    try:
        found = tuple(one for one in replicas or () if one)
        return ServerAddresses(admin=url, tenants=tenants or None, replicas=found, peer=peer or None)
    except SettingError as exc:
        fail("; ".join(f"{kind}: {reason}" for kind, reason in exc.problems.items()), kind="ConfigurationError")


def _has_password(url: str) -> bool:
    try:
        return Dsn.parse(url).has_secret
    except ConfigurationError:
        return False


def _with_password(url: str, password: str) -> str:
    try:
        found = Dsn.parse(url)
    except ConfigurationError as exc:
        fail(f"admin: {exc}", kind="ConfigurationError")
    if found.password is not None:
        fail("the URL has a password already", kind="ConfigurationError")
    if found.user is None:
        fail("the URL names no user for the password", kind="ConfigurationError")
    if "://" not in url.partition("=")[0]:
        value = password.replace("\\", "\\\\").replace("'", "\\'")
        return f"{url} password='{value}'"
    # as a parameter: what is before it may name several hosts, or none
    return f"{url}{'&' if '?' in url else '?'}password={quote(password, safe='')}"


def _labels(given: Sequence[str] | None) -> dict[str, str]:
    pairs = [label.partition("=") for label in given or () if label]
    if not all(separator and name for name, separator, _ in pairs):
        fail("a label is name=value", kind="ConfigurationError")
    return {name: value for name, _, value in pairs}


def _number(given: str | None) -> int | None:
    if given is None or given.lower() == "none":
        return None
    if not given.isdecimal() or len(given) > 10:
        fail(f"{given!r} is neither a whole number nor 'none'", kind="ConfigurationError")
    return int(given)


def _number_or_unset(given: str | None) -> int | Unset | None:
    return UNSET if given is None else _number(given)


# --- output -----------------------------------------------------------------------------------------------------------


def _is_there(servers: Servers, name: str) -> bool:
    """Whether this is not a replica that its server has no more; processes may have leases of it still."""
    server, _, number = name.partition("/")
    found = servers.get(server) if number else None
    return found is None or any(replica.name == name for replica in found.replicas)


def _print_row(row: ServerRow, what: str, as_json: bool) -> None:
    if as_json:
        print_json(_row_fields(row))
    else:
        console.print(f"server {row.name} is {what}", highlight=False)


def _row_fields(row: ServerRow) -> dict[str, Any]:
    """Return a row as JSON values, without what is sealed."""
    return {
        "name": row.name,
        "host": row.host,
        "port": row.port,
        "maintenance_database": row.maintenance_database,
        "region": row.region,
        "labels": dict(row.labels),
        "capacity": row.capacity,
        "weight": row.weight,
        "state": row.state,
        "accepts_tenants": row.accepts_tenants,
        "max_connections": row.max_connections,
        "max_opening": row.max_opening,
        "identity": row.identity,
        "tenants": row.tenants,
    }


def _known_fields(known: KnownServer) -> dict[str, Any]:
    more: Mapping[str, Any] = {
        "addresses_from": known.source,
        "tenants_address": known.tenants_address,
        "replicas": list(known.replicas),
        "peer_address": known.peer_address,
        "warnings": list(known.warnings),
    }
    return {**_row_fields(known.row), **more}


def _verdict(one: Any, current: str | None) -> tuple[Any, ...]:
    score = None if one.score is None else " / ".join(f"{number:.4g}" for number in one.score)
    verdict = "chosen" if one.chosen else one.refused or "not the lowest score"
    if one.server == current:
        verdict += " (it is there)"
    return one.server, one.region, one.tenants, one.capacity, score, verdict
