"""One cap on the connections to a server for all processes: each has a part of it, leased in the control database."""

from __future__ import annotations

from .lease import Lease
from .leases import ConnectionLeases

__all__ = ["ConnectionLeases", "Lease"]
