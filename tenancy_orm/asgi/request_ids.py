"""The id of each request: taken from ``X-Request-ID``, or made here, and sent back."""

from __future__ import annotations

import re
from typing import Literal

from starlette.types import Scope

from ..correlation import RequestLabels, new_request_id
from ..errors import ConfigurationError

HEADER = b"x-request-id"

# no space, quote, brace, separator or line end: nothing that could forge a field or a line of a log
_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,127}")


class RequestIds:
    """Decides a request's id.

    Args:
        mode: True to take the one that was sent, where it is well formed; "new" to make one for each request.

    Raises:
        ConfigurationError: it is neither.
    """

    def __init__(self, mode: Literal[True, "new"]) -> None:
        if mode is not True and mode != "new":
            raise ConfigurationError(f'request_id is True, "new" or False, not {mode!r}')
        self._accept = mode is True

    def labels_of(self, scope: Scope) -> RequestLabels:
        """Return new labels for a request, with its id."""
        if self._accept:
            sent = None
            for name, value in scope["headers"]:
                if name == HEADER:
                    if sent is not None:
                        break  # two of them: whoever added the first did not remove a client's
                    sent = value
            else:
                if sent is not None and _ID.fullmatch(sent):
                    return RequestLabels(sent.decode())
        return RequestLabels(new_request_id())


__all__ = ["HEADER", "RequestIds"]
