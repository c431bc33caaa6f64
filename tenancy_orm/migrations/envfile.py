"""The text of an env.py: whether it calls ``environment.run``, and how one of plain Alembic can be made to."""

from __future__ import annotations

import ast
import builtins
import difflib
from dataclasses import dataclass
from pathlib import Path

_WIDTH = 88  # what Alembic's own template is formatted to
# options of context.configure that choose the database, or are for printing SQL; environment.run does both
_LEFT_OUT = frozenset({"connection", "url", "dialect_name", "dialect_opts", "literal_binds", "as_sql"})


@dataclass(frozen=True, slots=True)
class Proposal:
    """The text of an env.py that calls ``environment.run``.

    ``unused`` are the functions that only the replaced lines called.
    """

    before: str
    after: str
    unused: tuple[str, ...]

    def diff(self, path: str) -> str:
        """Return the changed lines as a unified diff of the file ``path``, with one line around each change."""
        before, after = (text.splitlines(keepends=True) for text in (self.before, self.after))
        return "".join(difflib.unified_diff(before, after, path, path, n=1))


def calls_run(path: Path) -> bool:
    """Whether an env.py imports ``tenancy_orm.environment``."""
    tree = _parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if tree is not None else ():
        names = {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
        if isinstance(node, ast.ImportFrom) and not node.level:
            if node.module == "tenancy_orm.environment" or (node.module == "tenancy_orm" and "environment" in names):
                return True
        elif isinstance(node, ast.Import) and "tenancy_orm.environment" in names:
            return True
    return False


def propose(text: str) -> Proposal | None:
    """Return how an env.py can be made to call ``environment.run``, or None if it is unlike Alembic's templates.

    The statement at its end that chooses between offline and online mode becomes the call. It gets the options that
    ``context.configure`` gets together with a connection. Everything else stays.
    """
    tree = _parse(text)
    if tree is None:
        return None
    tail = next((node for node in reversed(tree.body) if _chooses_mode(node)), None)
    imported = next((node for node in tree.body if _imports_context(node)), None)
    found = [_options(node) for node in ast.walk(tree) if _is_call(node, "configure") and _is_online(node)]
    if tail is None or imported is None or not found or any(options != found[0] for options in found):
        return None
    options = found[0]
    names = _bound(tree)
    if not all(_names(value) <= names for _, value in options):
        return None
    module = "environment" if "environment" not in names else "tenancy_environment"
    alias = "" if module == "environment" else f" as {module}"
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)
    assert tail.end_lineno is not None and imported.end_lineno is not None  # noqa: S101 - ast.parse sets them
    call = _call(module, options).replace("\n", newline) + newline
    lines[tail.lineno - 1 : tail.end_lineno] = [call]
    lines.insert(imported.end_lineno, f"from tenancy_orm import environment{alias}{newline}")
    return Proposal(text, "".join(lines), _unused(tree, tail))


def _parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _is_call(node: ast.AST, name: str) -> bool:
    """Whether ``node`` calls ``context.<name>``."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "context"
    )


def _chooses_mode(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and any(_is_call(inner, "is_offline_mode") for inner in ast.walk(node.test))


def _imports_context(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.ImportFrom) and node.module == "alembic" and any(x.name == "context" for x in node.names)
    )


def _is_online(node: ast.AST) -> bool:
    assert isinstance(node, ast.Call)  # noqa: S101 - _is_call
    return bool(node.args) or any(keyword.arg == "connection" for keyword in node.keywords)


def _options(node: ast.AST) -> tuple[tuple[str | None, str], ...]:
    assert isinstance(node, ast.Call)  # noqa: S101 - _is_call
    return tuple((x.arg, ast.unparse(x.value)) for x in node.keywords if x.arg not in _LEFT_OUT)


def _names(expression: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(expression, mode="eval")) if isinstance(node, ast.Name)}


def _bound(tree: ast.Module) -> set[str]:
    """The names that module-level code can use: those that it binds, and Python's own."""
    found = set(dir(builtins))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                found.add(inner.id)
            elif isinstance(inner, (ast.Import, ast.ImportFrom)):
                found |= {(alias.asname or alias.name).partition(".")[0] for alias in inner.names}
    return found


def _call(module: str, options: tuple[tuple[str | None, str], ...]) -> str:
    arguments = ["context", *(f"{name}={value}" if name else f"**{value}" for name, value in options)]
    line = f"{module}.run({', '.join(arguments)})"
    if len(line) <= _WIDTH:
        return line
    return f"{module}.run(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


def _unused(tree: ast.Module, tail: ast.stmt) -> tuple[str, ...]:
    """The functions that are reached from ``tail`` alone, in order."""
    functions = {x.name: x for x in tree.body if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef))}
    used: set[str] = set()
    waiting: list[ast.AST] = [node for node in tree.body if node is not tail and node not in functions.values()]
    reached: set[str] = set()
    for into, begin in ((used, waiting), (reached, [tail])):
        pending: list[ast.AST] = list(begin)
        while pending:
            for inner in ast.walk(pending.pop()):
                if isinstance(inner, ast.Name) and inner.id in functions and inner.id not in into:
                    into.add(inner.id)
                    pending.append(functions[inner.id])
    return tuple(name for name in functions if name in reached - used)
