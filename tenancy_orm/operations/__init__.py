"""Operations on single tenants: their records, which say where one stands whatever process is killed."""

from .manager import OperationManager
from .progress import StepProgress
from .records import Operation, OperationKind, Operations, OperationState
from .switch import Paused, Switch

__all__ = [
    "Operation",
    "OperationKind",
    "OperationManager",
    "OperationState",
    "Operations",
    "Paused",
    "StepProgress",
    "Switch",
]
