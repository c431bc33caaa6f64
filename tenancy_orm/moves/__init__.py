"""Moves of tenants to another server, while they are used, and which tenants should be moved."""

from .manager import MoveManager
from .rebalance import MovePlan, PlannedMove, ServerLoad
from .report import MoveOutcome, MoveProgress, MoveReport, TidyReport

__all__ = [
    "MoveManager",
    "MoveOutcome",
    "MovePlan",
    "MoveProgress",
    "MoveReport",
    "PlannedMove",
    "ServerLoad",
    "TidyReport",
]
