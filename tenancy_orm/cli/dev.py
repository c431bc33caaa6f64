"""``tenancy init``, ``dev``, ``psql`` and ``secret``: project set-up and development."""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import shutil
import signal
from pathlib import Path
from typing import Annotated

import typer

from ..config import TenancyConfig, sources
from ..errors import ConfigurationError
from ..migrations.layout import init_directory
from ..postgres.dsn import Dsn
from ..tenancy import Tenancy
from .output import console, print_json
from .runtime import Json, TenantArgument, exit_on_error, operator, run

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
    directory: Annotated[Path, typer.Argument(help="The project's directory.")] = Path(),
    control_url: Annotated[
        str | None, typer.Option(help="URL of the control database; an embedded server if not given.")
    ] = None,
    migrations: Annotated[
        str | None, typer.Option(help="Directory of the Alembic environment; migrations if nothing configures one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set up a project: settings, Alembic environment and control database. Existing files are kept."""

    def prepare() -> list[str]:
        directory.mkdir(parents=True, exist_ok=True)
        os.chdir(directory)
        made = []
        if control_url is not None:
            os.environ["TENANCY_CONTROL_URL"] = control_url
        configured = sources.read(TenancyConfig, None, {})
        if "TENANCY_CONFIG" not in os.environ and not Path("tenancy.toml").exists():
            Path("tenancy.toml").write_text(_settings(configured, control_url, migrations))
            made.append("tenancy.toml")
        directory_of_migrations = migrations or str(configured.values.get("migrations", _MIGRATIONS))
        had_ini = Path("alembic.ini").exists()
        if init_directory(directory_of_migrations):
            made += [directory_of_migrations] if had_ini else [directory_of_migrations, "alembic.ini"]
        return made

    made = exit_on_error(prepare)

    async def command(tenancy: Tenancy) -> str:
        return str(tenancy.internals.control.installation)

    installation = run(command, initialise=True)
    if as_json:
        print_json({"created": made, "installation": installation})
        return
    for name in made:
        console.print(f"made {name}", highlight=False)
    console.print(f"the control database is ready (installation {installation})", highlight=False)
    console.print("next: tenancy create acme --tier pro", highlight=False)


def _settings(configured: sources.Found, control_url: str | None, migrations: str | None) -> str:
    """Return the settings file of a new project: what nothing else configures, and no URL with a password."""
    found = configured.values.get("control_url")
    written = control_url or found or "embedded:.tenancy"
    origin = configured.origins.get("control_url", "")
    if found and control_url is None and origin != _VARIABLE:
        url_line = f"# control_url comes from {origin.removeprefix('in ')}"
    elif not written.startswith("embedded") and Dsn.parse(written).has_secret:
        url_line = f"# control_url comes from {_VARIABLE}"
    else:
        url_line = f'control_url = "{written}"'
    if migrations is None and "migrations" in configured.values:
        migrations_line = f"# migrations comes from {configured.origins['migrations'].removeprefix('in ')}"
    else:
        migrations_line = f'migrations = "{migrations or _MIGRATIONS}"'
    return _SETTINGS.format(control_url=url_line, migrations=migrations_line)


def dev(
    directory: Annotated[
        Path | None, typer.Option(help="The embedded server's data directory; the project's by default.")
    ] = None,
) -> None:
    """Run an embedded PostgreSQL for development, until Ctrl-C."""
    from ..testing.embedded import EmbeddedProvider

    directory = exit_on_error(_data_directory) if directory is None else directory

    async def serve() -> None:
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
    """Open psql on a tenant's database, as the tenant's role. Audited."""

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
        process = await asyncio.create_subprocess_exec(_find_psql(), *(arguments or []), env=environment)
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()

    # psql handles Ctrl-C itself
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = run(command)
    finally:
        signal.signal(signal.SIGINT, previous)
    raise typer.Exit(status)


def _find_psql() -> str:
    found = shutil.which("psql")
    if found is None:
        from ..testing.embedded import find_binary

        found = str(find_binary("psql"))
    return found


def secret(as_json: Json = False) -> None:
    """Print a new encryption key for TENANCY_ENCRYPTION_KEYS."""
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    if as_json:
        print_json({"encryption_key": key})
    else:
        print(f"1:{key}")


__all__ = ["dev", "init", "psql", "secret"]
