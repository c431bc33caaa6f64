"""The JSON Schema of a settings file, for editors that complete and check TOML."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any

from pydantic import BaseModel

from .settings import TenancyConfig
from .validation import Section


def json_schema(*, with_texts: bool = False) -> dict[str, Any]:
    """The JSON Schema of ``tenancy.toml``, and of ``[tool.tenancy]`` in ``pyproject.toml``.

    Each setting is described by what the documentation says of it. Nothing is required: what a file leaves out comes
    from variables.

    Args:
        with_texts: Whether the descriptions say how a setting is written in a variable, too.
    """
    schema = TenancyConfig.model_json_schema()
    schema.pop("required", None)
    schema["description"] = (
        "Settings of tenancy_orm. What is left out has its default, or comes from TENANCY_* variables."
    )
    _describe(schema, TenancyConfig, with_texts)
    for section in Section.__subclasses__():
        if section.__name__ in schema["$defs"]:
            _describe(schema["$defs"][section.__name__], section, with_texts)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Settings of tenancy_orm"}


def _describe(schema: dict[str, Any], model: type[BaseModel], with_texts: bool) -> None:
    """Add the docstring of each field. pydantic can do so too, but only when a class is made: at every import."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)  # noqa: S101 - what getsource returns of a class
    for field, docstring in zip(definition.body, definition.body[1:], strict=False):
        match field, docstring:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ) if name in schema["properties"]:
                schema["properties"][name]["description"] = _for_a_file(" ".join(text.split()), with_texts)


def _for_a_file(text: str, with_texts: bool) -> str:
    """Return a description without what concerns Python and variables: a file has no None, and tables for pairs."""
    text = text if with_texts else re.sub(r" As text:.*", "", text)
    text = re.sub(r"\b([Ww])here None\b", r"\1here it is not set", text)
    text = re.sub(r"\bis None\b", "is not set", text)
    return re.sub(r"\b(True|False)\b", lambda word: word[0].lower(), text).replace("``", "`")
