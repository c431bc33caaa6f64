"""What autogenerate writes into a revision for types that neither SQLAlchemy nor Alembic imports there."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import sqlalchemy
from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import _repr_type
from alembic.operations.ops import CreateTableOp, OpContainer
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeDecorator, TypeEngine

RenderItem = Callable[[str, Any, AutogenContext], str | Literal[False]]


def with_imports(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return env.py's options with a ``render_item`` that adds imports; env.py's own is called first, and wins.

    The ``info`` of a table, which is no DDL, is written only where its text is a constant.
    """
    own: RenderItem | None = options.get("render_item")
    own_process = options.get("process_revision_directives")

    def render_item(kind: str, item: Any, context: AutogenContext) -> str | Literal[False]:
        rendered = own(kind, item, context) if own is not None else False
        # with a prefix of its own, env.py (or the template of its revisions) imports it
        if rendered is not False or kind != "type" or context.opts.get("user_module_prefix") is not None:
            return rendered
        return _render_type(item, context)

    def process(context: Any, revision: Any, directives: list[Any]) -> None:
        if own_process is not None:
            own_process(context, revision, directives)
        for directive in directives:
            for container in (*directive.upgrade_ops_list, *directive.downgrade_ops_list):
                _keep_constants(container)

    return {**options, "render_item": render_item, "process_revision_directives": process}


def _keep_constants(container: OpContainer) -> None:
    for operation in container.ops:
        if isinstance(operation, OpContainer):
            _keep_constants(operation)
        elif isinstance(operation, CreateTableOp):
            operation.info = {key: value for key, value in (operation.info or {}).items() if _is_constant((key, value))}


def _is_constant(value: object) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError):
        return False


def _render_type(item: TypeEngine[Any], context: AutogenContext) -> str | Literal[False]:
    """Add the import that Alembic's own text for ``item`` needs; or return another text, where that one cannot run."""
    module = type(item).__module__
    if module.startswith("sqlalchemy."):
        return False
    # with variants, Alembic calls this for the same item again, and adds them to the result
    if isinstance(item, TypeDecorator) and not item._variant_mapping and not _runs(item, module):
        # the text of a decorator has the arguments of the type inside, which its constructor may not take
        return _repr_type(item.load_dialect_impl(_dialect()), context)
    context.imports.add(f"import {module}")
    return False


def _runs(item: TypeEngine[Any], module: str) -> bool:
    """Whether Alembic's text makes a type with the same DDL."""
    if module == "__main__":
        return False
    try:
        importlib.import_module(module)
        # the text comes from the application's own type, and its code runs here anyhow
        made = eval(f"{module}.{item!r}", {"sa": sqlalchemy, **_root(module)})  # noqa: S307
        return bool(made.compile(_dialect()) == item.compile(_dialect()))
    except Exception:  # noqa: BLE001 - whatever it is, the revision would fail by it
        return False


def _root(module: str) -> dict[str, Any]:
    """The name that ``import module`` binds."""
    root = module.partition(".")[0]
    return {root: importlib.import_module(root)}


def _dialect() -> Any:
    return postgresql.dialect()  # type: ignore[no-untyped-call]
