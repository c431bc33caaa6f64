"""The arguments of a task: no object of another tenant may travel in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any
from uuid import UUID

from sqlalchemy.orm import InstanceState

from ..errors import CrossTenantError
from ..routing.guard import MARK
from ..tenant import Tenant

_TEXTS = (str, bytes, bytearray, memoryview)
_PLAIN = (*_TEXTS, int, float, complex, type(None), UUID, date, time, timedelta, Decimal, Enum, type)
_OPAQUE = (FunctionType, BuiltinFunctionType, ModuleType)
_CONTAINERS = (list, tuple, set, frozenset)
_STATE = "_sa_instance_state"


def check_arguments(arguments: object, tenant: Tenant, what: str) -> None:
    """Refuse arguments in which there is an object of another tenant.

    What ``pickle`` would send of an object is looked into, however deep, and so is what a mapped object has loaded.
    Texts and bytes are not: an object that the caller has pickled itself is checked by the session that it enters.

    Args:
        arguments: The arguments, as one tuple or list.
        tenant: For whom the task is sent, or runs.
        what: What is refused, for the error.

    Raises:
        CrossTenantError: a mapped object, or a ``Tenant``, is another tenant's.
    """
    # an object is kept, so that no other gets its id
    seen: dict[int, object] = {}
    waiting: list[object] = [arguments]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tenant):
            if value.id != tenant.id:
                raise CrossTenantError(f"{what} a Tenant", bound=tenant.slug, requested=value.slug)
            continue
        state = getattr(value, _STATE, None)
        if isinstance(state, InstanceState):
            mark = state.info.get(MARK)
            if mark is not None and mark[0] != tenant.id:
                raise CrossTenantError(f"{what} a {type(value).__name__}", bound=tenant.slug, requested=mark[1])
        waiting.extend(_inside(value))


def _inside(value: Any) -> Iterable[object]:
    if type(value) in _CONTAINERS:
        return tuple(value)
    if type(value) is dict:
        return (*value.keys(), *value.values())
    if hasattr(value, _STATE):
        # SQLAlchemy's own is in attributes such as _sa_instance_state
        return [item for name, item in vars(value).items() if not name.startswith("_sa_")]
    if isinstance(value, _OPAQUE):
        return []
    if type(value).__module__.startswith("sqlalchemy."):
        # a row, or a relationship's collection
        if isinstance(value, Mapping):
            return [*value.values()]
        return [*value] if isinstance(value, (Sequence, Set)) else []
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 - it cannot be pickled, so that it does not travel
        return []
    if isinstance(reduced, str):
        return []
    # a callable, its arguments, the state, the items of a list and those of a dictionary
    _, arguments, *rest = reduced
    state, items, pairs = (*rest, None, None, None)[:3]
    return [arguments, state, *(items or ()), *(pairs or ())]


__all__ = ["check_arguments"]
