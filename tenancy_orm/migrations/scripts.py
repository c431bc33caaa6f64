"""A migration directory and its env.py's options, loaded once for any number of databases."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
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

from ..config import project
from ..errors import ConfigurationError
from ..postgres.quoting import quote_identifier
from . import discovery, envfile, local, logs, plain
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

    def __post_init__(self) -> None:
        """Refuse the options of ``configure`` that choose the database: the fleet run does that."""
        for option in _RESERVED:
            if option in self.options:
                raise ConfigurationError(f"environment.run chooses the database itself; leave out {option!r}")

    def context(self, **options: Any) -> EnvironmentContext:
        """Return an ``EnvironmentContext`` for one database; ``options`` are as Alembic's commands pass them."""
        return EnvironmentContext(self.config, self.script, **options)

    @property
    def quoted_version_table(self) -> str:
        """The quoted name of Alembic's version table, with its schema if env.py gives one."""
        schema, table = self.options.get("version_table_schema"), self.options.get("version_table", "alembic_version")
        return ".".join(quote_identifier(part) for part in (schema, table) if part is not None)


def load(config: Config) -> Environment:
    """Load the scripts, and run env.py only to get the options that it passes to ``environment.run``.

    If it does not call that, they are those that it passes to ``context.configure``; it connects to no database.

    Raises:
        ConfigurationError: the directory is missing, or its env.py fails or cannot be used for a fleet.
    """
    local.install()
    try:
        script = script_directory(config)
        options = _read_env(config, script)
    except CommandError as exc:
        raise ConfigurationError(f"the migrations cannot be loaded: {exc}") from exc
    return Environment(config, script, options)


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
        with environment, logs.unchanged(), without:
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


def script_directory(config: Config) -> ScriptDirectory:
    """Open the directory; ``prepend_sys_path`` adds nothing to ``sys.path`` that is already in it."""
    before = list(sys.path)
    script = ScriptDirectory.from_config(config)
    added = sys.path[: len(sys.path) - len(before)]
    sys.path[:] = [path for path in added if path not in before] + before
    return script


def alembic_config(directory: str | Path, *, x: Sequence[str] = ()) -> Config:
    """Return the Alembic configuration of a migration directory.

    That is an alembic.ini (or a pyproject.toml with ``[tool.alembic]``) in the directory, above it in the project, or
    in the working directory, if its ``script_location`` is this directory; else Alembic's defaults.

    Args:
        directory: The directory with env.py.
        x: The arguments that ``context.get_x_argument`` returns to env.py and the revisions, as from ``alembic -x``.

    Raises:
        ConfigurationError: there is no env.py in the directory.
    """
    directory = Path(directory).absolute()
    if not (directory / "env.py").is_file():
        raise ConfigurationError(f"{directory} has no env.py; {_advice(directory)}")
    config = _configured(directory) or _default(directory)
    if x:
        config.cmd_opts = Namespace(x=list(x))
    return config


def _configured(directory: Path) -> Config | None:
    for place in (directory, *project.upward(directory.parent), Path.cwd()):
        config = discovery.config_in(place)
        if config is None:
            continue
        location = discovery.location_of(config, place)
        if location is not None and location.resolve() == directory.resolve():
            return discovery.rooted(config, place)
    return None


def _advice(directory: Path) -> str:
    """What to do about a directory without env.py."""
    try:
        found = discovery.find(project.find() or project.start())
    except ConfigurationError:
        found = None  # init says more of it
    if found is None or not found.has_env or found.migrations == directory:
        return "create a migration directory with: tenancy init"
    return (
        f"the migrations of this project are in {found}: set migrations = {project.shown(found.migrations)!r}, "
        "or let tenancy init do it"
    )


def _default(directory: Path) -> Config:
    config = Config()
    config.set_main_option("script_location", str(directory).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
