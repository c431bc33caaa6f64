"""``tenancy config``: what is configured, and how a settings file is written."""

from __future__ import annotations

from typing import Any

import typer
from pydantic import BaseModel

from ..config import TenancyConfig, schema, sources
from ..config.validation import settings_of
from .output import print_json, print_table
from .runtime import Json, exit_on_error

app = typer.Typer(help="Show what is configured; print the JSON Schema of a settings file.", no_args_is_help=True)


@app.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of tenancy.toml, for editors that complete and check it."""
    print_json(schema.json_schema())


@app.command("show")
def show(as_json: Json = False) -> None:
    """Show every setting, its value and where it comes from. Secrets are hidden."""
    found = exit_on_error(lambda: sources.read(TenancyConfig, None, {}))
    config = exit_on_error(TenancyConfig.from_env)
    rows = [
        {
            "setting": ".".join(path),
            "value": _value(config, path),
            "from": found.origins.get(".".join(path), "default"),
        }
        for path in settings_of(TenancyConfig)
    ]
    if as_json:
        print_json(rows)
    else:
        print_table("settings", ("setting", "value", "from"), [tuple(row.values()) for row in rows])


def _value(config: TenancyConfig, path: tuple[str, ...]) -> str | None:
    model: BaseModel = config
    for section in path[:-1]:
        model = getattr(model, section)
    value: Any = getattr(model, path[-1])
    if value is None:
        return None
    # what a repr of the configuration leaves out may hold credentials
    return str(value) if type(model).model_fields[path[-1]].repr else "(set)"
