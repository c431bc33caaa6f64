"""The standard library's logging: the tenant and the request in every record."""

from __future__ import annotations

import logging

from ..correlation import log_fields


class TenantLogFilter(logging.Filter):
    """Adds ``tenant_id``, ``tenant`` (the slug) and ``request_id`` to every record, and lets all records pass.

    Put it on handlers, not on loggers. A logger's filter sees what is logged by that very logger alone, and nothing of
    its children; a handler's sees all that the handler writes, whichever library logged it. In front of a queue, put it
    on the ``QueueHandler``: what writes the queue runs in another thread, for no tenant.

    A record that has one of these attributes already keeps it: from another such filter, or from ``extra=``.

    Args:
        missing: The value where there is no tenant, or no request. With a text a format string cannot fail.
    """

    def __init__(self, missing: str | None = "") -> None:
        super().__init__()
        self.missing = missing

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes; returns True."""
        attributes = record.__dict__
        # a server logs what an application has raised when the request is over
        fields = log_fields(record.exc_info[1] if record.exc_info else None)
        for name, value in zip(fields._fields, fields, strict=True):
            if name not in attributes:
                attributes[name] = self.missing if value is None else value
        return True


__all__ = ["TenantLogFilter"]
