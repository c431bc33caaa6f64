"""A migration directory and its env.py's options, loaded once for any number of databases."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.exc import NoSuchModuleError

from ..errors import ConfigurationError
from ..postgres.quoting import quote_identifier, quote_qualified
from . import envfile, local, logs, plain
from .failures import describe

# while ``load`` runs an env.py, ``environment.run`` stores its options here instead of running a command
_reading: ContextVar[list[Mapping[str, Any]] | None] = ContextVar("tenancy_orm.migrations.reading", default=None)

_RESERVED = ("connection", "url", "dialect_name", "tenant")


@dataclass(frozen=True, slots=True)
class Environment:
    """Scripts, configuration, and env.py's options for ``EnvironmentContext.configure``."""

    config: Config
    script: ScriptDirectory
    options: Mapping[str, Any] = field(repr=False)
    x: tuple[str, ...] = ()
    """The ``-x`` arguments of this run alone: new tenants are made without them."""

    def __post_init__(self) -> None:
        """Refuse the options of ``configure`` that choose the database: the fleet run does that."""
        for option in _RESERVED:
            if option in self.options:
                raise ConfigurationError(f"environment.run chooses the database itself; leave out {option!r}")

    def context(self, **options: Any) -> EnvironmentContext:
        """Return an ``EnvironmentContext`` for one database; ``options`` are as Alembic's commands pass them."""
        return _RunContext(self, options)

    @property
    def quoted_version_schema(self) -> str | None:
        """The quoted name of the version table's schema, if env.py gives one."""
        schema = self.options.get("version_table_schema")
        return None if schema is None else quote_identifier(schema)

    @property
    def quoted_version_table(self) -> str:
        """The quoted name of Alembic's version table, with its schema if env.py gives one."""
        schema, table = self.options.get("version_table_schema"), self.options.get("version_table", "alembic_version")
        return quote_qualified(schema, table)


class _RunContext(EnvironmentContext):
    """Warns if a revision reads ``-x`` arguments that the templates do not get."""

    def __init__(self, environment: Environment, options: dict[str, Any]) -> None:
        super().__init__(environment.config, environment.script, **options)
        self._environment = environment

    def get_x_argument(self, as_dictionary: bool = False) -> Any:
        """Return the ``-x`` arguments."""
        if self._environment.x:
            logs.warn_once(
                "a revision reads the -x arguments, and new tenants are made without those of this run "
                f"({' '.join(self._environment.x)}); give what all tenants need by the setting migration.x_arguments"
            )
        return super().get_x_argument(as_dictionary)


def load(config: Config, *, x: tuple[str, ...] = ()) -> Environment:
    """Load the scripts, and run env.py only to get the options that it passes to ``environment.run``.

    If it does not call that, they are those that it passes to ``context.configure``; it connects to no database.

    Args:
        config: From ``configuration.alembic_config``.
        x: Which of its ``-x`` arguments are those of this run alone.

    Raises:
        ConfigurationError: the directory is missing, or its env.py fails or cannot be used for a fleet.
    """
    local.install()
    try:
        script = script_directory(config)
        options = _read_env(config, script)
    except CommandError as exc:
        raise ConfigurationError(f"the migrations cannot be loaded: {exc}") from exc
    return Environment(config, script, options, x)


def _read_env(config: Config, script: ScriptDirectory) -> Mapping[str, Any]:
    path = Path(script.env_py_location)
    found: list[Mapping[str, Any]] = []
    # Alembic's own way to run nothing, for an env.py that looks at these
    nothing = {"fn": lambda heads, context: [], "dont_mutate": True, "destination_rev": "head", "starting_rev": None}
    environment = plain.PlainEnvironment(config, script, **nothing)
    token = _reading.set(found)
    try:
        # an env.py of ours may import modules that connect; one that was made for plain Alembic must not connect itself
        without = nullcontext() if envfile.calls_run(path) else plain.without_connections(config)
        with logs.unchanged(), environment, without:
            script.run_env()
        return found[-1] if found else environment.options()
    except ConfigurationError as exc:
        raise ConfigurationError(f"{path} cannot be used: {exc}") from exc
    except NoSuchModuleError as exc:
        raise ConfigurationError(
            f"{path} makes an engine of the URL that Alembic's template has as a placeholder, or one without a driver "
            f"({exc}); {plain.REMEDY}"
        ) from exc
    except CommandError:
        raise
    except Exception as exc:
        raise ConfigurationError(f"{path} fails: {describe(exc)}") from exc
    finally:
        _reading.reset(token)


def capture_options(options: Mapping[str, Any]) -> bool:
    """Store ``options`` for ``load``, and return True; False if ``load`` is not running this env.py."""
    found = _reading.get()
    if found is None:
        return False
    found.append(options)
    return True


def is_reading() -> bool:
    """Whether ``load`` is running an env.py, which must not use a database."""
    return _reading.get() is not None


def script_directory(config: Config) -> ScriptDirectory:
    """Open the directory; ``prepend_sys_path`` adds nothing to ``sys.path`` that is already in it."""
    before = list(sys.path)
    script = ScriptDirectory.from_config(config)
    added = sys.path[: len(sys.path) - len(before)]
    sys.path[:] = [path for path in added if path not in before] + before
    return script
