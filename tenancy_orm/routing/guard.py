"""The guard of a tenant's session: an object that came from one tenant does not get into another's session.

Every object that a session loads, takes in or writes is marked with the tenant's id, in ``InstanceState.info``, which
goes along when the object is detached, pickled, cached or made transient. Each way into a session is checked: adding
and deleting (also by a relationship's cascade), merging (also from a cache, ``merge_frozen_result``), bulk saving; and
what is about to be flushed is checked once more.

A transaction in which something was refused writes nothing any more: an object may have come in before the related one
that was refused. It can only be rolled back.

Values that were copied out of an object bear no mark: the guard sees objects, not data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import InstanceState, Session, SessionTransaction, UOWTransaction
from sqlalchemy.orm.attributes import instance_state

from ..errors import CrossTenantError, NotOpenError
from ..protocols import Admission
from .pool import TenantPool

MARK = "tenancy_orm.tenant"
"""The key in ``InstanceState.info``; its value is the tenant's id and slug."""

Owner: TypeAlias = tuple[UUID, str]


class _Refused(NamedTuple):
    transaction: SessionTransaction
    owner: str


class TenantSession(Session):
    """A session on one tenant's database. Everything else is as in SQLAlchemy.

    Args:
        bind: The tenant's engine, or one of its connections.
        tenant: The tenant's id and slug.
        on_refusal: Called with each error that the guard is about to raise.
        options: As ``sqlalchemy.orm.Session``.
    """

    def __init__(
        self,
        bind: Engine | Connection | None = None,
        *,
        tenant: Owner,
        on_refusal: Callable[[CrossTenantError], None] | None = None,
        **options: Any,
    ) -> None:
        self.tenant = tenant
        self.ended = False
        # of the request that opened it: it ends with that, whoever goes on using the session
        self.admission: Admission | None = None
        self._on_refusal = on_refusal
        self._home = bind
        self._refused: _Refused | None = None
        super().__init__(bind, **options)

    # --- the ways in ------------------------------------------------------------------------------------------------

    def merge(self, instance: Any, **options: Any) -> Any:
        """Merge, as in SQLAlchemy.

        Raises:
            CrossTenantError: the object, or one that it leads to, is another tenant's.
        """
        self._check(instance_state(instance), "merging")
        return super().merge(instance, **options)

    def merge_all(self, instances: Iterable[Any], **options: Any) -> Any:
        """Merge several, as in SQLAlchemy.

        Raises:
            CrossTenantError: one of them, or one that it leads to, is another tenant's. Nothing was merged if it is one
                of them.
        """
        instances = list(instances)
        for instance in instances:
            self._check(instance_state(instance), "merging")
        return super().merge_all(instances, **options)

    def _merge(self, state: InstanceState[Any], state_dict: Any, **options: Any) -> Any:
        """What every merge goes through, those of related objects and of ``merge_frozen_result`` too."""
        self._check(state, "merging")
        return super()._merge(state, state_dict, **options)

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **options: Any) -> None:
        """Save without the unit of work, as in SQLAlchemy.

        Raises:
            CrossTenantError: one of the objects is another tenant's. Nothing was saved.
        """
        objects = list(objects)
        states = [instance_state(instance) for instance in objects]
        self._check_transaction()
        for state in states:
            self._check(state, "bulk-saving")
        super().bulk_save_objects(objects, *args, **options)
        for state in states:
            state.info[MARK] = self.tenant

    def get_bind(self, *args: Any, **options: Any) -> Engine | Connection:
        """Return what to work on, as in SQLAlchemy.

        Raises:
            CrossTenantError: it is another tenant's.
            AdmissionEndedError, TenantUnavailableError: what the request that opened it was let in with has ended.
            NotOpenError: the block in which the session was opened has ended.
        """
        bind = super().get_bind(*args, **options)
        if self.admission is not None:
            self.admission.check()
        if self.ended:
            raise NotOpenError("the block of this session has ended; open another: async with tenancy.session()")
        if bind is not self._home:
            pool = bind.engine.pool
            if isinstance(pool, TenantPool) and pool.tenant_id != self.tenant[0]:
                self._refuse("binding a session", pool.slug)
        return bind

    # --- the ways out -----------------------------------------------------------------------------------------------

    # SQLAlchemy has changed its own state by the time the connection refuses: so these refuse before

    def commit(self) -> None:
        """Commit, as in SQLAlchemy.

        Raises:
            WrongEventLoopError: this is another event loop or thread. The transaction goes on.
            AdmissionEndedError, TenantUnavailableError: what the request that opened it was let in with has ended.
        """
        self._check_loop()
        if self.admission is not None:
            self.admission.check()
        super().commit()

    def rollback(self) -> None:
        """Roll back, as in SQLAlchemy.

        Raises:
            WrongEventLoopError: this is another event loop or thread. The transaction goes on.
        """
        self._check_loop()
        super().rollback()

    def _close_impl(self, invalidate: bool, is_reset: bool = False) -> None:
        """What ``close``, ``reset`` and ``invalidate`` go through."""
        # without a transaction there is no connection to touch
        if self._transaction is not None:
            self._check_loop()
        super()._close_impl(invalidate, is_reset)

    def _check_loop(self) -> None:
        pool = self._home.engine.pool if self._home is not None else None
        if isinstance(pool, TenantPool):
            pool.connector.home.check()

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check(self, state: InstanceState[Any], what: str) -> None:
        mark = state.info.get(MARK)
        if mark is not None and mark[0] != self.tenant[0]:
            self._refuse(f"{what} a {state.class_.__name__}", mark[1])

    def _refuse(self, what: str, owner: str) -> None:
        error = CrossTenantError(what, bound=self.tenant[1], requested=owner)
        if (transaction := self.get_transaction()) is not None:
            self._refused = _Refused(transaction, owner)
        if self._on_refusal is not None:
            self._on_refusal(error)
        raise error

    def _check_transaction(self) -> None:
        if self._refused is not None and self._refused.transaction is self.get_transaction():
            raise CrossTenantError(
                "writing in a transaction that must be rolled back", bound=self.tenant[1], requested=self._refused.owner
            )


def _mark(session: TenantSession, state: InstanceState[Any]) -> None:
    # For every row that is loaded: assigning costs 0.3 us less than to have ``info`` make an empty dictionary first.
    if "info" in state.__dict__:
        state.info[MARK] = session.tenant
    else:
        state.info = {MARK: session.tenant}  # type: ignore[misc]


def _before_attach(session: TenantSession, state: InstanceState[Any]) -> None:
    session._check(state, "adding")


def _before_flush(session: TenantSession, context: UOWTransaction, instances: object) -> None:
    session._check_transaction()
    for instance in (*session.new, *session.dirty, *session.deleted):
        session._check(instance_state(instance), "flushing")


event.listen(TenantSession, "loaded_as_persistent", _mark, raw=True)
event.listen(TenantSession, "after_attach", _mark, raw=True)
event.listen(TenantSession, "before_attach", _before_attach, raw=True)
event.listen(TenantSession, "before_flush", _before_flush)
event.listen(TenantSession, "before_commit", TenantSession._check_transaction)


__all__ = ["MARK", "Owner", "TenantSession"]
