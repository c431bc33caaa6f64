"""How a setting is written as text: lists, pairs, keys, objects, URLs; in a variable, a file and an argument alike."""

from __future__ import annotations

import base64
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final

from alembic.config import Config
from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema
from sqlalchemy import MetaData

from ..errors import ConfigurationError
from ..postgres.dsn import Dsn
from ..protocols import GrantHook, KeyWrapper, SecretProvider, UsageSender

SETTING_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$]{0,62}(\.[A-Za-z_][A-Za-z0-9_$]{0,62})?")
SCOPE: Final = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}")
"""A scope: ``*``, or 1 to 64 letters, digits and ``. _ : / -`` that begin with a letter or digit."""
ROLE_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,16}")

Keys = Mapping[str, str | bytes]


# --- text that means more ---------------------------------------------------------------------------------------------


def _read_names(value: object) -> object:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be names: a list, or text with commas between them")
    return tuple(item.strip() for item in value if item.strip())


def _read_pairs(value: object) -> object:
    if isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(";") if item.strip()]
        if not all(separator for _, separator, _ in pairs):
            raise ValueError("must be name=value, separated by semicolons")
        return MappingProxyType({name.strip(): given.strip() for name, _, given in pairs})
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("must be a table of values by name")
    return MappingProxyType({name: _as_text(given) for name, given in value.items()})


def _as_text(value: object) -> object:
    """A value of TOML as PostgreSQL writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) if isinstance(value, (int, float)) else value


def _copied(pairs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(pairs)


def _read_roles(value: object) -> object:
    if isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(";") if item.strip()]
        if not all(separator for _, separator, _ in pairs):
            raise ValueError("must be role=scope scope, separated by semicolons")
        named = [role.strip() for role, _, _ in pairs]
        if len(set(named)) < len(named):
            raise ValueError("must name each role once")
        value = {role.strip(): given.split() for role, _, given in pairs}
    if not isinstance(value, Mapping) or any(isinstance(scopes, str) for scopes in value.values()):
        raise ValueError("must be a table of lists of scopes, by role")
    try:
        roles = {role: tuple(dict.fromkeys(scopes)) for role, scopes in value.items()}
    except TypeError:
        raise ValueError("must be a table of lists of scopes, by role") from None
    for role, scopes in roles.items():
        if not isinstance(role, str) or not ROLE_NAME.fullmatch(role):
            raise ValueError(f"{role!r} is not the name of a role: 1 to 64 letters, digits and . _ -, from a letter")
        for scope in scopes:
            if not isinstance(scope, str) or not SCOPE.fullmatch(scope):
                raise ValueError(f"{scope!r} of role {role!r} is not a scope")
    return MappingProxyType(roles)


def _read_keys(value: object) -> Keys:
    if isinstance(value, str):
        pairs = [item.strip().partition(":") for item in value.split(",") if item.strip()]
        if not all(separator for _, separator, _ in pairs):
            raise ValueError("must be id:base64, separated by commas")
        value = {key_id: encoded for key_id, _, encoded in pairs}
    if not isinstance(value, Mapping) or not all(
        isinstance(key_id, str) and isinstance(key, (str, bytes)) for key_id, key in value.items()
    ):
        raise ValueError("must be a table of keys by id, each as base64")
    return MappingProxyType(dict(value))


def _read_url(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("must be text")
    check_url(value)
    return value


def _read_path(value: object) -> object:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ValueError("must be a path")
    return value


def _read_alembic_file(value: object) -> object:
    return value if isinstance(value, Config) else _read_path(value)


def check_url(url: str, what: str = "") -> None:
    """Refuse what is no URL of a PostgreSQL database.

    Raises:
        ValueError: ... and which is not repeated: it may hold a password.
    """
    problem = ""
    try:
        dsn = Dsn.parse(url)
        if not dsn.database and "service" not in dsn.parameters:
            problem = "names no database"
    except ConfigurationError as exc:
        problem = str(exc)
    if problem and what:
        # a problem of the whole URL continues the sentence; one of a parameter is a sentence of its own
        what += " " if problem.startswith(("is ", "must ", "names ")) else ": "
    if problem:
        raise ValueError(what + problem)


def load_object(path: str) -> Any:
    """Import ``module:attribute.path``.

    Raises:
        ConfigurationError: the path is malformed or names nothing.
    """
    module, separator, attribute = path.partition(":")
    if not separator or not module or not attribute:
        raise ConfigurationError(f"{path!r} is not of the form module:attribute")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, TypeError, ValueError, AssertionError) as exc:
        raise ConfigurationError(f"{path!r} cannot be loaded: {type(exc).__name__}: {exc}") from exc
    return found


def _read_object(value: object) -> object:
    return load_object(value) if isinstance(value, str) else value


def _read_hook(value: object) -> object:
    found = _read_object(value)
    if not callable(found):
        raise ValueError("must be a function, or module:attribute that names one")
    return found


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _read_seeds(value: object) -> object:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(item, (str, os.PathLike)) or callable(item) for item in value
    ):
        raise ValueError("must be a list of functions, module:function, SQL files and directories of these")
    return tuple(item.strip() if isinstance(item, str) else item for item in value if item != "")


def _read_source(value: object) -> object:
    if not (isinstance(value, (str, os.PathLike)) and os.fspath(value)) and not callable(value):
        raise ValueError("must be a file, or a function as module:function")
    return value


def named(value: object) -> str:
    """Name what a setting holds, a path or a function, as text."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    found = getattr(value, "function", None) or value
    return f"{getattr(found, '__module__', '')}:{getattr(found, '__qualname__', type(found).__qualname__)}"


def _all_named(values: tuple[object, ...]) -> list[str]:
    return [named(value) for value in values]


def _read_metadata(value: object) -> object:
    found = _read_object(value)
    if found is not None and not isinstance(found, MetaData):
        raise ValueError("must be a MetaData of SQLAlchemy, or module:attribute that names one")
    return found


# --- kinds of settings ------------------------------------------------------------------------------------------------

_LOADED = WithJsonSchema({"type": "string", "pattern": "^[^:]+:[^:]+$", "description": "module:attribute"})
_TABLE_OF_TEXT = {"type": "object", "additionalProperties": {"type": "string"}}

_TABLE_OF_VALUES = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}

# text of a variable is read as a number; True is an int for Python, and means something else
_NUMBER = BeforeValidator(_refuse_bool)
Count = Annotated[int, Field(ge=1), _NUMBER]
AtLeastZero = Annotated[int, Field(ge=0), _NUMBER]
Seconds = Annotated[float, Field(gt=0), _NUMBER]
SecondsOrZero = Annotated[float, Field(ge=0), _NUMBER]
Fraction = Annotated[float, Field(ge=0, le=1), _NUMBER]
Names = Annotated[
    tuple[str, ...], PlainValidator(_read_names), WithJsonSchema({"type": "array", "items": {"type": "string"}})
]
_DUMPED = PlainSerializer(_copied)
Pairs = Annotated[Mapping[str, str], PlainValidator(_read_pairs), _DUMPED, WithJsonSchema(_TABLE_OF_VALUES)]
OptionalPairs = Annotated[
    Mapping[str, str | None], PlainValidator(_read_pairs), _DUMPED, WithJsonSchema(_TABLE_OF_VALUES)
]
RoleScopes = Annotated[
    Mapping[str, tuple[str, ...]],
    PlainValidator(_read_roles),
    _DUMPED,
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}}),
]
SeedList = Annotated[
    tuple[Any, ...],
    PlainValidator(_read_seeds),
    PlainSerializer(_all_named),
    WithJsonSchema({"type": "array", "items": {"type": "string"}}),
]
RowSource = Annotated[Any, PlainValidator(_read_source), PlainSerializer(named), WithJsonSchema({"type": "string"})]
PostgresUrl = Annotated[str, PlainValidator(_read_url), WithJsonSchema({"type": "string"})]
DirectoryPath = Annotated[str | Path, PlainValidator(_read_path), WithJsonSchema({"type": "string"})]
AlembicFile = Annotated[str | Path | Config, PlainValidator(_read_alembic_file), WithJsonSchema({"type": "string"})]
NamedKeys = Annotated[Mapping[str, str | bytes], PlainValidator(_read_keys), WithJsonSchema(_TABLE_OF_TEXT)]
LoadedMetaData = Annotated[MetaData, PlainValidator(_read_metadata), _LOADED]
LoadedProvider = Annotated[SecretProvider, PlainValidator(_read_object), _LOADED]
LoadedWrapper = Annotated[KeyWrapper, PlainValidator(_read_object), _LOADED]
LoadedHook = Annotated[GrantHook, PlainValidator(_read_hook), _LOADED]
LoadedSender = Annotated[UsageSender, PlainValidator(_read_object), _LOADED]


# --- keys -------------------------------------------------------------------------------------------------------------


def decode_keys(keys: Keys | None, what: str) -> dict[str, bytes]:
    """Return ``keys`` as bytes, in their order.

    Args:
        keys: Each as bytes, or as their base64.
        what: What one of them is called in a message, "encryption key" for example.

    Raises:
        ConfigurationError: an id or a key is malformed.
    """
    found = {}
    for key_id, value in (keys or {}).items():
        if not _KEY_ID.fullmatch(key_id):
            raise ConfigurationError(f"the id of each {what} must be 1 to 16 of A-Z, a-z, 0-9, _ and -")
        try:
            found[key_id] = _decoded(value)
        except ValueError:
            raise ConfigurationError(f"{what} {key_id!r} is not base64") from None
    return found


def _decoded(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else base64.b64decode(value, validate=True)


def parse_keys(name: str, text: str) -> Mapping[str, bytes]:
    """Read keys as ``TENANCY_ENCRYPTION_KEYS`` holds them, ``id:base64`` separated by commas, in order.

    Raises:
        ConfigurationError: the text, which ``name`` stands for in the message, is malformed or empty.
    """
    keys: dict[str, bytes] = {}
    try:
        keys = {key_id: _decoded(value) for key_id, value in _read_keys(text).items()}
    except ValueError:
        keys = {}
    if not keys or not all(keys.values()):
        # the text is a secret, so it is not repeated
        raise ConfigurationError(f"the secret {name!r} is malformed; write it as id:base64, separated by commas")
    return keys
