"""Tenant to engine to connection to session: budget, pool, engines, sessions and their guard."""

from __future__ import annotations

from .budget import BudgetStatistics, Waiting
from .guard import TenantSession
from .sessions import Router, RoutingStatistics

__all__ = ["BudgetStatistics", "Router", "RoutingStatistics", "TenantSession", "Waiting"]
