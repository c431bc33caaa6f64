"""The PostgreSQL servers that hold tenants' databases: their rows, their addresses, and logins to them."""

from __future__ import annotations

from .server import Server, Servers

__all__ = ["Server", "Servers"]
