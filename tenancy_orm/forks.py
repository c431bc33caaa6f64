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
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakMethod

T = TypeVar("T")


_sockets: WeakKeyDictionary[Any, Callable[[Any], int]] = WeakKeyDictionary()
_in_child: list[WeakMethod[Callable[[], None]]] = []
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


def in_child(method: Callable[[], None]) -> None:
    """Call a bound method in processes that are forked from this one, right after the fork, while its object exists.

    It must not wait.
    """
    _in_child.append(WeakMethod(method, _in_child.remove))


def _leave_all() -> None:
    for owner, descriptor in list(_sockets.items()):
        with suppress(Exception):
            number = descriptor(owner)
            if number >= 0:
                os.dup2(_nowhere[0], number, inheritable=False)
    _sockets.clear()
    for reference in _in_child.copy():
        method = reference()
        if method is not None:
            method()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_all)


__all__ = ["in_child", "leave_socket"]
