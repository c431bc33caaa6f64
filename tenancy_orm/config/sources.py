"""Where settings are read from: variables, ``.env``, secret files, ``tenancy.toml``, ``pyproject.toml``.

pydantic-settings reads them. What is added here: each setting remembers where it came from, so that an error can
say it; a variable or key that is no setting is an error; and paths in a file are beside that file.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, TomlConfigSettingsSource

from ..errors import ConfigurationError, SettingError
from .validation import sections_of, settings_of, suggestion

PREFIX = "TENANCY_"

OTHER_VARIABLES = frozenset(
    {
        "TENANCY_APP",
        "TENANCY_CONFIG",
        "TENANCY_ENV_FILE",
        "TENANCY_SECRETS_DIR",
        "TENANCY_TEST_DSN",
        "TENANCY_TEST_POSTGRES",
    }
)
"""Variables of this package that are no settings."""

# What Kubernetes sets for services named ``tenancy`` or ``tenancy-...``, and Docker for containers that are so named.
_SERVICE_LINKS = re.compile(
    r"TENANCY_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT(_\w+)?|PROTO))?)?|NAME|ENV_\w+)"
)

_MISSING = "run tenancy init, write tenancy.toml, or set TENANCY_CONTROL_URL"


@dataclass(frozen=True)
class Found:
    """What was read, and where each setting came from, by its dotted name."""

    values: dict[str, Any]
    origins: dict[str, str]

    def locate(self, error: SettingError) -> SettingError:
        """Return ``error`` with the origin of each setting that it names."""
        problems = dict(error.problems)
        if problems.get("control_url") == "is missing":
            problems["control_url"] = f"is not set: {_MISSING}"
        origins = {}
        for name in problems:
            # a table's own origin stands for what is in it: encryption_keys.1
            parents = (name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1))
            origins[name] = next((self.origins[parent] for parent in parents if parent in self.origins), "")
        return SettingError(problems, {name: origin for name, origin in origins.items() if origin})


def variables_of(model: type[BaseSettings]) -> dict[str, str]:
    """The variable of each setting, by the setting's dotted name."""
    return {".".join(path): PREFIX + "_".join(path).upper() for path in settings_of(model)}


def read(model: type[BaseSettings], environ: Mapping[str, str] | None, overrides: Mapping[str, Any]) -> Found:
    """Read all sources of the settings of ``model``; ``TenancyConfig.from_env`` says which, and which wins.

    Raises:
        SettingError: a variable or a key of a file is no setting.
        ConfigurationError: a file cannot be read.
    """
    environ = os.environ if environ is None else environ
    env_file, from_env_file = _read_env_file(environ.get("TENANCY_ENV_FILE"))
    named = {**from_env_file, **environ}  # where the other files are
    found = Found({}, {})
    for path in _settings_files(named.get("TENANCY_CONFIG")):
        _merge(found, model, _read_settings_file(model, path), _always(f"in {path}"))
    files = _read_secret_files(named.get("TENANCY_SECRETS_DIR"))
    texts = {name: text for name, (_, text) in files.items()}
    _merge_variables(found, model, texts, lambda variable: f"file {files[variable][0]}")
    _merge_variables(found, model, from_env_file, lambda variable: f"{variable} in {env_file}")
    _merge_variables(found, model, environ, lambda variable: variable)
    _merge(found, model, overrides, _always(""))
    return found


def _always(origin: str) -> Callable[[str], str]:
    return lambda _: origin


def _merge(found: Found, model: type[BaseModel], values: Mapping[str, Any], origin: Callable[[str], str]) -> None:
    """Put ``values`` over what was found, setting by setting; ``origin`` says where one of a dotted name came from."""
    _merge_into(found.values, found.origins, values, origin, sections_of(model), "")


def _merge_into(
    into: dict[str, Any],
    origins: dict[str, str],
    values: Mapping[str, Any],
    origin: Callable[[str], str],
    sections: Collection[str],
    above: str,
) -> None:
    for name, value in values.items():
        setting = f"{above}{name}"
        if setting in sections and isinstance(value, Mapping):
            inner = into.get(name)
            into[name] = inner = dict(inner) if isinstance(inner, Mapping) else {}
            _merge_into(inner, origins, value, origin, sections, f"{setting}.")
        else:
            into[name] = value
            origins[setting] = origin(setting)


def _merge_variables(
    found: Found, model: type[BaseSettings], given: Mapping[str, str | None], origin: Callable[[str], str]
) -> None:
    variables = variables_of(model)
    known = set(variables.values())
    settings: dict[str, str] = {}
    for name, text in given.items():
        variable = name.upper()
        if variable in known and text is not None:
            settings[variable.lower()] = text
        elif variable.startswith(PREFIX) and variable not in OTHER_VARIABLES and not _SERVICE_LINKS.fullmatch(variable):
            where = origin(name) if name in given else ""
            reason = f"there is no such setting{suggestion(variable, known)}"
            raise SettingError({name: reason}, {} if where == name else {name: where})
    values = _Variables(model, settings)()
    _merge(found, model, values, lambda setting: origin(variables.get(setting, setting)))


class _Variables(EnvSettingsSource):
    """Settings as variables of an environment, wherever these were read from.

    Args:
        settings_cls: The model.
        variables: Names in lower case, with the prefix.
    """

    def __init__(self, settings_cls: type[BaseSettings], variables: Mapping[str, str]) -> None:
        self._variables = variables
        super().__init__(settings_cls)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return dict(self._variables)

    def explode_env_vars(self, field_name: str, field: FieldInfo, env_vars: Mapping[str, str | None]) -> dict[str, Any]:
        """The settings of a section. ``control_url`` is no ``url`` in the section ``control``."""
        plain = {f"{PREFIX}{name}".lower() for name in self.settings_cls.model_fields}
        return super().explode_env_vars(
            field_name, field, {name: text for name, text in env_vars.items() if name not in plain}
        )


# --- files ------------------------------------------------------------------------------------------------------------


def _read_env_file(named: str | None) -> tuple[Path, dict[str, str | None]]:
    path = Path(named or ".env")
    if not named and not path.is_file():
        return path, {}
    with _reading(path):
        # dotenv itself takes a missing file for an empty one
        return path, dotenv_values(stream=StringIO(path.read_text(encoding="utf-8")))


def _read_secret_files(named: str | None) -> dict[str, tuple[Path, str]]:
    """Each secret file and its text, by the name of its variable."""
    found: dict[str, tuple[Path, str]] = {}
    for directory in map(Path, filter(None, (named or "").split(os.pathsep))):
        with _reading(directory):
            for path in sorted(directory.iterdir()):
                # Kubernetes keeps the files in a directory beside the links to them
                if path.name.upper().startswith(PREFIX) and path.is_file():
                    found[path.name.upper()] = (path, path.read_text(encoding="utf-8").strip())
    return found


def _settings_files(named: str | None) -> Iterator[Path]:
    """The files to read, the last one wins."""
    if named:
        yield Path(named)
        return
    for path in (Path("pyproject.toml"), Path("tenancy.toml")):
        if path.is_file():
            yield path


def _read_settings_file(model: type[BaseSettings], path: Path) -> dict[str, Any]:
    with _reading(path):
        path.stat()  # the library takes a missing file for an empty one
        values = TomlConfigSettingsSource(model, path)()
    if path.name == "pyproject.toml":
        values = values.get("tool", {}).get("tenancy", {})
    return _beside(path.parent, values)


def _beside(directory: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Make paths of a settings file absolute, wherever the program runs."""
    values = dict(values)
    if isinstance(migrations := values.get("migrations"), str):
        values["migrations"] = str(directory / migrations)
    if isinstance(url := values.get("control_url"), str) and url.startswith("embedded:"):
        values["control_url"] = f"embedded:{directory / url.removeprefix('embedded:')}"
    return values


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{str(path)!r} is not UTF-8") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError(f"{str(path)!r} is not TOML: {exc}") from exc
