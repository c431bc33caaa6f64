"""Alembic's configuration of a migration directory: the same one for templates, runs, status and autogenerate."""

from __future__ import annotations

import configparser
import copy
import json
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from alembic.util.pyfiles import coerce_resource_to_filename

from ..config import MigrationConfig, project
from ..errors import ConfigurationError
from . import discovery

_VARIABLE = "ALEMBIC_CONFIG"
_SECTION = "alembic"

# They say where files are, or how new ones are written. Every other option may be one that a revision reads.
_WITHOUT_INFLUENCE = frozenset(
    {
        "file_template",
        "here",
        "output_encoding",
        "path_separator",
        "post_write_hooks",
        "prepend_sys_path",
        "recursive_version_locations",
        "revision_environment",
        "script_location",
        "sourceless",
        "tenancy_app",
        "timezone",
        "truncate_slug_length",
        "version_locations",
        "version_path_separator",
    }
)


def alembic_config(directory: str | Path, settings: MigrationConfig | None = None, *, x: Sequence[str] = ()) -> Config:
    """Return the Alembic configuration of a migration directory.

    The first of these that there is:

    1. ``settings.alembic_config``, and in it the section ``settings.alembic_section``,
    2. the file that ``ALEMBIC_CONFIG`` names, if it is for this directory,
    3. an alembic.ini (or a pyproject.toml with ``[tool.alembic]``) in the directory, beside it, or in the working
       directory, if its ``script_location`` is this directory,
    4. the only other section, or other ini file in these places, with this ``script_location``,
    5. Alembic's defaults.

    Args:
        directory: The directory with env.py.
        settings: The settings that name a file or a section.
        x: The arguments that ``context.get_x_argument`` returns to env.py and the revisions, as from ``alembic -x``,
            after those of ``settings``.

    Raises:
        ConfigurationError: there is no env.py in the directory; the configured file does not exist or is for another
            directory; or several files or sections lead to different revisions.
    """
    settings = settings or MigrationConfig()
    directory = Path(directory).absolute()
    if not (directory / "env.py").is_file():
        raise ConfigurationError(f"{directory} has no env.py; {_advice(directory)}")
    config = _given(directory, settings) or _found(directory, settings.alembic_section) or _default(directory)
    copied = with_x(config, [*settings.x_arguments, *x])
    return discovery.rooted(copied, _place(copied))


def _place(config: Config) -> Path:
    """Return the directory of the file that a configuration was read from."""
    names = (config.config_file_name, config.toml_file_name)
    return next((Path(name).absolute().parent for name in names if name and Path(name).is_file()), Path.cwd())


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


def with_x(config: Config, x: Sequence[str]) -> Config:
    """Return a copy of ``config`` with ``x`` as its only ``-x`` arguments; a change of one is none of the other."""
    options, attributes = config.file_config, config.attributes
    copied = copy.copy(config)
    copied.file_config = copy.deepcopy(options)
    copied.attributes = dict(attributes)
    copied.cmd_opts = Namespace(x=list(x)) if x else None
    return copied


def name_of(config: Config) -> str:
    """Return the file and the section of ``config``, for messages."""
    if config.config_file_name is not None and Path(config.config_file_name).is_file():
        return f"{config.config_file_name} [{config.config_ini_section}]"
    if config.toml_alembic_config:
        return f"{config.toml_file_name} [tool.alembic]"
    return "Alembic's defaults"


def influences(config: Config) -> list[str]:
    """Return the options that revisions may read, and the ``-x`` arguments, for the fingerprint of a schema."""
    section = config.config_ini_section
    found = []
    if config.file_config.has_section(section):
        items = config.file_config.items(section, raw=True)
        found += [f"{name} = {value}" for name, value in sorted(items) if _has_influence(name)]
    toml = {name: value for name, value in config.toml_alembic_config.items() if _has_influence(name)}
    if toml:
        found.append(json.dumps(toml, sort_keys=True, default=str))
    return found + [f"-x {argument}" for argument in getattr(config.cmd_opts, "x", None) or ()]


def leads_to(config: Config) -> tuple[str, ...]:
    """Return what revisions of ``config`` depend on: directories and options. If equal, so are the fingerprints."""
    location = coerce_resource_to_filename(config.get_alembic_option("script_location") or "")
    script = ScriptDirectory(location, version_locations=config.get_version_locations_list())
    directories = (str(path.resolve()) for path in (location, *script._version_locations))
    flags = ("recursive_version_locations", "sourceless")
    return (*directories, *(str(config.get_alembic_boolean_option(flag)) for flag in flags), *influences(config))


def _has_influence(name: str) -> bool:
    return name not in _WITHOUT_INFLUENCE and not name.startswith("sqlalchemy.")


# --- the file that the settings name ----------------------------------------------------------------------------------


def _given(directory: Path, settings: MigrationConfig) -> Config | None:
    given = settings.alembic_config
    if given is None:
        return None
    if isinstance(given, Config):
        config = given
    else:
        file = Path(given).absolute()
        if not file.is_file():
            raise ConfigurationError(f"migration.alembic_config: there is no file {str(file)!r}")
        config = _read(file, settings.alembic_section or _SECTION)
    if (location := _location(config)) != directory.resolve():
        says = "names no script_location" if location is None else f"is for {str(location)!r}"
        raise ConfigurationError(
            f"migration.alembic_config: {name_of(config)} {says}, but migrations is {str(directory)!r}"
        )
    return config


def _read(file: Path, section: str) -> Config:
    """Read an ini file, with the pyproject.toml beside it; or a TOML file alone."""
    if file.suffix == ".toml":
        return Config(toml_file=file)
    toml = file.parent / "pyproject.toml"
    return Config(file, toml_file=toml if toml.is_file() else None, ini_section=section)


def _location(config: Config) -> Path | None:
    """Return the directory that a configuration is for, without symbolic links; None if it names none."""
    try:
        location = discovery.location_of(config, _place(config))
        text = config.get_alembic_option("script_location", "")
        if location is not None and not location.exists() and ":" in text:
            location = coerce_resource_to_filename(text)  # of an installed package
        return location.resolve() if location else None
    except ConfigurationError as exc:
        raise ConfigurationError(f"{name_of(config)} cannot be read: {exc.__cause__}") from exc
    except (configparser.Error, CommandError, ImportError, OSError, ValueError) as exc:
        raise ConfigurationError(f"{name_of(config)} cannot be read: {exc}") from exc


# --- a file that is for the directory -------------------------------------------------------------------------------


def _found(directory: Path, section: str | None) -> Config | None:
    if variable := os.environ.get(_VARIABLE):
        file = Path(variable).absolute()
        if file.is_file() and (found := _one_of(_matching(directory, [file], section), directory)):
            return found
    places = list(dict.fromkeys((directory, *project.upward(directory.parent), Path.cwd())))
    for place in places:
        ini, toml = place / "alembic.ini", place / "pyproject.toml"
        config = Config(
            ini if ini.is_file() else None,
            toml_file=toml if toml.is_file() else None,
            ini_section=section or _SECTION,
        )
        if _is_for(config, directory):
            return config
    files = [file for place in places for file in sorted(place.glob("*.ini"))]
    return _one_of(_matching(directory, files, section), directory)


def _matching(directory: Path, files: Iterable[Path], section: str | None) -> Iterator[Config]:
    for file in files:
        sections = [_SECTION] if file.suffix == ".toml" else [section] if section else _sections(file)
        for name in sections:
            config = _read(file, name)
            if _is_for(config, directory):
                yield config


def _sections(file: Path) -> list[str]:
    """Return the sections that name a ``script_location``; ``alembic`` is the first."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(file, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return []  # an ini file of some other program
    found = [name for name in parser.sections() if parser.has_option(name, "script_location")]
    return sorted(found, key=lambda name: name != _SECTION)


def _is_for(config: Config, directory: Path) -> bool:
    try:
        return _location(config) == directory.resolve()
    except ConfigurationError:
        return False  # of another project


def _one_of(configs: Iterator[Config], directory: Path) -> Config | None:
    """Return the first; refuse several that lead to different revisions, unless the first is Alembic's own choice."""
    found = list(configs)
    if not found:
        return None
    if found[0].config_ini_section != _SECTION or len({c.config_file_name for c in found}) > 1:
        different = {leads_to(config): name_of(config) for config in reversed(found)}
        if len(different) > 1:
            raise ConfigurationError(
                f"{directory} has several configurations, which lead to different revisions: "
                f"{', '.join(sorted(different.values()))}; choose one with migration.alembic_config and "
                "migration.alembic_section"
            )
    return found[0]


def _default(directory: Path) -> Config:
    config = Config()
    config.set_main_option("script_location", str(directory).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
