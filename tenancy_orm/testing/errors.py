"""What tests are told by the pytest plugin: what mode rollback cannot do, and what they have left behind."""

from __future__ import annotations

from typing import Any

from ..errors import TenancyError

REMEDY = 'mark the test with @pytest.mark.tenancy(mode="clone"), which gives it a database of its own'


class RollbackModeError(TenancyError):
    """A test does what one transaction cannot do.

    Remedy: ``@pytest.mark.tenancy(mode="clone")``.
    """

    def __init__(self, what: str) -> None:
        """Say ``what`` it cannot do."""
        super().__init__(f"{what}: in mode rollback all sessions of a tenant are on one connection; {REMEDY}")
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the argument."""
        return type(self), (self.what,)


class LeftoverWarning(UserWarning):
    """A test has left something behind that others could meet. It was removed."""


__all__ = ["LeftoverWarning", "RollbackModeError"]
