"""What a forked process leaves to its parent: the sockets of its connections.

Both processes have the same sockets. What the child sends on one, a message that ends the session among it, gets its
parent an answer that it never asked for, or no further one. The child need not mean to: the garbage collector, a
function of ``atexit`` or an exception that unwinds the stack closes connections. And while the child runs, the server
does not notice that the parent has ended. So the child's descriptors are made to lead nowhere.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

T = TypeVar("T")


class Inherited(Protocol):
    """Something that a forked process must give up."""

    def leave_to_parent(self) -> None:
        """Give up what the parent process has. Runs in the child, right after the fork, and must not wait."""


_sockets: WeakKeyDictionary[Any, Callable[[Any], int]] = WeakKeyDictionary()
_inherited: WeakSet[Inherited] = WeakSet()
# a socket with its other end closed, made before any fork: a child may have no descriptor to spare
_nowhere: list[int] = []


def leave_socket(owner: T, descriptor: Callable[[T], int]) -> None:
    """Make a socket lead nowhere in processes that are forked from this one.

    Args:
        owner: What uses the socket, a connection for example.
        descriptor: Returns the number of the open socket of ``owner``; -1 where it is closed. It must not wait.
    """
    if not _nowhere:
        one, other = socket.socketpair()
        other.close()
        _nowhere.append(one.detach())
    _sockets[owner] = descriptor


def leave(inherited: Inherited) -> None:
    """Call ``inherited.leave_to_parent()`` in processes that are forked from this one, while it exists."""
    _inherited.add(inherited)


def _leave_all() -> None:
    for owner, descriptor in list(_sockets.items()):
        with suppress(Exception):
            number = descriptor(owner)
            if number >= 0:
                os.dup2(_nowhere[0], number, inheritable=False)
    _sockets.clear()
    for inherited in list(_inherited):
        inherited.leave_to_parent()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_all)


__all__ = ["Inherited", "leave", "leave_socket"]
