"""The check of a task's arguments finds objects of another tenant, wherever they are."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, ConfigDict
from sqlalchemy import inspect
from sqlalchemy.orm import DeclarativeBase

from tenancy_orm.errors import CrossTenantError
from tenancy_orm.routing.guard import MARK
from tenancy_orm.tasks.arguments import check_arguments
from tenancy_orm.tenant import Status, Tenant
from tests.support.models import Note, Tag


def tenant(slug: str) -> Tenant:
    return Tenant(uuid4(), slug, Status.ACTIVE, "free")


ACME, GLOBEX = tenant("acme"), tenant("globex")


def marked(thing: DeclarativeBase, owner: Tenant) -> Any:
    inspect(thing).info[MARK] = (owner.id, owner.slug)
    return thing


def of_globex() -> Any:
    return marked(Note(body="globex's"), GLOBEX)


@dataclass(slots=True)
class Slotted:
    inner: object


class Model(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    inner: Any


class Private:
    __slots__ = ("__inner",)

    def __init__(self, inner: object) -> None:
        self.__inner = inner


class Listed(list[object]):
    inner: object = None


def listed(inner: object) -> Listed:
    made = Listed()
    made.inner = inner
    return made


WRAPPERS: list[Callable[[Any], object]] = [
    lambda found: found,
    lambda found: [found],
    lambda found: {"a": {"b": (found,)}},
    lambda found: {found: 1},
    lambda found: {found},
    lambda found: deque([found]),
    Slotted,
    lambda found: Model(inner=[found]),
    Private,
    listed,
    lambda found: partial(print, found),
    lambda found: pickle.loads(pickle.dumps(found)),  # noqa: S301 - its own
    lambda found: marked(Tag(name="x", note=found), ACME),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_an_object_of_another_tenant_is_found(wrap: Callable[[Any], object]) -> None:
    """In containers, objects and relationships; pickled it keeps its mark."""
    with pytest.raises(CrossTenantError) as refused:
        check_arguments([[], {"argument": wrap(of_globex())}], ACME, "sending")
    assert (refused.value.bound, refused.value.requested) == ("acme", "globex")
    check_arguments([wrap(marked(Note(body="acme's"), ACME)), wrap(Note(body="nobody's"))], ACME, "sending")


def test_a_tenant_is_an_object_of_its_own() -> None:
    """Code that takes a ``Tenant`` would use it."""
    check_arguments([ACME], ACME, "sending")
    with pytest.raises(CrossTenantError):
        check_arguments([GLOBEX], ACME, "sending")


def test_what_contains_itself_ends() -> None:
    """And what is deep does not overflow the stack; an iterator is not used up."""
    circle: list[object] = []
    circle.append(circle)
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    iterator = iter([1])
    check_arguments([circle, deep, iterator, range(3), UUID(int=0), "text", b"bytes"], ACME, "sending")
    assert next(iterator) == 1
