"""Which revisions have no downgrade: none at all, or one that does nothing.

A downgrade that only says ``pass`` would bring the version table back, and leave the schema as it is.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

from alembic.script import Script

from ..migrations.data_migrations import data_migrations_of

# calls of these say something, and change nothing
_SAYING = frozenset({"print", "warn", "debug", "info", "warning", "error", "exception", "critical", "log"})
_IDLE_INSTRUCTIONS = frozenset({"RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "POP_TOP", "CACHE"})


def missing_downgrade(script: Script) -> str | None:
    """Return why a revision cannot be taken back; None where it can.

    A revision with an upgrade that does nothing either, as a merge has, is none; unless it has a data migration that
    nothing reverses.
    """
    downgrade = getattr(script.module, "downgrade", None)
    if downgrade is None:
        return "it has no downgrade()"
    found = _Body(downgrade).verdict()
    if found is None:
        return None
    if found == "nothing" and _Body(getattr(script.module, "upgrade", None)).verdict() == "nothing":
        lasting = [one.name for one in data_migrations_of(script.module) if one.reversal is None]
        return f"its data migration {lasting[0]} has no reverse" if lasting else None
    return "its downgrade() only raises an error" if found == "error" else "its downgrade() does nothing"


class _Body:
    """The body of a function, and of those that it calls and nothing else.

    Args:
        function: A function, a method, a ``partial``, an object with ``__call__``; or something that wraps one.
    """

    def __init__(self, function: Any, seen: frozenset[int] = frozenset()) -> None:
        self._function = _unwrapped(function)
        self._seen = seen | {id(self._function)}

    def verdict(self) -> str | None:
        """Return ``nothing`` or ``error`` for a body that does no more than that; None for one that does something."""
        function = self._function
        if not isinstance(function, FunctionType):
            return None
        node = _source(function)
        if node is None:
            return _verdict_of_code(function.__code__)
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            return None
        return self._of_statements(node.body)

    def _of_statements(self, body: list[ast.stmt]) -> str | None:
        for statement in body:
            if isinstance(statement, ast.Raise) or _fails(statement):
                return "error"
            if isinstance(statement, ast.Return) and (statement.value is None or _is_constant(statement.value)):
                return "nothing"
            value = statement.value if isinstance(statement, (ast.Expr, ast.Return)) else None
            if isinstance(value, ast.Call):
                if (found := self._of_call(value)) != "nothing":
                    return found
            elif not (isinstance(statement, (ast.Pass, ast.Import, ast.ImportFrom)) or _is_constant(value)):
                return None
        return "nothing"

    def _of_call(self, call: ast.Call) -> str | None:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
        if name in _SAYING:
            return "nothing"
        called = self._resolve(call.func)
        if called is None or id(_unwrapped(called)) in self._seen:
            return None
        return _Body(called, self._seen).verdict()

    def _resolve(self, node: ast.expr) -> Any:
        """Return the object that a name or an attribute of one leads to, without running anything of the revision."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        found = inspect.getclosurevars(self._function).nonlocals.get(node.id) or self._function.__globals__.get(node.id)
        for name in reversed(names):
            found = inspect.getattr_static(found, name, None)
            found = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
        return found


def _unwrapped(function: Any) -> Any:
    """Return the plain function that a call of ``function`` runs."""
    for _ in range(20):  # a chain that leads back to itself ends
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, MethodType):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif callable(function) and not isinstance(function, (FunctionType, type)):
            call = inspect.getattr_static(type(function), "__call__", None)
            if not isinstance(call, FunctionType):
                return function
            function = call
        else:
            return function
    return function


def _source(function: Callable[..., Any]) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    try:
        # a file that changed since it was imported has another function at these lines
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    node = tree.body[0] if tree.body else None
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == function.__name__:
        return node
    return None


def _is_constant(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant)


def _fails(statement: ast.stmt) -> bool:
    """Whether it is ``assert False``."""
    return isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant) and not statement.test.value


def _verdict_of_code(code: CodeType) -> str | None:
    """Judge a function without source: a lambda, or a revision that is only there compiled."""
    instructions = {instruction.opname for instruction in dis.get_instructions(code)}
    if instructions <= _IDLE_INSTRUCTIONS:
        return "nothing"
    if "RAISE_VARARGS" in instructions and set(code.co_names) <= {"NotImplementedError"}:
        return "error"
    return None


__all__ = ["missing_downgrade"]
