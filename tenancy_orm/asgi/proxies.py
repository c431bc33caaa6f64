"""Proxies that the server does not trust: every caller behind one then has the proxy's address."""

from __future__ import annotations

import logging

from starlette.types import Scope

logger = logging.getLogger("tenancy_orm.asgi")


class ProxyWarning:
    """Warns, once, where a limit by address is met by what looks like a proxy's address.

    It is asked when a request is refused, not with every request: a proxy that nobody trusts does no harm before.
    """

    def __init__(self) -> None:
        self._warned = False

    def check(self, scope: Scope) -> None:
        """Warn if the request of ``scope`` was forwarded, and has not the address that it was forwarded for."""
        client = scope.get("client")
        if self._warned or client is None:
            return
        values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
        # a server that trusts the proxy has taken the address from there, where it may have a port
        if not values or any(client[0] in entry for entry in ",".join(values).split(",")):
            return
        self._warned = True
        logger.warning(
            "requests from %s, which sends X-Forwarded-For, are limited as those of one caller; if it is a proxy, have "
            "the server trust its address (uvicorn: --forwarded-allow-ips), so that each caller has its own",
            client[0],
        )
