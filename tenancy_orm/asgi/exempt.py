"""Paths by which requests need no credential, or no tenant, matched so that no spelling of another passes as one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.types import Scope

from ..errors import ConfigurationError
from .resolvers import route_path

# What a file system, a proxy or a second decoding could read as another path: segments that are empty, "." or "..", and
# any backslash, control character or percent sign that is left after the server decoded the path once.
_AMBIGUOUS = re.compile(r"//|/\.{1,2}(/|\Z)|[\\%\x00-\x1f\x7f]")


class ExemptPaths:
    """Decides which requests need no credential, or no tenant.

    It uses the path that the application's routes are matched with (``scope["path"]`` below ``root_path``), never a URL
    built from headers. A path is exempt when it equals a pattern, byte for byte, or is below one that ends in ``/*``.

    Args:
        patterns: ``/healthz`` for one path, ``/static/*`` for all below.
        purpose: What they are, in errors: the name of the middleware's argument.

    Raises:
        ConfigurationError: a pattern is not such a path, or would exempt every path.
    """

    def __init__(self, patterns: Iterable[str], *, purpose: str = "exempt") -> None:
        if isinstance(patterns, str):
            raise ConfigurationError(f"{purpose} is a sequence of paths, not one string")
        self.patterns = tuple(patterns)
        for pattern in self.patterns:
            _check(pattern, purpose)
        self._exact = frozenset(p for p in self.patterns if not p.endswith("/*"))
        self._below = tuple(p[:-1] for p in self.patterns if p.endswith("/*"))

    def covers(self, scope: Scope) -> bool:
        """Return whether the request of ``scope`` is to one of them."""
        return self.has(route_path(scope) if scope.get("root_path") else scope["path"])

    def has(self, path: str) -> bool:
        """Return whether a path, as routes are matched with, is one of them."""
        if path in self._exact or (self._below and path.startswith(self._below)):
            return _AMBIGUOUS.search(path) is None
        return False


def _check(pattern: str, purpose: str) -> None:
    plain = pattern.removesuffix("*") if pattern.endswith("/*") else pattern
    if not plain.startswith("/") or "*" in plain or "?" in plain or "#" in plain or _AMBIGUOUS.search(plain):
        raise ConfigurationError(f"{purpose} path {pattern!r} must look like /healthz or /static/*")
    if pattern == "/*":
        raise ConfigurationError(f"{purpose} path '/*' would admit every request without a credential")
