"""``Seed`` and the decorator ``seed``: what a new tenant's database is filled with, by a function or a SQL file."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any, overload

from ..errors import ConfigurationError
from ..migrations.statements import statements

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""The name of a seed, or of a reference table."""

_LARGEST_VERSION = 2**31 - 1
_HEADER = re.compile(r"--\s*seed:(?P<options>.*)")
_OFFERED = ("tenant", "previous")


@dataclass(frozen=True, slots=True, eq=False)
class Seed:
    """A seed: its function, or the statements of its SQL file. The decorator ``seed`` makes one of a function.

    Args:
        name: What is recorded in each tenant's database; it must not change.
        version: A whole number from 1; a seed with a higher one than was recorded runs again.
        template: Whether it runs once in the template, as the owner of the tables, and not for each new tenant.
        function: What is called with a session.
        statements: What is run where there is no function.
        origin: Where it was found, for messages.
        lines: The line of the file that each of them begins at, for messages.
    """

    name: str
    version: int = 1
    template: bool = False
    function: Callable[..., Any] | None = field(default=None, repr=False)
    statements: tuple[str, ...] = field(default=(), repr=False)
    origin: str = field(default="", repr=False)
    lines: tuple[int, ...] = field(default=(), repr=False)
    digest: str = field(init=False, repr=False)
    """64 hexadecimal digits that change with the name and the version, and with the text of one for the template."""

    def __post_init__(self) -> None:
        """Refuse a malformed name or version, and a function that asks for what it cannot get.

        Raises:
            ConfigurationError: what is wrong.
        """
        what = f"seed {self.name!r}" + (f" ({self.origin})" if self.origin else "")
        if not NAME.fullmatch(self.name):
            raise ConfigurationError(f"{what}: a name is 1 to 128 letters, digits and . _ -, not beginning with . or -")
        if type(self.version) is not int or not 1 <= self.version <= _LARGEST_VERSION:
            raise ConfigurationError(f"{what}: the version must be a whole number from 1, not {self.version!r}")
        if self.function is not None:
            _check_signature(self.function, what, template=self.template)
        parts = [self.name, str(self.version), *self.statements]
        if self.function is not None and self.template:
            parts.append(_source_of(self.function))
        object.__setattr__(self, "digest", hashlib.sha256("\0".join(parts).encode()).hexdigest())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function as it was written, for its tests."""
        if self.function is None:
            raise TypeError(f"seed {self.name!r} is a SQL file and cannot be called")
        return self.function(*args, **kwargs)

    @property
    def asks(self) -> tuple[str, ...]:
        """The arguments besides the session that the function takes: ``tenant``, ``previous``."""
        if self.function is None:
            return ()
        return tuple(name for name in _OFFERED if name in inspect.signature(self.function).parameters)


@overload
def seed(function: Callable[..., Any], /) -> Seed: ...


@overload
def seed(
    *, name: str | None = None, version: int = 1, template: bool = False
) -> Callable[[Callable[..., Any]], Seed]: ...


def seed(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    version: int = 1,
    template: bool = False,
) -> Seed | Callable[[Callable[..., Any]], Seed]:
    """Make a seed of a function: ``@seed`` or ``@seed(version=2)``. The setting ``provisioning.seeds`` names it.

    The function gets a session of the new tenant, an ``AsyncSession`` where it is a coroutine function and a
    ``Session`` otherwise, in a transaction that is committed when it returns. It may take two arguments more, by name:
    ``tenant``, and ``previous``, the version that was applied before or None.

    Args:
        function: The function.
        name: What is recorded; the function's name where None.
        version: Raise it to have the seed run again for tenants that have an earlier one.
        template: Whether it runs once, in the template that tenants are cloned from. There is no tenant then.

    Raises:
        ConfigurationError: the version is below 1, or the function takes what it cannot get.
    """
    if function is None:
        return functools.partial(_made, name=name, version=version, template=template)
    return _made(function, name=name, version=version, template=template)


def _made(function: Callable[..., Any], *, name: str | None, version: int, template: bool) -> Seed:
    if isinstance(function, Seed) or not callable(function):
        raise ConfigurationError(f"a seed is made of a function, not of {function!r}")
    qualified = f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"
    own = name or str(getattr(function, "__name__", type(function).__name__))
    return Seed(own, version, template, function, origin=qualified)


def read_sql(path: Path) -> Seed:
    """Read a SQL file. Its name is the file's, without the suffix; its header may say ``-- seed: version=2``.

    It runs in the template unless the header says ``template=false``: SQL knows nothing of the tenant.

    Raises:
        ConfigurationError: it cannot be read, its header is malformed, or it has what a transaction does not admit.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"seed {str(path)!r} cannot be read: {exc}") from exc
    options = _header(path, text)
    found = statements(text)
    for statement in found:
        if statement.controls_transaction:
            raise ConfigurationError(f"seed {str(path)!r} runs in one transaction: leave {statement.words[0]} out")
        if statement.reads_input or statement.psql_command is not None:
            what = statement.psql_command or "COPY ... FROM STDIN"
            raise ConfigurationError(f"seed {str(path)!r}: {what} is for psql; write INSERT")
    texts = tuple(text[statement.start : statement.end] for statement in found)
    lines = tuple(text.count("\n", 0, statement.start) + 1 for statement in found)
    return Seed(path.stem, statements=texts, origin=str(path), lines=lines, **options)


def _header(path: Path, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {"version": 1, "template": True}
    for line in text.splitlines():
        if line.strip() and not line.startswith("--"):
            break
        if (found := _HEADER.match(line)) is None:
            continue
        for option in found["options"].replace(",", " ").split():
            name, _, value = option.partition("=")
            if name == "version" and value.isdecimal():
                options["version"] = int(value)
            elif name == "template" and value in ("true", "false"):
                options["template"] = value == "true"
            else:
                raise ConfigurationError(
                    f"seed {str(path)!r}: {option!r} is not an option; write -- seed: version=2 template=false"
                )
    return options


def _check_signature(function: Callable[..., Any], what: str, *, template: bool) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind in (parameters[0].KEYWORD_ONLY, parameters[0].VAR_KEYWORD):
        raise ConfigurationError(f"{what}: the function must take a session as its first argument")
    for parameter in parameters[1:]:
        required = parameter.default is parameter.empty
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if template and parameter.name == "tenant":
            raise ConfigurationError(f"{what}: it runs in the template, where there is no tenant; leave that out")
        required = required and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if required and not (by_name and parameter.name in _OFFERED):
            raise ConfigurationError(
                f"{what}: the function takes {parameter.name!r}; it can have a session, tenant and previous"
            )


def _source_of(function: Callable[..., Any]) -> str:
    inner = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inner.func
    try:
        return inspect.getsource(inner)
    except (OSError, TypeError):
        code = getattr(inner, "__code__", None)
        return "" if code is None else _text_of(code)


def _text_of(code: CodeType) -> str:
    # the repr of an inner function's code has an address
    constants = (_text_of(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts)
    return " ".join((code.co_code.hex(), *code.co_names, *constants))
