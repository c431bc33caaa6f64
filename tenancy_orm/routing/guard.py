"""The guard of a tenant's session: an object of one tenant cannot enter another tenant's session.

Every object that a session loads, adds or writes is marked with the tenant's id, in ``InstanceState.info``. The mark
stays when the object is detached, pickled, cached or made transient. Each way into a session is checked: adding and
deleting (also by a relationship's cascade), merging (also from a cache, ``merge_frozen_result``) and bulk saving; the
objects of a flush are checked once more.

After a refusal the transaction can only be rolled back: an object may have entered the session before the related one
that was refused.

The guard checks objects, not data: values that were copied out of an object have no mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import InstanceState, Session, SessionTransaction, UOWTransaction
from sqlalchemy.orm.attributes import instance_state

from ..errors import CrossTenantError, NotOpenError, ReadOnlyError
from ..postgres.sqlalchemy_versions import SQLALCHEMY_2_0
from ..protocols import Admission
from .routed_pool import RoutedPool

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
        on_refusal: Called with each error that the guard is going to raise.
        read_only: Whether a flush is refused; that nothing else writes, PostgreSQL sees to.
        options: As ``sqlalchemy.orm.Session``.
    """

    def __init__(
        self,
        bind: Engine | Connection | None = None,
        *,
        tenant: Owner,
        on_refusal: Callable[[CrossTenantError], None] | None = None,
        read_only: bool = False,
        **options: Any,
    ) -> None:
        self.tenant = tenant
        self.read_only = read_only
        self.ended = False
        # of the request that opened the session: checked whoever uses the session later
        self.admission: Admission | None = None
        self._on_refusal = on_refusal
        self._home = bind
        self._refused: _Refused | None = None
        super().__init__(bind, **options)

    # --- the ways in ------------------------------------------------------------------------------------------------

    def merge(self, instance: Any, **options: Any) -> Any:
        """Merge, as in SQLAlchemy.

        Raises:
            CrossTenantError: the object, or a related one, is another tenant's.
        """
        self._check(instance_state(instance), "merging")
        return super().merge(instance, **options)

    if not SQLALCHEMY_2_0:

        def merge_all(self, instances: Iterable[Any], **options: Any) -> Any:
            """Merge several, as in SQLAlchemy.

            Raises:
                CrossTenantError: one of them, or a related object, is another tenant's. If it is one of them, nothing
                    was merged.
            """
            instances = list(instances)
            for instance in instances:
                self._check(instance_state(instance), "merging")
            return super().merge_all(instances, **options)

    def _merge(self, state: InstanceState[Any], state_dict: Any, **options: Any) -> Any:
        """Every merge calls this, also for related objects and for ``merge_frozen_result``."""
        self._check(state, "merging")
        return super()._merge(state, state_dict, **options)

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **options: Any) -> None:
        """Save objects without the unit of work, as in SQLAlchemy.

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
        """Return the engine or connection to use, as in SQLAlchemy.

        Raises:
            CrossTenantError: it is another tenant's.
            AdmissionEndedError, TenantUnavailableError: the admission of the request that opened the session has ended.
            NotOpenError: the block in which the session was opened has ended.
        """
        bind = super().get_bind(*args, **options)
        if self.admission is not None:
            self.admission.check()
        if self.ended:
            raise NotOpenError("the block of this session has ended; open another: async with tenancy.session()")
        if bind is not self._home:
            pool = bind.engine.pool
            if isinstance(pool, RoutedPool) and pool.tenant_id != self.tenant[0]:
                self._refuse("binding a session", pool.slug)
        return bind

    # --- the ways out -----------------------------------------------------------------------------------------------

    # By the time the connection refuses, SQLAlchemy has changed its own state: so these refuse before.

    def commit(self) -> None:
        """Commit, as in SQLAlchemy.

        Raises:
            WrongEventLoopError: this is another event loop or thread. The transaction stays open.
            AdmissionEndedError, TenantUnavailableError: the admission of the request that opened the session has ended.
        """
        self._check_loop()
        if self.admission is not None:
            self.admission.check()
        super().commit()

    def rollback(self) -> None:
        """Roll back, as in SQLAlchemy.

        Raises:
            WrongEventLoopError: this is another event loop or thread. The transaction stays open.
        """
        self._check_loop()
        super().rollback()

    def _close_impl(self, invalidate: bool, is_reset: bool = False) -> None:
        """``close``, ``reset`` and ``invalidate`` call this."""
        # without a transaction there is no connection to touch
        if self._transaction is not None:
            self._check_loop()
        super()._close_impl(invalidate, is_reset)

    def _check_loop(self) -> None:
        pool = self._home.engine.pool if self._home is not None else None
        if isinstance(pool, RoutedPool):
            pool.route.home.check()

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
    # Called for every loaded row: assigning takes 0.3 us less than letting ``info`` create an empty dictionary first.
    if "info" in state.__dict__:
        state.info[MARK] = session.tenant
    else:
        state.info = {MARK: session.tenant}  # type: ignore[misc]


def _before_attach(session: TenantSession, state: InstanceState[Any]) -> None:
    session._check(state, "adding")


def _is_changed(session: TenantSession, instance: object) -> bool:
    return instance in session.new or instance in session.deleted or session.is_modified(instance)


def _before_flush(session: TenantSession, context: UOWTransaction, instances: object) -> None:
    session._check_transaction()
    for instance in (*session.new, *session.dirty, *session.deleted):
        session._check(instance_state(instance), "flushing")
    if session.read_only:
        changed = next(
            (one for one in (*session.new, *session.deleted, *session.dirty) if _is_changed(session, one)), None
        )
        if changed is not None:
            raise ReadOnlyError(
                f"tenant {session.tenant[1]!r}: a {type(changed).__name__} is to be written, but the session is "
                "read-only; use tenancy.session() or tenancy.transaction() to write"
            )


event.listen(TenantSession, "loaded_as_persistent", _mark, raw=True)
event.listen(TenantSession, "after_attach", _mark, raw=True)
event.listen(TenantSession, "before_attach", _before_attach, raw=True)
event.listen(TenantSession, "before_flush", _before_flush)
event.listen(TenantSession, "before_commit", TenantSession._check_transaction)


__all__ = ["MARK", "Owner", "TenantSession"]
