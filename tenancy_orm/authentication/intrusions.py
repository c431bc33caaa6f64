"""Intrusions: a credential that names several tenants that it does not allow is probing for them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ..control.lookup import NAME_LENGTH
from ..events import CrossTenantRequest, EventBus, IntrusionSuspected
from .cache import put_bounded
from .credential import Credential
from .journal import KeyJournal

logger = logging.getLogger("tenancy_orm.directory")

_REPORTED_COUNTS = frozenset({3, 6, 12, 24, 48, 96})  # numbers of other tenants, named by one credential, to report
_WINDOW_SECONDS = 3_600.0
_MAX_CREDENTIALS = 1_000
_MAX_NAMES = 100


class Intrusions:
    """Reports requests that named a tenant that their credential does not allow, and credentials that named several.

    Args:
        events: Where both are reported.
        journal: Where each request is recorded.
        clock: Seconds, monotonic.
    """

    def __init__(self, events: EventBus, journal: KeyJournal, *, clock: Callable[[], float]) -> None:
        self._events = events
        self._journal = journal
        self._clock = clock
        self._named: OrderedDict[tuple[str, str], dict[str, float]] = OrderedDict()

    def report(self, credential: Credential, named: str, resolver: str, source: str | None) -> None:
        """Report one request; see ``Directory.report_cross_tenant``."""
        named, tenant = named[:NAME_LENGTH], credential.bound
        about: dict[str, Any] = {
            "tenant_id": tenant and tenant.id,
            "slug": tenant and tenant.slug,
            "kind": credential.kind,
            "subject": credential.subject,
            "credential_id": credential.public_id,
            "source": source,
        }
        self._events.emit(CrossTenantRequest(named=named, resolver=resolver, **about))
        self._journal.record_cross_tenant(credential, named, resolver, source)
        now = self._clock()
        # a person with many sessions is one subject
        who = (credential.kind, credential.subject)
        seen = self._named.pop(who, {})
        recent = {name: at for name, at in seen.items() if now - at < _WINDOW_SECONDS}
        before = len(recent)
        if before < _MAX_NAMES:
            recent[named] = now
        put_bounded(self._named, who, recent, _MAX_CREDENTIALS)
        if len(recent) > before and len(recent) in _REPORTED_COUNTS:
            logger.error("%s %s of tenant %s named %d other tenants", *who, tenant.slug if tenant else "-", len(recent))
            self._events.emit(IntrusionSuspected(named=tuple(recent), **about))
