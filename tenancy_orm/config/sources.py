"""Where settings are read from: variables, ``.env``, secret files, ``tenancy.toml``, ``pyproject.toml``.

pydantic-settings takes them apart. What is added here: each setting remembers where it came from, so that an error can
say it; a variable or key that is no setting is an error; and relative paths are relative to the project's directory.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from dotenv.parser import parse_stream
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource

from ..errors import ConfigurationError, SettingError
from ..postgres.dsn import with_files_in
from . import project
from .validation import NO_TABLE, UNKNOWN, Section, sections_of, settings_of, suggestion

PREFIX = "TENANCY_"

OTHER_VARIABLES = frozenset(
    {
        "TENANCY_APP",
        "TENANCY_CONFIG",
        "TENANCY_ENV_FILE",
        "TENANCY_SECRETS_DIR",
        "TENANCY_TENANT_ID",
        "TENANCY_TENANT_SLUG",
        "TENANCY_TEST_CONNECTIONS",
        "TENANCY_TEST_DSN",
        "TENANCY_TEST_POSTGRES",
        "TENANCY_TEST_WRITE",
    }
)
"""Variables of this package that are not settings: read from the environment alone, or set by ``tenancy each``."""

# What Kubernetes sets for services named ``tenancy`` or ``tenancy-...``, and Docker for containers of such names, with
# the values that they give: a misspelt setting has another one.
_URL = r"(tcp|udp|sctp)://.*"
_SERVICE_LINKS = tuple(
    (re.compile(rf"TENANCY_(\w+_)?{name}"), re.compile(value))
    for name, value in (
        (r"SERVICE_HOST", r".+"),
        (r"SERVICE_PORT(_\w+)?", r"\d+"),
        (r"PORT(_\d+_(TCP|UDP|SCTP)(_START|_END)?)?", _URL),
        (r"PORT_\d+_(TCP|UDP|SCTP)_ADDR", r".+"),
        (r"PORT_\d+_(TCP|UDP|SCTP)_PORT(_START|_END)?", r"\d+"),
        (r"PORT_\d+_(TCP|UDP|SCTP)_PROTO", r"tcp|udp|sctp"),
        (r"NAME", r"/.+"),
    )
)

MISSING = "is not set: run tenancy init, write tenancy.toml here, or set TENANCY_CONTROL_URL"

M = TypeVar("M", bound=BaseSettings)
Origin = Callable[[str], str]
"""Where a setting or variable came from, by its name."""


@dataclass(frozen=True)
class Found:
    """What was read, and where each setting came from, by its dotted name."""

    values: dict[str, Any]
    origins: dict[str, str]
    directory: Path
    """The project's directory: relative paths are relative to it."""
    files: list[Path] = field(default_factory=list)
    """The files that were read, those of secrets left out."""

    def build(self, model: type[M]) -> M:
        """Return the configuration.

        Raises:
            SettingError: a setting is malformed, unknown or missing. The message names the variable, or the file.
        """
        error = None
        try:
            return model(**self.values)
        except SettingError as exc:
            error = self._locate(exc)
        raise error

    def _locate(self, error: SettingError) -> SettingError:
        """Return ``error`` with the origin of each setting that it names."""
        missing = MISSING if self.files else f"{MISSING}; {project.nowhere()}"
        problems = {
            name: missing if (name, reason) == ("control_url", "is missing") else reason
            for name, reason in error.problems.items()
        }
        origins = {name: self._origin(name) for name in problems}
        located = SettingError(problems, {name: origin for name, origin in origins.items() if origin})
        located.__cause__ = error.__cause__
        return located

    def _origin(self, setting: str) -> str | None:
        # a table's own origin stands for what is in it: encryption_keys.1
        parents = (setting.rsplit(".", cut)[0] for cut in range(setting.count(".") + 1))
        return next((self.origins[parent] for parent in parents if parent in self.origins), None)


def variables_of(model: type[BaseSettings]) -> dict[str, str]:
    """The variable of each setting, by the setting's dotted name."""
    return {".".join(path): PREFIX + "_".join(path).upper() for path in settings_of(model)}


def read(model: type[BaseSettings], environ: Mapping[str, str] | None, overrides: Mapping[str, Any]) -> Found:
    """Read all sources of the settings of ``model``; ``TenancyConfig.from_env`` says which, and which wins.

    Raises:
        SettingError: a variable or a key of a file is no setting, or has no value.
        ConfigurationError: a file cannot be read.
    """
    variables = _of_ours(os.environ if environ is None else environ, str)
    named = variables.get("TENANCY_CONFIG")
    place = Path(named).absolute().parent if named else project.find()
    # of variables alone, where there is no project
    directory = place or Path.cwd()
    found = Found({}, {}, directory)
    for path, variable in _settings_files(place, named):
        values = _read_settings_file(path, variable)
        _merge(found, model, _absolute(directory, values), lambda _, path=path: f"in {project.shown(path)}")  # type: ignore[misc]
        if values:
            found.files.append(path)
    files = _read_secret_files(variables.get("TENANCY_SECRETS_DIR"))
    texts = {name: text for name, (_, text) in files.items()}
    _merge_variables(found, model, texts, lambda variable: f"file {files[variable][0]}")
    env_file = Path(variables.get("TENANCY_ENV_FILE") or directory / ".env")
    is_named = "TENANCY_ENV_FILE" in variables
    from_file = _read_env_file(env_file, named=is_named) if is_named or place else {}
    if from_file:
        found.files.append(env_file)
    _merge_variables(found, model, from_file, lambda variable: f"{variable} in {project.shown(env_file)}")
    settings = {
        name: text
        for name, text in variables.items()
        if name not in OTHER_VARIABLES and not _is_service_link(name, text, variables)
    }
    _merge_variables(found, model, settings, str)
    _merge(found, model, overrides, lambda _: "")
    return found


# --- merging ----------------------------------------------------------------------------------------------------------


def _merge(found: Found, model: type[BaseModel], values: Mapping[str, Any], origin: Origin) -> None:
    """Put ``values`` over what was found, setting by setting."""
    _merge_into(found.values, found.origins, values, origin, sections_of(model), "")


def _merge_into(
    into: dict[str, Any],
    origins: dict[str, str],
    values: Mapping[str, Any],
    origin: Origin,
    sections: Collection[str],
    above: str,
) -> None:
    for name, value in values.items():
        setting = f"{above}{name}"
        if setting in sections:
            if isinstance(value, Section):
                value = {field: getattr(value, field) for field in value.model_fields_set}
            if not isinstance(value, Mapping):
                raise SettingError({setting: NO_TABLE}, {setting: origin(setting)})
            into[name] = inner = dict(into.get(name, {}))
            _merge_into(inner, origins, value, origin, sections, f"{setting}.")
        else:
            into[name] = value
            origins[setting] = origin(setting)


def _merge_variables(found: Found, model: type[BaseSettings], given: Mapping[str, str], origin: Origin) -> None:
    variables = variables_of(model)
    known = frozenset(variables.values())
    sections = sections_of(model)
    problems = {
        variable: problem for variable, text in given.items() if (problem := _problem(variable, text, known, sections))
    }
    if problems:
        places = {variable: origin(variable).removeprefix(variable).strip() for variable in problems}
        raise SettingError(problems, {variable: place for variable, place in places.items() if place})
    values = _absolute(found.directory, _Variables(model, given)())
    _merge(found, model, values, lambda setting: origin(variables.get(setting, setting)))


def _problem(variable: str, text: str, known: frozenset[str], sections: Collection[str]) -> str | None:
    if variable in OTHER_VARIABLES:
        return "is read from the environment alone"
    if variable in known:
        return None if text.strip() or variable.endswith("_SETTINGS") else "is empty; unset it for the default"
    name = variable.removeprefix(PREFIX)
    if name.lower() in sections:
        return f"{name.lower()} is a section; set {variable}_..."
    return UNKNOWN + suggestion(name, {one.removeprefix(PREFIX) for one in known | OTHER_VARIABLES}, shown_with=PREFIX)


class _Variables(EnvSettingsSource):
    """Settings as variables of an environment, wherever these were read from.

    Args:
        settings_cls: The model.
        variables: All of them settings.
    """

    def __init__(self, settings_cls: type[BaseSettings], variables: Mapping[str, str]) -> None:
        self._variables = {name.lower(): text for name, text in variables.items()}
        super().__init__(settings_cls)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return dict(self._variables)

    def explode_env_vars(self, field_name: str, field: FieldInfo, env_vars: Mapping[str, str | None]) -> dict[str, Any]:
        """The settings of a section. ``control_url`` is no ``url`` in the section ``control``."""
        plain = {f"{PREFIX}{name}".lower() for name in self.settings_cls.model_fields}
        return super().explode_env_vars(
            field_name, field, {name: text for name, text in env_vars.items() if name not in plain}
        )


# --- variables --------------------------------------------------------------------------------------------------------


def _of_ours(given: Mapping[str, str], origin: Origin) -> dict[str, str]:
    """The variables of this package, in upper case."""
    found: dict[str, str] = {}
    for name, text in given.items():
        variable = name.upper()
        if not variable.startswith(PREFIX):
            continue
        if variable in found:
            raise SettingError({variable: "is there twice, in upper and lower case"}, {variable: origin(name)})
        found[variable] = text
    return found


def _is_service_link(name: str, text: str, variables: Mapping[str, str]) -> bool:
    # a linked container's own variables, beside the TENANCY_NAME of the link
    if name.startswith("TENANCY_ENV_") and variables.get("TENANCY_NAME", "").startswith("/"):
        return name not in OTHER_VARIABLES
    return any(link.fullmatch(name) and value.fullmatch(text) for link, value in _SERVICE_LINKS)


def _read_env_file(path: Path, *, named: bool) -> dict[str, str]:
    """The variables of an ``.env`` file, as they are written: ``$`` in a password is a dollar."""
    if not named and not path.is_file():
        return {}
    with _reading(path, "TENANCY_ENV_FILE" if named else ""):
        bindings = list(parse_stream(StringIO(path.read_text(encoding="utf-8-sig"))))
    found: dict[str, str] = {}
    for binding in bindings:
        place = f"in {project.shown(path)}, line {binding.original.line}"
        if binding.error:
            if PREFIX in binding.original.string.upper():
                raise ConfigurationError(f"{place}: a line with {PREFIX} cannot be read; mind its quotes")
        elif binding.key is not None and binding.key.upper().startswith(PREFIX):
            if binding.value is None:
                raise SettingError({binding.key: "has no value"}, {binding.key: place})
            found[binding.key.upper()] = binding.value
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def _read_secret_files(named: str | None) -> dict[str, tuple[Path, str]]:
    """Each secret file and its text, by the name of its variable."""
    found: dict[str, tuple[Path, str]] = {}
    for directory in map(Path, filter(None, (named or "").split(os.pathsep))):
        with _reading(directory, "TENANCY_SECRETS_DIR"):
            for path in sorted(directory.iterdir()):
                # Kubernetes keeps the files in a directory beside the links to them
                if path.name.upper().startswith(PREFIX) and path.is_file():
                    found[path.name.upper()] = (path, path.read_text(encoding="utf-8").strip())
    return found


def _settings_files(directory: Path | None, named: str | None) -> Iterator[tuple[Path, str]]:
    """The files to read, each with the variable that names it; the last one wins."""
    if named:
        yield Path(named).absolute(), "TENANCY_CONFIG"
        return
    for path in (directory / name for name in project.SETTINGS_FILES) if directory else ():
        if path.is_file():
            yield path, ""


def _read_settings_file(path: Path, variable: str) -> dict[str, Any]:
    with _reading(path, variable):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    if path.name == "pyproject.toml":
        values = _table_of_tool(path, values)
    elif "tool" in values:
        raise SettingError(
            {"tool": "[tool.tenancy] is for pyproject.toml; write [pool] here, for example"},
            {"tool": f"in {project.shown(path)}"},
        )
    return values


def _table_of_tool(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    tool = values.get("tool")
    if not isinstance(tool, dict):
        return {}
    for name in project.TABLES[1:]:
        if name in tool:
            raise ConfigurationError(f"[tool.{name}] in {project.shown(path)} is not read; write [tool.tenancy]")
    table = tool.get("tenancy", {})
    if not isinstance(table, dict):
        raise ConfigurationError(f"tool.tenancy in {project.shown(path)} must be a table")
    return table


def _absolute(directory: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Make the relative paths in settings absolute: they are relative to the project's directory.

    These are ``migrations``, the directory of an embedded server, seeds, the sources of reference data, and the files
    that a URL names.
    """
    values = dict(values)
    if isinstance(migrations := values.get("migrations"), str):
        values["migrations"] = str(directory / migrations)
    migration = values.get("migration")
    if isinstance(migration, dict) and isinstance(file := migration.get("alembic_config"), str):
        values["migration"] = {**migration, "alembic_config": str(directory / file)}
    provisioning = values.get("provisioning")
    if isinstance(provisioning, dict) and isinstance(seeds := provisioning.get("seeds"), (str, list)):
        listed = [seed.strip() for seed in seeds.split(",")] if isinstance(seeds, str) else seeds
        values["provisioning"] = {**provisioning, "seeds": [_absolute_file(directory, seed) for seed in listed]}
    reference = values.get("reference")
    if isinstance(reference, str):
        with suppress(ValueError):  # it is refused where it is checked
            reference = json.loads(reference)
    if isinstance(reference, dict):
        values["reference"] = {name: _absolute_reference(directory, table) for name, table in reference.items()}
    if "control_url" in values:
        values["control_url"] = _absolute_url(directory, values["control_url"])
    if isinstance(servers := values.get("servers"), Mapping):
        values["servers"] = {name: _absolute_server(directory, given) for name, given in servers.items()}
    elif servers is not None:
        values["servers"] = _absolute_url(directory, servers)
    if isinstance(control := values.get("control"), Mapping) and "listen_url" in control:
        values["control"] = {**control, "listen_url": _absolute_url(directory, control["listen_url"])}
    return values


def _absolute_reference(directory: Path, table: Any) -> Any:
    if not isinstance(table, Mapping) or "source" not in table:
        return table
    return {**table, "source": _absolute_file(directory, table["source"])}


def _absolute_file(directory: Path, given: Any) -> Any:
    # what has a colon is module:function
    return str(directory / given) if isinstance(given, str) and given and ":" not in given else given


def _absolute_server(directory: Path, given: Any) -> Any:
    if isinstance(given, Mapping):  # several addresses
        return {name: _absolute_server(directory, url) for name, url in given.items()}
    if isinstance(given, Sequence) and not isinstance(given, str):  # replicas
        return [_absolute_url(directory, url) for url in given]
    return _absolute_url(directory, given)


def _absolute_url(directory: Path, url: Any) -> Any:
    if not isinstance(url, str):
        return url
    scheme, _, path = url.partition(":")
    if scheme == "embedded":
        return f"embedded:{directory / (path or '.tenancy')}"
    return with_files_in(directory, url)


@contextmanager
def _reading(path: Path, variable: str) -> Iterator[None]:
    """Name the file in errors, and the variable that names it."""
    what = f"{project.shown(path)!r} ({variable})" if variable else repr(project.shown(path))
    try:
        yield
    except OSError as exc:
        raise ConfigurationError(f"{what} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{what} is not UTF-8") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError(f"{what} is not TOML: {exc}") from exc
