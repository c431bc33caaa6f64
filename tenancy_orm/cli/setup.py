"""What ``tenancy init`` finds in a project, what it will write, and how that is undone when something fails."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from rich.markup import escape

from ..config import TenancyConfig, project, sources
from ..errors import ConfigurationError, TenancyError
from ..migrations import discovery, envfile
from ..migrations.configuration import alembic_config
from ..migrations.discovery import AlembicProject
from ..migrations.layout import init_directory, template_directory
from ..migrations.scripts import load
from .output import console, errors

EMBEDDED = "embedded:.tenancy"
"""The control database where nothing names one: a server in the project's directory."""
_MIGRATIONS = "migrations"
_BY_HAND = """\
from tenancy_orm import environment

# in place of the code that connects and calls context.run_migrations(); what context.configure() gets besides the
# connection are its further arguments
environment.run(context, target_metadata=target_metadata)
"""


@dataclass
class EnvFile:
    """An env.py that is there: whether and how a fleet can use it, and how it should be changed."""

    path: Path
    is_ours: bool
    problem: str | None = None
    proposal: envfile.Proposal | None = None
    is_changed: bool = False

    @classmethod
    def examine(cls, path: Path) -> EnvFile:
        """Read an env.py as a fleet does."""
        ours = envfile.calls_run(path)
        found = cls(path, ours, proposal=None if ours else envfile.propose(_read_text(path)))
        try:
            load(alembic_config(path.parent))
        except TenancyError as exc:
            found.problem = str(exc)
        return found

    @property
    def lines(self) -> str | None:
        """The lines to change, as a diff where they are known; None where there are none."""
        if self.is_ours:
            return None
        return self.proposal.diff(project.shown(self.path)) if self.proposal else _BY_HAND


@dataclass
class Setup:
    """What is to be done in the project's directory, which is the working directory by now."""

    directory: Path
    migrations: Path | None
    """Where the migrations are, or will be; None for an application that has tables without migrations."""
    makes_migrations: bool = False
    found: AlembicProject | None = None
    env: EnvFile | None = None
    made: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: dict[Path, str] = field(default_factory=dict)
    """The text of each file to write."""
    _written: list[Path] = field(default_factory=list)
    _before: dict[Path, bytes] = field(default_factory=dict)

    @property
    def planned(self) -> list[str]:
        """What ``write`` will make, by names relative to the directory."""
        if not self.makes_migrations or self.migrations is None:
            return list(self.made)
        ini = [] if (self.directory / "alembic.ini").exists() else ["alembic.ini"]
        return [*self.made, project.shown(self.migrations), *ini]

    def write(self) -> None:
        """Write the files. ``undone_on_failure`` removes them again.

        Raises:
            ConfigurationError: a file cannot be written, or the changed env.py does not work.
        """
        try:
            self._write()
        except OSError as exc:
            raise ConfigurationError(f"{exc.filename or self.directory} cannot be written: {exc.strerror}") from exc
        if self.env is not None and self.env.is_changed:
            load(alembic_config(self.env.path.parent))

    def _write(self) -> None:
        if self.makes_migrations and self.migrations is not None:
            ini = self.directory / "alembic.ini"
            had_ini = ini.exists()
            self._written += [path for path in (self.migrations, *self.migrations.parents) if not path.exists()][::-1]
            self._written += [] if had_ini else [ini]
            init_directory(self.migrations, config_file=ini)
            self.made += [project.shown(self.migrations)] + ([] if had_ini else ["alembic.ini"])
        for path, text in self.texts.items():
            if path.exists():
                self._before[path] = path.read_bytes()
            else:
                self._written.append(path)
            _replace(path, text)

    def as_dict(self) -> dict[str, object]:
        """Return what was found, for a program."""
        env = self.env
        return {
            "migrations": None if self.migrations is None else str(self.migrations),
            "notes": self.notes,
            "env": env
            and {
                "path": str(env.path),
                "calls_run": env.is_ours or env.is_changed,
                "problem": None if env.is_changed else env.problem,
                "lines": None if env.is_changed else env.lines,
            },
        }

    def undo(self) -> None:
        """Remove what was made, and put back what was changed."""
        for path, content in self._before.items():
            path.write_bytes(content)
        for path in reversed(self._written):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Undo everything if the body fails or is interrupted; an embedded server that it has made, too."""
        url = str(sources.read(TenancyConfig, None, {}).values.get("control_url", ""))
        data = Path(url.removeprefix("embedded:")) if url.startswith("embedded:") else None
        is_new = data is not None and not data.exists()
        try:
            yield
        except BaseException:
            self.undo()
            if is_new and data is not None:
                _remove_embedded(data)
            raise


def prepare(
    directory: Path,
    *,
    control_url: str | None,
    migrations: Path | None,
    above: bool,
    settings: Callable[[sources.Found, str | None], str],
    write_env: bool,
) -> Setup:
    """Find out what is in the project, and what has to be written; nothing is written yet.

    The settings that will be written are put into the environment, so that the rest of the command has them already.

    Args:
        directory: The project's directory, which is the working directory.
        control_url: What ``--control-url`` gives.
        migrations: What ``--migrations`` gives, as an absolute path.
        above: Whether an Alembic project of a directory above is this one's.
        settings: Makes the text of a new settings file: of what is configured already, and of the directory of
            migrations where nothing configures it.
        write_env: Whether to change an env.py of plain Alembic.

    Raises:
        ConfigurationError: what is there contradicts itself or the arguments.
    """
    if control_url is not None:
        os.environ["TENANCY_CONTROL_URL"] = control_url
    migrations = None if migrations is None else Path(os.path.normpath(migrations))
    configured = sources.read(TenancyConfig, None, {})
    file = Path(os.environ.get("TENANCY_CONFIG") or directory / "tenancy.toml").absolute()
    found = _find_alembic(directory, configured, migrations, above=above)
    chosen = _choose(directory, configured, found, migrations, is_new=not file.exists())
    setup = Setup(directory, chosen, found=found)
    setup.makes_migrations = chosen is not None and not _has_env(chosen)
    _plan_settings(setup, configured, file, settings)
    if "control_url" not in configured.values:
        os.environ["TENANCY_CONTROL_URL"] = EMBEDDED
        _plan_embedded(setup, file)
    if chosen is not None and configured.values.get("migrations") != str(chosen):
        os.environ["TENANCY_MIGRATIONS"] = str(chosen)
    if setup.makes_migrations:
        _check_place(setup)
    elif chosen is not None:
        setup.env = EnvFile.examine(chosen / "env.py")
        _plan_env(setup, setup.env, write=write_env)
        if found is not None and found.migrations != chosen and found.config_file is not None:
            setup.notes.append(
                f"{project.shown(found.config_file)} is for the migrations in {project.shown(found.migrations)}; "
                "for the tenants' own, run alembic with another ini file (alembic -c)"
            )
    _check_writable(setup)
    return setup


def entered(directory: Path) -> AbstractContextManager[None]:
    """Make ``directory`` the working directory, and make it if it is missing; on a failure a made one is removed.

    Afterwards the working directory and the environment are as they were.

    Raises:
        ConfigurationError: it cannot be made or entered.
    """
    here, environ = Path.cwd(), dict(os.environ)
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        os.chdir(directory)
    except OSError as exc:
        raise ConfigurationError(f"{directory} cannot be used as the project's directory: {exc.strerror}") from exc
    for variable in ("TENANCY_CONFIG", "TENANCY_ENV_FILE"):
        if variable in environ:
            os.environ[variable] = str(here / environ[variable])

    @contextmanager
    def inside() -> Iterator[None]:
        try:
            yield
        except BaseException:
            for path in missing:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(environ)

    return inside()


def project_directory() -> Path:
    """Return the directory of the project that the working directory is in: that of its settings, or of its Alembic."""
    here = Path.cwd()
    if named := os.environ.get("TENANCY_CONFIG"):
        return Path(named).absolute().parent
    settings = project.find()
    alembic = next((place for place in project.upward(here) if discovery.read(place) is not None), None)
    if settings is None or alembic is None or not alembic.is_relative_to(settings):
        return settings or alembic or here
    # the nearer one, unless the settings are about it
    found = discovery.read(alembic)
    with project.looking_from(settings):
        named = sources.read(TenancyConfig, None, {}).values.get("migrations")
    return settings if found is not None and named == str(found.migrations) else alembic


def show_done(setup: Setup) -> None:
    """Print what was made and changed."""
    for name in setup.made:
        _say(f"made {name}")
    for change in setup.changed:
        _say(f"changed {change}")


def show_env(setup: Setup, owner: str) -> None:
    """Print what an existing env.py means for the fleet, and the lines to change.

    Args:
        setup: What was done.
        owner: The role that revisions run as.
    """
    for note in setup.notes:
        _say(f"note: {note}")
    env = setup.env
    if env is not None and env.problem and not env.is_changed:
        errors.print(f"[bold yellow]warning:[/] {escape(env.problem)}", highlight=False, soft_wrap=True)
    if env is None or (env.is_ours and not setup.made):
        return
    found = setup.found if setup.found is not None and setup.found.migrations == env.path.parent else None
    _say(f"the project's own migrations are used: {found or project.shown(env.path.parent)}")
    if env.is_ours:
        return
    _say(
        f"their revisions run as the role {owner}, which owns the tenants' databases and is not a superuser, and not "
        "as the user of a URL in alembic.ini or env.py"
    )
    if env.is_changed:
        return
    if not env.problem:
        name = project.shown(env.path)
        _say(f"new tenants and tenancy migrate use {name} as it is; alembic itself still runs it on its own database")
    _say("to let alembic work on all tenants, change these lines; everything else in the file stays:\n")
    _say(env.lines or "")
    if env.proposal is not None:
        if env.proposal.unused:
            _say(f"no longer called, so you can delete them: {', '.join(env.proposal.unused)}")
        _say("tenancy init --write-env makes this change")


def show_next(setup: Setup, *, has_metadata: bool) -> None:
    """Print what is left to do until there is a tenant: what the project has not got yet."""
    steps = []
    if setup.migrations is not None and not _has_revisions(setup.migrations):
        if not has_metadata and (setup.env is None or setup.env.is_ours):
            steps.append('name your models in tenancy.toml, such as: metadata = "models:Base.metadata"')
        steps.append('alembic revision --autogenerate -m "first tables"')
    steps.append("tenancy create acme --tier pro")
    for number, step in enumerate(steps):
        _say(f"{'then' if number else 'next'}: {step}")


def _has_revisions(migrations: Path) -> bool:
    try:
        return bool(ScriptDirectory.from_config(alembic_config(migrations)).get_heads())
    except (TenancyError, CommandError):
        return True  # what is wrong with them was said before


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _has_env(directory: Path | None) -> bool:
    return directory is not None and (directory / "env.py").is_file()


def _find_alembic(
    directory: Path, configured: sources.Found, given: Path | None, *, above: bool
) -> AlembicProject | None:
    try:
        return discovery.find(directory, above=above)
    except ConfigurationError:
        setting = configured.values.get("migrations")
        if _has_env(given) or _has_env(setting and Path(setting)):
            return None  # it does not matter what else is there
        raise


def _choose(
    directory: Path, configured: sources.Found, found: AlembicProject | None, given: Path | None, *, is_new: bool
) -> Path | None:
    """Return the directory of migrations: that of the settings, of Alembic, or a new one."""
    named = configured.values.get("migrations")
    setting = None if named is None else Path(os.path.normpath(str(named)))
    existing = found.migrations if found is not None and found.has_env else None
    if setting is not None and _has_env(setting):
        if given not in (None, setting):
            raise ConfigurationError(
                f"--migrations {project.shown(given)}: {_origin(configured)} says {project.shown(setting)}, which has "
                "an env.py; change it there, or leave --migrations out"
            )
        return setting
    if given is not None and existing not in (None, given) and not _has_env(given):
        raise ConfigurationError(
            f"--migrations {project.shown(given)}: the migrations of this project are in {found}; leave --migrations "
            "out to use them. If they are for another database, make the tenants' own first: alembic -c tenants.ini "
            f"init -t {template_directory()} {project.shown(given)}"
        )
    if (chosen := given or existing or setting) is not None:
        return chosen
    if "metadata" in configured.values and not is_new:
        return None  # tables without migrations; an empty history would replace them
    return found.migrations if found is not None else directory / _MIGRATIONS


def _origin(configured: sources.Found) -> str:
    return configured.origins.get("migrations", "").removeprefix("in ")


def _plan_env(setup: Setup, env: EnvFile, *, write: bool) -> None:
    if not write or env.is_ours:
        return
    if env.proposal is None:
        raise ConfigurationError(
            f"--write-env: {project.shown(env.path)} is unlike Alembic's templates; change it by hand:\n{_BY_HAND}"
        )
    names = (f"env.py.orig{number or ''}" for number in range(100))
    copy = next(path for name in names if not (path := env.path.with_name(name)).exists())
    setup.texts[copy] = env.proposal.before
    setup.texts[env.path] = env.proposal.after
    setup.made.append(project.shown(copy))
    setup.changed.append(f"{project.shown(env.path)}: it calls environment.run")
    env.is_changed = True


def _plan_settings(
    setup: Setup, configured: sources.Found, file: Path, settings: Callable[[sources.Found, str | None], str]
) -> None:
    """Plan a new settings file, or the line of an existing one that has to be changed or added."""
    named = configured.values.get("migrations")
    is_right = setup.migrations is None or named == str(setup.migrations)
    written = None if setup.migrations is None else _relative(setup.migrations, file.parent)
    place = _origin(configured) if named is not None else project.shown(file)
    if not is_right and written is not None and place != project.shown(file):
        raise ConfigurationError(f"{place} has to say where the migrations are: migrations = {json.dumps(written)}")
    if not file.exists() and "TENANCY_CONFIG" not in os.environ:
        setup.texts[file] = settings(configured, None if is_right else written)
        setup.made.append("tenancy.toml")
    elif not is_right and written is not None and not (named is None and os.environ.get("TENANCY_APP")):
        text = changed_setting(_read_text(file), "migrations", written) if file.name != "pyproject.toml" else None
        if text is None:
            raise ConfigurationError(f"{place} has to say where the migrations are: migrations = {json.dumps(written)}")
        setup.texts[file] = text
        setup.changed.append(f"{place}: migrations = {json.dumps(written)}")


def _plan_embedded(setup: Setup, file: Path) -> None:
    """Plan the line of an existing settings file with which the next command finds the embedded server."""
    if not file.exists() or os.environ.get("TENANCY_APP"):
        return
    before = setup.texts.get(file) or _read_text(file)
    text = changed_setting(before, "control_url", EMBEDDED) if file.name != "pyproject.toml" else None
    line = f"control_url = {json.dumps(EMBEDDED)}"
    if text is None:
        raise ConfigurationError(f"{project.shown(file)} has to say where the control database is: {line}, or a URL")
    setup.texts[file] = text
    setup.changed.append(f"{project.shown(file)}: {line}")


def changed_setting(text: str, name: str, value: str) -> str | None:
    """Return the text of a settings file with one setting at its top level changed or added; None if that is unsafe."""
    line = f"{name} = {json.dumps(value)}"
    pattern = re.compile(rf"^{name}[ \t]*=[ \t]*(\"[^\"\n]*\"|'[^'\n]*')", re.MULTILINE)
    changed = pattern.sub(lambda _: line, text, count=1) if pattern.search(text) else f"{line}\n{text}"
    try:
        wanted = tomllib.loads(text) | {name: value}
        return changed if tomllib.loads(changed) == wanted else None
    except tomllib.TOMLDecodeError:
        return None


def _check_place(setup: Setup) -> None:
    """Refuse a place for a new directory of migrations that Alembic would refuse after everything else was done."""
    place, found = setup.migrations, setup.found
    assert place is not None  # noqa: S101 - makes_migrations
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigurationError(
            f"{project.shown(place)} has no env.py, and something else in it; name another directory with --migrations"
        )
    if found is not None and found.migrations != place:
        raise ConfigurationError(
            f"{project.shown(found.config_file or found.migrations)} says that the migrations are in "
            f"{project.shown(found.migrations)}, not in {project.shown(place)}; change one of the two"
        )


def _check_writable(setup: Setup) -> None:
    for path in (*setup.texts, *([setup.migrations] if setup.makes_migrations and setup.migrations else [])):
        place = next(parent for parent in path.parents if parent.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ConfigurationError(f"{project.shown(path)} cannot be written: no files can be made in {place}")


def _relative(path: Path, directory: Path) -> str:
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else str(path)


def _read_text(path: Path) -> str:
    """The text with its own line ends."""
    return path.read_bytes().decode("utf-8")


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all; an existing one keeps its mode."""
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
            mode = path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask()
            temporary.chmod(mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _remove_embedded(directory: Path) -> None:
    from ..testing.embedded import EmbeddedServer

    with contextlib.suppress(TenancyError, OSError):
        EmbeddedServer(directory).remove()
