"""The gate of a task queue: what a task must pass when it is sent and when it arrives."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from ..context import bind, current_tenant_or_none
from ..correlation import RequestLabels, current_request_id, reset_labels, set_labels
from ..errors import (
    ConfigurationError,
    ControlUnavailableError,
    CrossTenantError,
    NoTenantError,
    TaskRefusedError,
    TenancyError,
    TenantNotFoundError,
    TenantUnavailableError,
)
from ..events import TaskRefused
from ..registry.lifecycle import check_usable
from ..tenancy import Tenancy
from ..tenant import Tenant
from .arguments import check_arguments
from .envelope import Envelope, clean_request_id, now, parse_header, signed_parts
from .needs import needs_of
from .policy import ArrivalPolicy, Outcome, Reason

logger = logging.getLogger("tenancy_orm.tasks")


@dataclass(frozen=True, slots=True)
class Message:
    """Which message it is.

    Attributes:
        task: The task's name.
        id: What tells it from another message of that task: its id, or a digest of its arguments.
        arguments: What the task is called with.
        function: The task's function, for what it says of itself; None where it is not known here.
    """

    task: str
    id: str
    arguments: object
    function: object = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """A task that may run: for ``tenant``, or for none where that is None."""

    tenant: Tenant | None
    request_id: str | None = None

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Run the body with the tenant bound, and the id of the request that sent the task.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        labels = None if self.request_id is None else RequestLabels(self.request_id)
        if labels is not None:
            labels.tenant = self.tenant
        token = set_labels(labels)
        try:
            if self.tenant is None:
                yield
            else:
                with bind(self.tenant):
                    yield
        finally:
            reset_labels(token)


class TaskGate:
    """Writes the header of what is sent, and checks what arrives.

    Args:
        tenancy: The application's; it must be open where a task is sent for a tenant, and where one arrives.
        queue: The name of the task queue, for the events and the signature.
        policy: What is done with a task for a tenant that cannot be used.
    """

    def __init__(self, tenancy: Tenancy, *, queue: str, policy: ArrivalPolicy | None = None) -> None:
        if not isinstance(tenancy, Tenancy):
            raise ConfigurationError(f"pass the application's Tenancy, not {type(tenancy).__name__}")
        self.tenancy = tenancy
        self.queue = queue
        self.policy = policy or ArrivalPolicy()
        self._opened = False
        self._openings = 0

    # --- the process ------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the ``Tenancy``, unless the application has; for the start of a worker."""
        self._openings += 1
        if not self.tenancy.is_open:
            self._opened = True
            await self.tenancy.open()

    async def close(self) -> None:
        """Close the ``Tenancy``, if ``open`` has opened it and no other worker of the process needs it."""
        self._openings -= 1
        if self._opened and self._openings <= 0:
            self._opened = False
            await self.tenancy.close()

    # --- sending ----------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> str | None:
        """Return the header of a message that is about to be sent: None where no tenant is bound.

        The tenant's id travels, and the request's. The admission of the request does not: a task runs although the key
        that sent it was revoked since, and what is checked on arrival is the tenant alone.

        Raises:
            NoTenantError: no tenant is bound, and the task needs one.
            CrossTenantError: an argument is another tenant's; or a tenant is bound, and the task is an operator's.
            AdmissionEndedError, TenantUnavailableError: the admission of the request that sends it has ended.
            NotOpenError: the ``Tenancy`` is not open.
        """
        tenant = current_tenant_or_none()
        needs = needs_of(message.function)
        if tenant is None:
            if needs == "tenant":
                raise NoTenantError
            return None
        if needs == "none":
            raise CrossTenantError(f"sending the operator's task {message.task!r}", bound=tenant.slug, requested=None)
        try:
            check_arguments(message.arguments, tenant, "sending")
        except CrossTenantError:
            self._report(message, Reason.CROSS_TENANT, Outcome.REJECT, tenant, sending=True)
            raise
        request_id = clean_request_id(current_request_id())
        return str(self._sign(tenant.id, self._which(message), now(), request_id))

    def _sign(self, tenant_id: UUID, which: Sequence[str], sent_at: float, request_id: str | None) -> Envelope:
        signer = self.tenancy.internals.task_signer
        signature = signer.sign(tenant_id, signed_parts(which, sent_at, request_id))
        return Envelope(tenant_id, sent_at, request_id, signature)

    def _which(self, message: Message) -> tuple[str, str, str]:
        return (self.queue, message.task, message.id)

    async def forward(self, header: str, received: Message, sent: Message) -> str:
        """Return the header of a message that takes the place of another, a scheduled one say.

        Raises:
            TaskRefusedError: the header is not that of ``received``.
        """
        envelope = parse_header(header)
        if envelope is None or not await self._is_genuine(envelope, received):
            raise self._refused(received, Reason.FORGED, Outcome.REJECT, None)
        return str(self._sign(envelope.tenant_id, self._which(sent), now(), envelope.request_id))

    # --- arriving ---------------------------------------------------------------------------------------------------

    async def arrive(self, header: object, message: Message) -> Arrival:
        """Check a message that has arrived, and return for whom it runs.

        Args:
            header: The header; None where the message has none.
            message: Which one it is.

        Raises:
            TaskRefusedError: it must not run; ``outcome`` says what to do with it.
        """
        bound = current_tenant_or_none()
        needs = needs_of(message.function)
        if header is None:
            if bound is not None:
                # a queue that runs tasks in the process that sends them
                raise self._refused(message, Reason.TENANT_BOUND, Outcome.REJECT, bound)
            if needs == "tenant":
                raise self._refused(message, Reason.NO_TENANT, Outcome.REJECT, None)
            return Arrival(None)
        envelope = parse_header(header)
        if envelope is None or not await self._is_genuine(envelope, message):
            raise self._refused(message, Reason.FORGED, Outcome.REJECT, None)
        if needs == "none":
            raise self._refused(message, Reason.TENANT_BOUND, Outcome.REJECT, None, tenant_id=envelope.tenant_id)
        tenant = await self._find(envelope, message)
        try:
            check_arguments(message.arguments, tenant, "running a task with")
        except CrossTenantError as exc:
            raise self._refused(message, Reason.CROSS_TENANT, Outcome.REJECT, tenant) from exc
        return Arrival(tenant, envelope.request_id)

    async def _is_genuine(self, envelope: Envelope, message: Message) -> bool:
        signer = self.tenancy.internals.task_signer
        try:
            return await signer.verify(envelope.tenant_id, envelope.parts(self._which(message)), envelope.signature)
        except CrossTenantError as exc:
            raise self._refused(message, Reason.CROSS_TENANT, Outcome.REJECT, current_tenant_or_none()) from exc

    async def _find(self, envelope: Envelope, message: Message) -> Tenant:
        tenant: Tenant | None = None
        error: TenancyError
        try:
            tenant = await self.tenancy.internals.directory.tenant(envelope.tenant_id)
            check_usable(tenant)
        except TenantNotFoundError as exc:
            reason, error = Reason.PURGED, exc
        except TenantUnavailableError as exc:
            # its class has the status; the look-up raises one too, of a tenant with an upgrade that takes long
            reason, error = Reason(exc.status), exc
        except ControlUnavailableError as exc:
            reason, error = Reason.UNAVAILABLE, exc
        else:
            return tenant
        outcome = self.policy.outcome(reason, age_seconds=now() - envelope.sent_at)
        raise self._refused(message, reason, outcome, tenant, tenant_id=envelope.tenant_id) from error

    # --- reports ----------------------------------------------------------------------------------------------------

    def _refused(
        self,
        message: Message,
        reason: Reason,
        outcome: Outcome,
        tenant: Tenant | None,
        *,
        tenant_id: UUID | None = None,
    ) -> TaskRefusedError:
        self._report(message, reason, outcome, tenant, tenant_id)
        return TaskRefusedError(
            message.task,
            reason=reason.value,
            outcome=outcome.value,
            tenant=None if tenant is None else tenant.slug,
            retry_seconds=self.policy.retry_seconds if outcome is Outcome.RETRY else None,
        )

    def _report(
        self,
        message: Message,
        reason: Reason,
        outcome: Outcome,
        tenant: Tenant | None,
        tenant_id: UUID | None = None,
        *,
        sending: bool = False,
    ) -> None:
        tenant_id = tenant_id if tenant is None else tenant.id
        slug = None if tenant is None else tenant.slug
        level = logging.INFO if outcome is Outcome.RETRY else logging.WARNING
        logger.log(
            level,
            "task %r (%s) of tenant %s %s: %s; outcome: %s",
            message.task,
            self.queue,
            repr(slug) if slug else tenant_id,
            "is not sent" if sending else "does not run",
            reason.value,
            outcome.value,
        )
        self.tenancy.events.emit(
            TaskRefused(
                queue=self.queue,
                task=message.task,
                reason=reason.value,
                outcome=outcome.value,
                tenant_id=tenant_id,
                slug=slug,
            )
        )


__all__ = ["Arrival", "Message", "TaskGate"]
