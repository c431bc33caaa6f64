"""What tells in a log whom a record is about: the tenant, and the id of the request. Labels, and never authority."""

from __future__ import annotations

from contextlib import suppress
from contextvars import ContextVar, Token
from random import getrandbits
from typing import NamedTuple

from .context import current_tenant_or_none, reset_variable
from .tenant import Tenant

# of a UUID of version 4: the bits that are fixed, and those that are random
_FIXED = 0x4000 << 64 | 0x8000 << 48
_RANDOM = ~(0xF000 << 64 | 0xC000 << 48)


class RequestLabels:
    """The id of a request, and the tenant that it was bound to, once it was.

    The tenant stays here while the server's own code runs, which is bound to none: an access log can then name it.
    """

    __slots__ = ("request_id", "tenant")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.tenant: Tenant | None = None


class LogFields(NamedTuple):
    """The fields of a log record: a tenant's id and slug, and the id of a request; None where there is none."""

    tenant_id: str | None
    tenant: str | None
    request_id: str | None


_request: ContextVar[RequestLabels | None] = ContextVar("tenancy_orm.request", default=None)


def current_request_id() -> str | None:
    """Return the id of the request that this code runs for, or None.

    There is one where ``TenancyMiddleware`` was given ``request_id``. Send it along with requests to other services.
    """
    labels = _request.get()
    return None if labels is None else labels.request_id


def new_request_id() -> str:
    """Return a random UUID without hyphens. It is unique, but no secret."""
    return f"{getrandbits(128) & _RANDOM | _FIXED:032x}"


def current_labels() -> RequestLabels | None:
    """Return the labels of the request that this code runs for, or None."""
    return _request.get()


def set_labels(labels: RequestLabels | None) -> Token[RequestLabels | None]:
    """Set the labels for the rest of this context, whatever they were."""
    return _request.set(labels)


def reset_labels(token: Token[RequestLabels | None]) -> None:
    """Undo ``set_labels``; in another context, which never had them, do nothing."""
    reset_variable(_request, token)


def log_fields(error: object = None) -> LogFields:
    """Return the fields for a record that is written now: of the bound tenant, else of the request's.

    Args:
        error: The exception that the record is about. Where no request runs, the one that it ended is meant.
    """
    tenant = current_tenant_or_none()
    labels = _request.get()
    if labels is None and tenant is None:
        # not before: one exception may end several requests, as one that is kept and raised again does
        labels = getattr(error, _LABELS, None)
    if labels is None:
        return _NOTHING if tenant is None else LogFields(str(tenant.id), tenant.slug, None)
    tenant = tenant or labels.tenant
    if tenant is None:
        return LogFields(None, None, labels.request_id)
    return LogFields(str(tenant.id), tenant.slug, labels.request_id)


# attribute of an exception: the labels of the request that it ended, for the server's log, which is written later
_LABELS = "__tenancy_labels__"


def attach_labels(labels: RequestLabels, error: BaseException) -> None:
    """Leave the labels on an exception that leaves the application, in place of those of an earlier request."""
    with suppress(AttributeError, TypeError):  # of a class with __slots__
        setattr(error, _LABELS, labels)


_NOTHING = LogFields(None, None, None)

__all__ = [
    "LogFields",
    "RequestLabels",
    "attach_labels",
    "current_labels",
    "current_request_id",
    "log_fields",
    "new_request_id",
    "reset_labels",
    "set_labels",
]
