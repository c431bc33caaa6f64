"""The arguments of a task: no object of another tenant may travel in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.orm import InstanceState

from ..errors import CrossTenantError
from ..routing.guard import MARK
from ..tenant import Tenant

_TEXTS = (str, bytes, bytearray, memoryview)
_PLAIN = (*_TEXTS, int, float, complex, type(None), UUID, date, time, timedelta, Decimal, Enum, type)
_OPAQUE = (FunctionType, ModuleType)
_STATE = "_sa_instance_state"


def check_arguments(arguments: object, tenant: Tenant, what: str) -> None:
    """Refuse arguments in which there is an object of another tenant.

    Containers, dataclasses and plain objects are looked into, however deep, and so is what a mapped object has loaded.
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


def _inside(value: Any) -> Iterator[object]:
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (Collection, Row)):
        # no iterator, which would be used up
        yield from value
    if isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, _OPAQUE):
        return
    # a container of a class of one's own may have attributes as well
    for name, item in getattr(value, "__dict__", {}).items():
        # SQLAlchemy's own, in mapped objects and their collections
        if not name.startswith("_sa_"):
            yield item
    for name in _slots(value):
        if hasattr(value, name):
            yield getattr(value, name)


def _slots(value: object) -> Iterable[str]:
    if is_dataclass(value) and not isinstance(value, type):
        return [field.name for field in fields(value)]
    names: list[str] = []
    for kind in type(value).__mro__:
        declared = kind.__dict__.get("__slots__", ())
        for name in (declared,) if isinstance(declared, str) else declared:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{kind.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


__all__ = ["check_arguments"]
