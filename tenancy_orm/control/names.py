"""Names of databases and roles: opaque, at most 63 bytes, and never derived from what a person typed."""

from __future__ import annotations

import re
from uuid import UUID

_ANY_INSTALLATION = re.compile(
    r".+_[0-9a-f]{8}_(t_[0-9a-f]{32}(_[a-z2-7]{6})?|[rx]_[0-9a-f]{1,16}|v_[0-9]{1,19}[fr]|owner|viewer)", re.DOTALL
)
_SCRATCH = re.compile(r".+_[0-9a-f]{8}_x_[0-9a-f]{1,16}", re.DOTALL)


def is_installations(role: str) -> bool:
    """Whether a role is named as an installation names its own, whichever its prefix; others are an operator's."""
    return _ANY_INSTALLATION.fullmatch(role) is not None


def is_scratch(role: str) -> bool:
    """Whether a role is named as the short-lived one that copies a database, or that a copy is restored by."""
    return _SCRATCH.fullmatch(role) is not None


def login_stem(role: str) -> str:
    """The prefix of the names of the temporary logins for a tenant's role."""
    return f"{role}_"


class Names:
    """The names that one installation uses on its servers.

    They contain eight hexadecimal digits of the installation's id, so that two control databases can share a server and
    neither takes the other's databases for its own orphans.
    """

    def __init__(self, prefix: str, installation: UUID) -> None:
        self.installation = installation
        self.prefix = prefix
        self.stem = f"{prefix}_{installation.hex[-8:]}"
        self._tenant = re.compile(re.escape(self.stem) + r"_t_([0-9a-f]{32})")
        self._tenants_login = re.compile(self._tenant.pattern + r"(?:_[a-z2-7]{6})?")

    @property
    def owner(self) -> str:
        """The NOLOGIN role that owns every tenant database, every template, and their tables."""
        return f"{self.stem}_owner"

    @property
    def viewer(self) -> str:
        """The NOLOGIN role that reads the control database for one tenant."""
        return f"{self.stem}_viewer"

    @property
    def tenant_stem(self) -> str:
        """The prefix of the names of all tenants' databases and roles."""
        return f"{self.stem}_t_"

    def tenant(self, number: UUID) -> str:
        """The name of a tenant's database, and of its login role.

        Args:
            number: The tenant's id; of a warm database, which is made before its tenant, a number of its own.
        """
        return f"{self.tenant_stem}{number.hex}"

    def login(self, role: str, token: str) -> str:
        """The name of a temporary login for a tenant's role; ``token`` is six characters of a-z and 2-7."""
        return f"{login_stem(role)}{token}"

    def template(self, fingerprint: str) -> str:
        """The name of the template for the schema with this fingerprint (hexadecimal digits)."""
        return f"{self.stem}_m_{fingerprint[:12]}"

    def scratch(self, token: str) -> str:
        """The name of a short-lived database, or of a role for one; ``token`` is hexadecimal digits."""
        return f"{self.stem}_x_{token[:16]}"

    def retired(self, token: str) -> str:
        """The name of a purged tenant's role that cannot be dropped yet; ``token`` is hexadecimal digits."""
        return f"{self.stem}_r_{token[:16]}"

    def replicator(self, operation: int, direction: str) -> str:
        """The name of the login that replicates a tenant's database while it is moved.

        Args:
            operation: The number of the operation.
            direction: "f" for forward, "r" for back.
        """
        return f"{self.replicator_stem}{operation}{direction}"

    @property
    def replicator_stem(self) -> str:
        """The prefix of the names of those logins."""
        return f"{self.stem}_v_"

    def stream(self, operation: int, direction: str) -> str:
        """The name of such a replication: of its slot, its publication and its subscription."""
        return f"{self.stream_stem}{operation}{direction}"

    @property
    def stream_stem(self) -> str:
        """The prefix of those names. Those of slots have no capital letters."""
        return f"tenancy_{self.installation.hex[-8:]}_"

    def parse(self, name: str) -> UUID | None:
        """The number in the name of one of this installation's tenants' databases or roles, or None.

        It is the id of the tenant, unless the database comes from the warm pool: the registry knows its tenant.
        """
        match = self._tenant.fullmatch(name)
        return UUID(hex=match[1]) if match else None

    def role_of(self, role: str) -> str | None:
        """The tenant's role that a role is, or is a temporary login for. None for other roles."""
        match = self._tenants_login.fullmatch(role)
        return self.tenant(UUID(hex=match[1])) if match else None
