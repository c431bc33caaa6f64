"""``tenancy config``: the configuration in force, and the JSON Schema of a settings file."""

from __future__ import annotations

import os
from typing import Any

import typer
from pydantic import BaseModel
from sqlalchemy import MetaData

from ..config import TenancyConfig, project, schema, sources
from ..config.validation import settings_of
from ..config.values import named
from .output import Column, console, print_json, print_table
from .runtime import Json, exit_on_error, extend_path, load_tenancy

# what may hold credentials
_SECRETS = frozenset(
    {"control_url", "servers", "encryption_keys", "control.listen_url", "keys.peppers", "backup.store_options"}
)

app = typer.Typer(help="Show what is configured; print the JSON Schema of a settings file.", no_args_is_help=True)


@app.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of tenancy.toml, for editors that complete and check it."""
    print_json(schema.json_schema())


@app.command("show")
def show(as_json: Json = False) -> None:
    """Show every setting, its value and where it comes from. Credentials are hidden."""
    config, origins, read = exit_on_error(_read)
    rows = [
        (name, _shown(config, name), origins.get(name, "default").removeprefix("in "))
        for name in map(".".join, settings_of(TenancyConfig))
    ]
    if as_json:
        print_json([{"setting": name, "value": value, "from": origin} for name, value, origin in rows])
    else:
        console.print(read, markup=False, highlight=False, soft_wrap=True)
        print_table("settings", ("setting", "value", Column("from", drop=1)), rows)


def _read() -> tuple[TenancyConfig, dict[str, str], str]:
    """The configuration that the other commands use, where each setting came from, and a line about what was read."""
    if named := os.environ.get("TENANCY_APP"):
        config = load_tenancy().config
        given = {name: named for name in map(".".join, settings_of(TenancyConfig)) if _is_given(config, name)}
        return config, given, f"configured by: {named} (TENANCY_APP)"
    extend_path()
    found = sources.read(TenancyConfig, None, {})
    files = ", ".join(map(str, found.files)) or f"none; {project.nowhere()}"
    return found.build(TenancyConfig), found.origins, f"settings files: {files}"


def _is_given(config: TenancyConfig, name: str) -> bool:
    """Whether an application gave a setting, even one that is the default."""
    model, field = _place(config, name)
    return field in model.model_fields_set


def _place(config: TenancyConfig, name: str) -> tuple[BaseModel, str]:
    model: BaseModel = config
    *sections, field = name.split(".")
    for section in sections:
        model = getattr(model, section)
    return model, field


def _shown(config: TenancyConfig, name: str) -> str | None:
    model, field = _place(config, name)
    value: Any = getattr(model, field)
    if value is None:
        return None
    if name in _SECRETS and value:
        return "(set)"
    if name in ("tiers", "reference"):
        return ", ".join(value)
    if name == "provisioning.seeds":
        return ", ".join(map(named, value))
    if name == "placement":
        return getattr(value, "__qualname__", None) or repr(value)
    if isinstance(value, MetaData):
        return f"{len(value.tables)} tables"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    if hasattr(value, "items"):
        return "; ".join(f"{key}={given}" for key, given in value.items())
    return str(value)
