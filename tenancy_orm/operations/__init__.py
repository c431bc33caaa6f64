"""Operations on single tenants: their records, which say where one stands whatever process is killed."""

from .records import Operation, OperationKind, Operations, OperationState

__all__ = ["Operation", "OperationKind", "OperationState", "Operations"]
