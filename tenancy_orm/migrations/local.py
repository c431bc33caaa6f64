"""Makes ``alembic.op`` and ``alembic.context`` context-local, so that migrations can run at the same time.

Revision scripts and env.py files use these two modules. The functions of each delegate to one process-wide object: the
``Operations`` or the ``EnvironmentContext`` of the running migration. If two migrations run at once, in threads or in
tasks, the functions of one reach the database of the other. Alembic does so on purpose (one command, one process); a
fleet cannot.

``install`` keeps that object in a ``ContextVar`` instead. Tasks, ``asyncio.to_thread`` and SQLAlchemy's greenlets
inherit the context; plain threads and executors do not. For these, code written for plain Alembic still works: if a
thread has no object of its own and exactly one is active in the process, it gets that one. If several are active, the
call is refused. Objects that are installed inside ``isolated`` are not visible to other contexts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, cast

import alembic.context
import alembic.op
from alembic.operations import Operations
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.util.langhelpers import ModuleClsProxy

_isolated: ContextVar[bool] = ContextVar("tenancy_orm.migrations.isolated", default=False)


class _ProxyStack:
    """The active objects of one of the two modules, in each context."""

    def __init__(self, cls: type[ModuleClsProxy], module: ModuleType) -> None:
        self.cls = cls
        self.module = module
        self._lock = threading.Lock()
        # innermost last: Alembic environments nest (a template is built while ``alembic upgrade`` runs)
        self._stack: ContextVar[tuple[Any, ...]] = ContextVar(f"tenancy_orm.migrations.{cls.__name__}", default=())
        # the objects that threads without a stack may get; guarded by _lock
        self._shared: list[Any] = []

    @property
    def attributes(self) -> set[str]:
        """Names of the object's plain attributes that the module has (``context.config``)."""
        return ModuleClsProxy._setups[self.cls][0]

    def find(self) -> Any | None:
        """The object of the running context, or None."""
        stack = self._stack.get()
        if stack:
            return stack[-1]
        if _isolated.get():
            return None
        with self._lock:
            return self._shared[0] if len(self._shared) == 1 else None

    def push(self, proxy: Any) -> None:
        self._stack.set((*self._stack.get(), proxy))
        if not _isolated.get():
            with self._lock:
                self._shared.append(proxy)

    def pop(self, proxy: Any) -> None:
        """Remove ``proxy`` from anywhere in the stack: a generator may be closed in another order or context."""
        self._stack.set(tuple(x for x in self._stack.get() if x is not proxy))
        with self._lock:
            self._shared = [x for x in self._shared if x is not proxy]

    def replace(self, proxy: Any | None) -> None:
        """Make ``proxy``, or nothing, the only object, as an assignment to the module's ``_proxy`` does."""
        for old in self._stack.get():
            self.pop(old)
        if proxy is not None:
            self.push(proxy)

    def missing(self) -> str:
        return (
            f"no Alembic {self.cls.__name__} is active in this context; {self.module.__name__} works inside a "
            "migration, in the task or thread that runs it"
        )


class _Forwarder:
    """Forwards, in the module's globals, to the object of the calling context."""

    __slots__ = ("_stack",)

    def __init__(self, stack: _ProxyStack) -> None:
        self._stack = stack

    def __getattr__(self, name: str) -> Any:
        found = self._stack.find()
        if found is None:
            # NameError is what Alembic raises here
            raise NameError(f"can't invoke function {name!r}: {self._stack.missing()}")
        return getattr(found, name)


class _LocalModule(ModuleType):
    """A module with a proxy and proxied attributes that depend on the context.

    The module's functions read ``_proxy`` from its globals, which has the forwarder; other code reads the attribute,
    and gets the object itself.
    """

    @property
    def _proxy(self) -> Any | None:
        return _stacks[self.__name__].find()

    @_proxy.setter
    def _proxy(self, proxy: Any | None) -> None:
        _stacks[self.__name__].replace(proxy)

    @_proxy.deleter
    def _proxy(self) -> None:
        _stacks[self.__name__].replace(None)

    def __getattr__(self, name: str) -> Any:
        stack = _stacks[self.__name__]
        if name not in stack.attributes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = stack.find()
        if found is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} here: {stack.missing()}")
        return getattr(found, name)


_stacks = {
    module.__name__: _ProxyStack(cls, module)
    for cls, module in ((Operations, alembic.op), (EnvironmentContext, alembic.context))
}
_installing = threading.Lock()


def is_installed() -> bool:
    """Whether ``alembic.op`` and ``alembic.context`` are context-local."""
    return isinstance(alembic.op, _LocalModule)


def install() -> None:
    """Make ``alembic.op`` and ``alembic.context`` context-local in this process. A second call does nothing.

    An active environment stays active: ``alembic upgrade`` loads the env.py that imports this.
    """
    with _installing:
        if is_installed():
            return
        for stack in _stacks.values():
            _install(stack)
        _set(Operations, "context", classmethod(_operations_context))


@contextmanager
def isolated() -> Iterator[None]:
    """Hide the objects that the body installs from other contexts, and theirs from the body.

    The tasks of a fleet run inside this: a stray thread must get an error, never the last running tenant.
    """
    token = _isolated.set(True)
    try:
        yield
    finally:
        _isolated.reset(token)


def _install(stack: _ProxyStack) -> None:
    def install_proxy(self: Any) -> None:
        stack.push(self)

    def remove_proxy(self: Any) -> None:
        stack.pop(self)

    names = vars(stack.module)
    active = names.get("_proxy")
    names["_proxy"] = _Forwarder(stack)
    for name in stack.attributes:
        names.pop(name, None)
    stack.module.__class__ = _LocalModule
    _set(stack.cls, "_install_proxy", install_proxy)
    _set(stack.cls, "_remove_proxy", remove_proxy)
    if active is not None:
        stack.push(active)


def _set(cls: type[Any], name: str, value: Any) -> None:
    setattr(cls, name, value)


@contextmanager
def _operations_context(cls: type[Operations], migration_context: MigrationContext) -> Iterator[Operations]:
    # Alembic's own leaves the object installed when the migration raises
    operations = cast(Any, Operations(migration_context))
    operations._install_proxy()
    try:
        yield operations
    finally:
        operations._remove_proxy()
