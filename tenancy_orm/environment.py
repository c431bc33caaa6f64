"""What an application's env.py runs, so that Alembic's own commands work on all tenants.

```python
from alembic import context
from tenancy_orm import environment

from myapp.models import Base

environment.run(context, target_metadata=Base.metadata)
```

``upgrade``, ``downgrade`` and ``stamp`` run on every tenant, or on those of ``-x tenant=acme``; ``current`` reads each
of them; ``check`` and ``revision --autogenerate`` compare with a database at head, without seeds; ``--sql``
prints the statements once.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.util.exc import CommandError, DatabaseNotAtHead
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import MetaData

from .audit.actor import operator
from .config import TenancyConfig, project
from .config.values import load_object
from .errors import ConfigurationError, FleetMigrationError, PreflightError, TenancyError, counted
from .migrations import AlembicSchema, local, logs
from .migrations.autogenerate import with_imports
from .migrations.checks import ask_before_migrations
from .migrations.commands import CommandResult
from .migrations.configuration import alembic_config, leads_to, name_of, with_x
from .migrations.execution import printing_sql
from .migrations.failures import FleetCommandError, describe
from .migrations.plan import Plan
from .migrations.scripts import Environment, capture_options, is_reading, load
from .migrations.selection import NO_TENANTS, Selection
from .runs import FleetMigrator
from .runs.migrator import DEFAULT_CONCURRENCY
from .runs.recorded import RunOptions
from .runs.wave_texts import PlanFile, parse_waves, read_plan
from .runs.waves import Waves
from .tenancy import Tenancy
from .tenant import Tenant

T = TypeVar("T")

_CHANGES = ("upgrade", "downgrade", "stamp")
_COMPARISONS = ("check", "revision")
_HISTORY = ("history", "show", "edit")
_OURS = (
    *("tenant", "concurrency", "stop_on_failure", "skip_preflight", "refuse_drift", "beside"),
    *("wave", "waves", "max_failures"),
)


def run(
    context: ModuleType | EnvironmentContext,
    *,
    target_metadata: MetaData | Sequence[MetaData] | None = None,
    **configure_options: Any,
) -> None:
    """Run for the fleet the Alembic command that loaded this env.py.

    A new ``Tenancy`` is opened from the application's configuration, which ``find_config`` finds.

    ``-x tenant=<slug>`` (repeatable) chooses tenants, ``-x concurrency=<n>`` sets how many run at once (8), and
    ``-x stop_on_failure=true`` starts no other tenant after a failure. ``-x skip_preflight=true`` asks no check of a
    revision's ``preflight()``. ``-x wave=...`` (repeatable), or ``-x waves=<file>``, gives the waves of the run, and
    ``-x max_failures=<n>`` starts no other tenant after so many failures. ``-x refuse_drift=true`` changes nothing if a
    tenant's schema is not what its revision says. ``-x beside=true`` starts a run beside one that is paused.

    Works with and without a running event loop.

    Args:
        context: ``alembic.context``.
        target_metadata: The application's tables, for autogenerate; those of the configuration where None.
        configure_options: More options of ``context.configure``: ``include_object``, ``compare_type``,
            ``transaction_per_migration``, ``version_table``, ``process_revision_directives``, ...

    Raises:
        FleetMigrationError: some tenants failed (also an ``alembic.util.CommandError``).
        CommandError: the command failed for another reason.
        ConfigurationError: no Alembic command runs this env.py.
    """
    options = {"target_metadata": target_metadata, **configure_options}
    if capture_options(options):
        return
    local.install()
    proxy = context if isinstance(context, EnvironmentContext) else context._proxy
    if proxy is None:
        raise ConfigurationError("environment.run works only in an env.py that Alembic runs; use tenancy.migrations")
    logs.configure(proxy.config)
    try:
        _Command(proxy, Environment(proxy.config, proxy.script, options)).answer()
    except FleetMigrationError as exc:
        raise FleetCommandError(exc.failures, total=exc.total) from exc
    except TenancyError as exc:
        raise CommandError(str(exc)) from exc


def preflight(context: ModuleType | EnvironmentContext, *, timeout: float = 60.0) -> None:
    """Honour ``preflight()`` of revisions in an env.py of plain Alembic, for the one database that it connects to.

    Call it between ``context.configure`` and ``context.run_migrations``. The checks of all pending revisions are asked
    before the first of them runs. ``run`` needs no such call.

    ```python
    with context.begin_transaction():
        environment.preflight(context)
        context.run_migrations()
    ```

    Args:
        context: ``alembic.context``.
        timeout: How long each check may take, in seconds.

    Raises:
        ConfigurationError: no Alembic command runs this env.py.

    ``context.run_migrations`` then raises:
        CommandError: a check did not pass; nothing was changed.
    """
    if is_reading():
        return
    proxy = context if isinstance(context, EnvironmentContext) else context._proxy
    if proxy is None:
        raise ConfigurationError("environment.preflight works only in an env.py that Alembic runs")
    if not proxy.is_offline_mode():
        ask_before_migrations(proxy.get_context(), timeout)


def find_config(config: Config) -> TenancyConfig:
    """Find the application's configuration.

    The first of these that is set is used:

    1. ``config.attributes["tenancy"]``, for programs that call ``alembic.command``: a ``Tenancy`` or a
       ``TenancyConfig``,
    2. the environment variable ``TENANCY_APP``: the ``module:attribute`` of one,
    3. ``tenancy_app`` in ``[alembic]`` of ``alembic.ini``, or in ``[tool.alembic]`` of ``pyproject.toml``: the same,
    4. the settings that ``TenancyConfig.from_env()`` reads from ``TENANCY_*`` variables, ``.env``, secret files,
       ``tenancy.toml`` and ``pyproject.toml``. The project is the one that ``alembic.ini`` is in, wherever the
       program runs.

    Args:
        config: Alembic's configuration: ``context.config`` in an env.py.

    Raises:
        ConfigurationError: the object cannot be loaded, or is neither a ``Tenancy`` nor a ``TenancyConfig``; or a file
            with settings cannot be read.
        SettingError: a setting is malformed, unknown or missing.
    """
    found = config.attributes.get("tenancy")
    path = os.environ.get("TENANCY_APP") or config.get_alembic_option("tenancy_app")
    if found is None:
        with _in_project_of(config):
            found = load_object(path) if path else TenancyConfig.from_env()
    if not isinstance(found, TenancyConfig):
        found = getattr(found, "config", found)
    if not isinstance(found, TenancyConfig):
        raise ConfigurationError(f"{path or 'attributes[tenancy]'} is a {type(found).__name__}, not a Tenancy")
    return found


@contextmanager
def _in_project_of(config: Config) -> Iterator[None]:
    """Look for settings, and for the modules that they name, in the project that has the ini file."""
    files = (Path(name) for name in (config.config_file_name, config.toml_file_name) if name)
    directory = next((path.absolute().parent for path in files if path.is_file()), None)
    if directory is None:
        yield
        return
    with project.looking_from(directory):
        for place in map(str, (directory, project.find() or directory)):
            if place not in sys.path:
                sys.path.append(place)
        yield


@dataclass(frozen=True, slots=True)
class _Arguments:
    """The ``-x`` arguments of this module; the others belong to the revisions."""

    tenants: tuple[str, ...] | None
    concurrency: int
    stop_on_failure: bool
    skip_preflight: bool
    refuse_drift: bool
    beside: bool
    waves: Waves | None = None
    max_failures: int | None = None

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> _Arguments:
        pairs = [(key, value) for key, _, value in (text.partition("=") for text in arguments)]
        tenants = tuple(value for key, value in pairs if key == "tenant")
        named = dict(pairs)
        words = [value for key, value in pairs if key == "wave"]
        if words and "waves" in named:
            raise CommandError("give the waves by -x wave=... or by -x waves=..., not by both")
        try:
            plan = read_plan(named["waves"]) if "waves" in named else PlanFile(parse_waves(words) if words else None)
        except ConfigurationError as exc:
            raise CommandError(str(exc)) from exc
        concurrency = cls._number(named, "concurrency", plan.concurrency) or DEFAULT_CONCURRENCY
        max_failures = cls._number(named, "max_failures", plan.max_failures)
        flags = {}
        for name in ("stop_on_failure", "skip_preflight", "refuse_drift", "beside"):
            given = named.get(name, "false").lower()
            if given not in ("true", "false"):
                raise CommandError(f"-x {name}={given}: give true or false")
            flags[name] = given == "true"
        return cls(tenants or None, concurrency, **flags, waves=plan.waves, max_failures=max_failures)

    @staticmethod
    def _number(named: Mapping[str, str], name: str, otherwise: int | None) -> int | None:
        if name not in named:
            return otherwise
        if not named[name].isdecimal() or int(named[name]) < 1:
            raise CommandError(f"-x {name}={named[name]}: give a number of at least 1")
        return int(named[name])


class _Command:
    """One Alembic command that loaded the env.py."""

    def __init__(self, proxy: EnvironmentContext, environment: Environment) -> None:
        self.proxy = proxy
        self.options: dict[str, Any] = proxy.context_opts
        self.function: Any = proxy.context_opts.get("fn")
        given = proxy.get_x_argument(as_dictionary=False)
        self.arguments = _Arguments.parse(given)
        self.environment = replace(environment, x=tuple(x for x in given if x.partition("=")[0] not in _OURS))

    @property
    def command(self) -> str:
        """The name of the command in ``alembic.command``; empty for one of the application's own."""
        if getattr(self.function, "__module__", None) != "alembic.command":
            return ""
        return str(self.function.__qualname__).partition(".")[0]

    def answer(self) -> None:
        if self.proxy.is_offline_mode():
            self._print_sql()
        elif self.command == "merge":
            # it needs env.py for its template_args only
            self.proxy.configure(dialect_name="postgresql", **self.environment.options, tenant=None)
        else:
            _block_on(self._answer)

    def _print_sql(self) -> None:
        options = {"literal_binds": True, "dialect_opts": {"paramstyle": "named"}, **self.environment.options}
        # without -x tenant=... no database is needed
        tenant = None if self.arguments.tenants is None else _block_on(self._only_tenant)
        self.proxy.configure(dialect_name="postgresql", **options, tenant=tenant)
        with self.proxy.begin_transaction(), printing_sql(self.proxy, self.environment):
            self.proxy.run_migrations()

    async def _only_tenant(self) -> Tenant:
        """The tenant of ``-x tenant=...``, which the printed statements are for."""
        name, *more = self.arguments.tenants or ()
        if more:
            raise CommandError("--sql prints the statements of one database; give one -x tenant=... or none")
        async with Tenancy(self._config()) as tenancy:
            (tenant,) = await Selection(tenancy.internals.registry).choose([name])
            return tenant

    async def _answer(self) -> None:
        async with Tenancy(self._config()) as tenancy:
            await self._dispatch(tenancy.migrations)

    def _config(self) -> TenancyConfig:
        """The application's configuration, with the directory, file and section that Alembic runs with."""
        found, given = find_config(self.proxy.config), self.proxy.config
        config = found.replace(
            migrations=self.proxy.script.dir, migration={"alembic_config": given}, pool={"warm_tenants": 0}
        )
        if self.command in _CHANGES:
            self._refuse_another_schema(found, config)
        if shared := found.migration.x_arguments:
            arguments = self.proxy.get_x_argument(as_dictionary=False)
            self.environment = load(with_x(given, [*shared, *arguments]), x=self.environment.x)
        return config

    def _refuse_another_schema(self, found: TenancyConfig, config: TenancyConfig) -> None:
        """Refuse to migrate tenants to a schema that an application with these settings would not give to new ones."""
        assert config.migrations is not None  # noqa: S101 - set by the caller
        if found.migrations is None:
            return
        theirs = alembic_config(found.migrations, found.migration)
        if leads_to(theirs) == leads_to(alembic_config(config.migrations, config.migration)):
            return  # without loading the scripts twice
        schemas = [AlembicSchema(c.migrations or "", settings=c.migration) for c in (found, config)]
        if schemas[0].fingerprint() == schemas[1].fingerprint():
            return
        raise ConfigurationError(
            f"alembic runs {self.proxy.script.dir} with {name_of(self.proxy.config)}, but the application's settings "
            f"lead to {found.migrations} with {name_of(theirs)}, which has "
            "other revisions or options: new tenants would differ. No tenant was touched. Run alembic with that file "
            "and section, or set migrations, migration.alembic_config and migration.alembic_section to those to use"
        )

    async def _dispatch(self, migrator: FleetMigrator) -> None:
        if self.command in _CHANGES:
            await self._change(migrator)
        elif self.command in _COMPARISONS:
            await self._compare(migrator)
        elif self.command in _HISTORY:
            await self._show_history(migrator)
        else:
            await self._run_everywhere(migrator)

    async def _change(self, migrator: FleetMigrator) -> None:
        options = {key: value for key, value in self.options.items() if key not in ("fn", "as_sql")}
        plan = Plan.of(
            self.environment,
            self.command,
            self.options["destination_rev"],
            function=self.function,
            options=options,
        )
        arguments = self.arguments
        try:
            report = await migrator.execute(
                plan,
                arguments.tenants,
                options=RunOptions(
                    concurrency=arguments.concurrency,
                    stop_on_failure=arguments.stop_on_failure,
                    max_failures=arguments.max_failures,
                    waves=arguments.waves,
                    x=self.environment.x,
                ),
                beside=arguments.beside,
                refuse_drift=arguments.refuse_drift,
                checks="never" if arguments.skip_preflight else "ahead",
                actor=operator(),
            )
        except PreflightError as exc:
            for slug, reason in exc.failures.items():
                self.proxy.config.print_stdout("FAILED %s: %s", slug, reason)
            # Alembic prints and logs this message: each failure is shown above
            raise CommandError(
                f"preflight: {len(exc.failures)} of {counted(exc.total)} failed, and none was touched"
            ) from exc
        for slug, reason in report.reasons.items():
            if report.state not in ("paused", "cancelled") or slug not in report.skipped:
                self.proxy.config.print_stdout("FAILED %s: %s", slug, reason)
        self.proxy.config.print_stdout(report.summary())
        if report.next_step is not None:
            self.proxy.config.print_stdout("%s", report.next_step)
        report.raise_for_failures()

    async def _compare(self, migrator: FleetMigrator) -> None:
        """Autogenerate against a database at head, as new tenants are, without their seeds and reference data."""
        services = migrator.services
        server = next(iter(services.servers))
        options = with_imports(self.environment.options)
        if options["target_metadata"] is None:
            options["target_metadata"] = services.config.metadata

        def autogenerate(connection: SyncConnection) -> None:
            self.proxy.configure(connection=connection, **options, tenant=None)
            with self.proxy.begin_transaction():
                self.proxy.run_migrations()

        async with services.provisioner.scratch(server) as database:
            await migrator.run_on(server, database, autogenerate)

    async def _show_history(self, migrator: FleetMigrator) -> None:
        """Show the history once, and mark every revision that some tenant is at."""
        found = await migrator.status(
            verify=True,
            tenants=self.arguments.tenants,
            concurrency=self.arguments.concurrency,
            environment=self.environment,
        )
        failures = {item.slug: item.error for item in found if item.error is not None}
        if failures:
            raise FleetMigrationError(failures, total=len(found))
        revisions = {part for item in found for part in (item.revision or "").split(",") if part}
        self.function(tuple(sorted(revisions)), None)

    async def _run_everywhere(self, migrator: FleetMigrator) -> None:
        results = await migrator.run_command(
            self.environment, self.options, self.arguments.tenants, self.arguments.concurrency
        )
        if not results:
            self.proxy.config.print_stdout(NO_TENANTS)
        for result in results:
            self._print(result)
        behind = [result.tenant.slug for result in results if isinstance(result.error, DatabaseNotAtHead)]
        failures = {
            result.tenant.slug: describe(result.error)
            for result in results
            if result.error is not None and not isinstance(result.error, DatabaseNotAtHead)
        }
        if failures:
            raise FleetMigrationError(failures, total=len(results))
        if behind:
            raise DatabaseNotAtHead(f"{len(behind)} of {len(results)} tenants are not at head: {', '.join(behind)}")

    def _print(self, result: CommandResult) -> None:
        slug, lines = result.tenant.slug, result.text.splitlines()
        if result.error is not None:
            self.proxy.config.print_stdout("%s: FAILED: %s", slug, describe(result.error))
        elif len(lines) > 1:
            self.proxy.config.print_stdout("%s:\n%s", slug, result.text)
        elif lines or self.command == "current":
            self.proxy.config.print_stdout("%s: %s", slug, lines[0] if lines else "<base>")


def _block_on(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine from synchronous code, and return its result.

    If an event loop already runs in this thread (``alembic.command`` called from async code), another thread runs the
    coroutine in a loop of its own, and this thread waits for it, as it would for a synchronous driver.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    here = contextvars.copy_context()
    with ThreadPoolExecutor(1, thread_name_prefix="tenancy-migrate") as executor:
        return executor.submit(here.run, asyncio.run, main()).result()


__all__ = ["find_config", "preflight", "run"]
