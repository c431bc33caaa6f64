"""Moves of tenants to another server, while they are used, and which tenants should be moved."""

from .manager import MoveManager, MoveOutcome, MoveProgress, MoveReport, TidyReport
from .rebalance import MovePlan, PlannedMove, ServerLoad

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
