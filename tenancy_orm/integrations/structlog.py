"""structlog: the tenant and the request in every event (extra ``structlog``).

```python
structlog.configure(processors=[add_tenant, structlog.processors.JSONRenderer()])
```
"""

from __future__ import annotations

from ..correlation import log_fields
from ..errors import MissingExtraError

try:
    from structlog.typing import EventDict, WrappedLogger
except ImportError as exc:
    raise MissingExtraError("structlog", "structlog") from exc


def add_tenant(logger: WrappedLogger, method_name: str, event_dict: EventDict) -> EventDict:
    """Add ``tenant_id``, ``tenant`` (the slug) and ``request_id``, as far as there are any: a processor.

    An event that has one of these keys already keeps it. For records of the standard library that structlog formats,
    put it in the ``foreign_pre_chain`` of ``ProcessorFormatter`` as well.
    """
    error = event_dict.get("exc_info")
    # a server logs what an application has raised when the request is over
    fields = log_fields(error[1] if isinstance(error, tuple) and len(error) == 3 else error)
    for name, value in zip(fields._fields, fields, strict=True):
        if value is not None:
            event_dict.setdefault(name, value)
    return event_dict


__all__ = ["add_tenant"]
