"""Replacing a function of another package for one context, while all others keep the original."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Substitution:
    """A replacement for an attribute of a class or a module, in force in the contexts that ask for it.

    Other threads and tasks get the original at all times. The attribute is changed only while a context asks.

    Args:
        owner: The class or module.
        name: The name of a function in it.
        replacement: What is called instead, with the same arguments.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self._owner = owner
        self._name = name
        self._replacement = replacement
        self._lock = threading.Lock()
        # how many contexts ask, and what they have replaced; guarded by _lock
        self._users = 0
        self._original: Any = None
        self._dispatcher: Any = None
        self._asked: ContextVar[bool] = ContextVar(f"tenancy_orm.migrations.{name}", default=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Call the replacement in the body, its tasks, and threads that copy its context."""
        self._install()
        token = self._asked.set(True)
        try:
            yield
        finally:
            self._asked.reset(token)
            self._remove()

    def _install(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            self._original = original = getattr(self._owner, self._name)

            @functools.wraps(original)
            def dispatch(*arguments: Any, **options: Any) -> Any:
                return (self._replacement if self._asked.get() else original)(*arguments, **options)

            self._dispatcher = dispatch
            setattr(self._owner, self._name, dispatch)

    def _remove(self) -> None:
        with self._lock:
            self._users -= 1
            # somebody else may have wrapped it in the meantime
            if not self._users and getattr(self._owner, self._name) is self._dispatcher:
                setattr(self._owner, self._name, self._original)
