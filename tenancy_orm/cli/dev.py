"""``tenancy init``, ``dev``, ``psql`` and ``secret``: project set-up and development."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import secrets
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..config import TenancyConfig, project, sources
from ..config.values import parse_keys
from ..control.database import head
from ..errors import ConfigurationError
from ..postgres.dsn import Dsn
from ..tenancy import Tenancy
from . import preparation, setup
from .output import console, print_json
from .psql import exit_with_psql, run_psql
from .runtime import Json, TenantArgument, Yes, exit_on_error, extend_path, fail, operator, run

_MIGRATIONS = "migrations"
_VARIABLE = "TENANCY_CONTROL_URL"
_SETTINGS = """\
# Settings of tenancy_orm. TENANCY_* environment variables override this file; put credentials there.
{control_url}
{migrations}
# metadata = "app:Base.metadata"      # your models, for alembic revision --autogenerate
# extensions = ["vector"]             # PostgreSQL extensions every tenant gets
"""


def init(
    directory: Annotated[
        Path | None,
        typer.Argument(help="The project's directory; where not given, the project that this directory is in."),
    ] = None,
    control_url: Annotated[
        str | None, typer.Option(help="URL of the control database; an embedded server if not given.")
    ] = None,
    migrations: Annotated[
        str | None, typer.Option(help="Directory of the Alembic environment; migrations if the project has none.")
    ] = None,
    write_env: Annotated[
        bool, typer.Option("--write-env", help="Let an env.py of plain Alembic call environment.run; a copy is kept.")
    ] = False,
    yes: Yes = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be done, and change nothing, neither files nor databases."),
    ] = False,
    keep_access: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE",
            help="Grant this role what PUBLIC loses; all: every role that would lose access; connected: those that are "
            "connected now. Repeatable.",
        ),
    ] = None,
    leave_public: Annotated[
        bool, typer.Option("--leave-public", help="Leave PUBLIC's rights: provisioning.revoke_public = false.")
    ] = False,
    shared_control_database: Annotated[
        bool,
        typer.Option("--shared-control-database", help="Accept a database that holds another application's tables."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Set up a project: settings, Alembic environment, control database and servers.

    An existing Alembic project is used. Preparing a server revokes PUBLIC's rights on databases that are not tenants'.
    Where another role would lose access by that, it is named, and you are asked first.
    """
    here = Path.cwd()
    base = exit_on_error(setup.project_directory) if directory is None else here / directory
    named = None if migrations is None else (here if directory is None else base) / migrations

    with exit_on_error(lambda: setup.entered(base)), project.looking_from(base, above=False):
        extend_path()
        writes_leave_public = leave_public and preparation.leave_public(base)
        plan = exit_on_error(
            lambda: setup.prepare(
                base,
                control_url=control_url,
                migrations=named,
                above=directory is None,
                settings=lambda configured, written: (
                    _settings(configured, control_url, written)
                    + (preparation.LEAVE_PUBLIC if writes_leave_public else "")
                ),
                write_env=write_env,
            )
        )
        prepared = preparation.prepare(
            plan.planned,
            changes=plan.changed,
            yes=yes,
            dry_run=dry_run,
            keep=keep_access or (),
            shared=shared_control_database,
            as_json=as_json,
        )
        if dry_run:
            raise typer.Exit  # which removes a directory that was made to look from
        with plan.undone_on_failure():
            opened = run(_look, initialise=True)
            exit_on_error(plan.write)
        if as_json:
            made = {"created": plan.made, "changed": plan.changed, "installation": opened.installation}
            upgraded = {"upgraded_from": opened.upgraded_from, "unprepared": opened.unprepared}
            print_json({**made, "preparation": prepared, **upgraded, **plan.as_dict()})
        else:
            if base != here:
                console.print(f"the project is in {base}", markup=False, highlight=False, soft_wrap=True)
            _show(plan, opened)
        _report_unprepared(opened.unprepared)


@dataclass(frozen=True, slots=True)
class _Opened:
    """What ``init`` says of a ``Tenancy`` that it has opened.

    Attributes:
        installation: The id of the installation.
        upgraded_from: The revision that the control database had before; None where it was not upgraded.
        owner: The role that revisions run as.
        has_metadata: Whether the settings name the application's models.
        unprepared: By server, why it could not be prepared.
    """

    installation: str
    upgraded_from: str | None
    owner: str
    has_metadata: bool
    unprepared: Mapping[str, str]


async def _look(tenancy: Tenancy) -> _Opened:
    control, provisioner = tenancy.internals.control, tenancy.internals.provisioner
    return _Opened(
        installation=str(control.installation),
        upgraded_from=control.upgraded_from,
        owner=tenancy.migrations.services.names.owner,
        has_metadata=tenancy.config.metadata is not None,
        unprepared={name: str(exc) for name, exc in provisioner.unprepared.items()},
    )


def _show(plan: setup.Setup, opened: _Opened) -> None:
    """Print what was done, for people, and what is left to do."""
    setup.show_done(plan)
    if opened.upgraded_from is not None:
        console.print(f"the control database was upgraded from {opened.upgraded_from} to {head()}", highlight=False)
    console.print(f"the control database is ready (installation {opened.installation})", highlight=False)
    setup.show_env(plan, opened.owner)
    setup.show_next(plan, has_metadata=opened.has_metadata)


def _report_unprepared(unprepared: Mapping[str, str]) -> None:
    """Exit with status 1 where there are servers that could not be prepared."""
    if unprepared:
        fail(
            f"servers that are not prepared: {', '.join(unprepared)}; the control database and the other servers are "
            f"ready. Run tenancy init again when they can be logged in to: {'; '.join(unprepared.values())}"
        )


def _settings(configured: sources.Found, control_url: str | None, migrations: str | None) -> str:
    """Return the settings file of a new project: what nothing else configures, and no URL with a password."""
    found = configured.values.get("control_url")
    origin = configured.origins.get("control_url", "")
    # a path as it was written, and not as it was read, so that the project can be moved
    written = control_url or (os.environ.get(_VARIABLE) if found else None) or setup.EMBEDDED
    if found and control_url is None and origin != _VARIABLE:
        url_line = f"# control_url comes from {origin.removeprefix('in ')}"
    elif not written.startswith("embedded") and Dsn.parse(written).has_secret:
        url_line = f"# control_url comes from {_VARIABLE}"
    else:
        url_line = f"control_url = {json.dumps(written)}"
    if migrations is None and "migrations" in configured.values:
        migrations_line = f"# migrations comes from {configured.origins['migrations'].removeprefix('in ')}"
    else:
        migrations_line = f"migrations = {json.dumps(migrations or _MIGRATIONS)}"
    return _SETTINGS.format(control_url=url_line, migrations=migrations_line)


def dev(
    directory: Annotated[
        Path | None, typer.Option(help="The embedded server's data directory; the project's by default.")
    ] = None,
) -> None:
    """Run an embedded PostgreSQL for development, until Ctrl-C."""
    directory = exit_on_error(_data_directory) if directory is None else directory

    async def serve() -> None:
        from ..testing.embedded import EmbeddedProvider

        provided = await EmbeddedProvider().open(f"embedded:{directory}")
        try:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop.set)
            console.print(f"PostgreSQL is running in {directory}; use control_url 'embedded:{directory}'")
            console.print("stop it with Ctrl-C", highlight=False)
            await stop.wait()
        finally:
            await provided.close()

    exit_on_error(lambda: asyncio.run(serve()))


def _data_directory() -> Path:
    """The directory of the embedded server that the project's settings name, or ``.tenancy`` in the project."""
    found = sources.read(TenancyConfig, None, {})
    scheme, _, directory = str(found.values.get("control_url", "")).partition(":")
    return Path(directory) if scheme == "embedded" else found.directory / ".tenancy"


def psql(
    tenant: TenantArgument,
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments for psql, after --.")] = None,
) -> None:
    """Open psql on a tenant's database, as the tenant's role, past any pooler. Audited."""

    async def command(tenancy: Tenancy) -> int:
        found = await tenancy.tenants.get(tenant)
        if found.placement is None:
            raise ConfigurationError(f"tenant {found.slug!r} has no database")
        server = tenancy.internals.servers[found.placement.server]
        password = tenancy.internals.provisioner.password(found)
        environment = {
            # these would lead elsewhere
            **{name: value for name, value in os.environ.items() if name not in ("PGHOSTADDR", "PGSERVICE")},
            **server.dsn.environment(
                user=found.placement.role, database=found.placement.database, purpose="tenancy-psql"
            ),
            "PGPASSWORD": password,
        }
        async with tenancy.internals.control.transaction() as connection:
            await tenancy.audit.append(
                connection, action="tenant.psql", tenant_id=found.id, slug=found.slug, actor=operator()
            )
        return await run_psql(arguments or (), environment)

    exit_with_psql(command)


def secret(as_json: Json = False) -> None:
    """Print a new encryption key with its id, for TENANCY_ENCRYPTION_KEYS; the id is not one that is configured."""
    key = f"{_next_key_id()}:{base64.b64encode(secrets.token_bytes(32)).decode()}"
    if as_json:
        print_json({"encryption_key": key})
    else:
        print(key)


def _next_key_id() -> str:
    """The number after the highest id among the configured keys; settings that cannot be read are none."""
    known: Iterable[str] = ()
    with suppress(ConfigurationError):
        configured = sources.read(TenancyConfig, None, {}).values.get("encryption_keys", {})
        known = parse_keys("encryption_keys", configured) if isinstance(configured, str) else configured
    return str(1 + max((int(key_id) for key_id in known if re.fullmatch(r"[0-9]{1,9}", key_id)), default=0))


__all__ = ["dev", "init", "psql", "secret"]
