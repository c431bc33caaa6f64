"""``SamePolicy``: what was copied to another server is what the tenant's database has, with the same owners."""

from __future__ import annotations

from collections.abc import Iterator

from ..drift import catalogue
from ..drift.catalogue import Catalogue
from ..drift.compare import Difference, compare
from ..drift.mending import TENANT_ROLE
from ..errors import OperationError
from ..postgres.connections import Connection
from ..postgres.quoting import quote_identifier
from ..provisioning.rights import event_trigger

_RIGHTS = frozenset({"privilege", "default privileges"})
# what the stream of a move, or the server's administration, adds
_OWN = frozenset({"publication", "subscription", "event trigger"})
_SHOWN = 5

# 'o' is SHARED_DEPENDENCY_OWNER
_OWNED = """
SELECT pg_describe_object(s.classid, s.objid, 0) AS what FROM pg_shdepend s
  JOIN pg_roles r ON r.oid = s.refobjid CROSS JOIN LATERAL pg_identify_object(s.classid, s.objid, 0) i
 WHERE s.refclassid = 'pg_authid'::regclass AND s.deptype = 'o' AND r.rolname = $1
   AND s.classid <> 'pg_largeobject'::regclass AND i.identity IS NOT NULL
   AND coalesce(i.schema, '') !~ '^pg_temp'  -- those of open sessions end with them
   AND s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY 1 LIMIT 6
"""


class SamePolicy:
    """Compares a copy with its source, in which everything belongs to the owner already: nothing gains rights.

    Args:
        source: The catalogue of the source.
        owner: The owner of tenants' databases.
        tenant: The tenant's slug, for errors.
    """

    def __init__(self, source: Catalogue, *, owner: str, tenant: str) -> None:
        self._source = source
        self._owner = owner
        self._tenant = tenant

    async def check(self, connection: Connection, *, login: str, role: str, server: str = "") -> None:
        """Refuse a copy that is not what the source is.

        Raises:
            OperationError: it is not.
        """
        found = await catalogue.read(connection, owner=login, role=role)
        if differences := list(schema_differences(self._source, found)):
            raise OperationError(
                f"the copy of tenant {self._tenant!r} differs from its database: "
                + "; ".join(one.text for one in differences[:_SHOWN])
            )

    async def give_back(self, connection: Connection, *, role: str) -> None:
        """Do nothing: the role owns nothing in the source, see ``refuse_own_objects``."""

    async def align(self, connection: Connection, *, role: str) -> None:
        """Give everybody the rights on objects that they have in the source."""
        found = await catalogue.read(connection, owner=self._owner, role=role)
        statements = [
            statement.replace(TENANT_ROLE, quote_identifier(role))
            for one in compare(self._source, found)
            if one.kind in _RIGHTS
            for statement in one.statements
        ]
        if statements:
            await connection.execute("; ".join(statements))


def schema_differences(source: Catalogue, found: Catalogue) -> Iterator[Difference]:
    """What of a schema differs, without rights and without what a move adds."""
    for one in compare(source, found):
        if one.kind in _RIGHTS or one.kind in _OWN or one.name.startswith(event_trigger.NAME):
            continue
        # tables without a primary key have another one for the time of a move
        if one.field != "replica identity":
            yield one


async def refuse_own_objects(connection: Connection, role: str, *, tenant: str) -> None:
    """Refuse a database in which the tenant's role owns something: in a copy it would become the owner's.

    Raises:
        OperationError: it does.
    """
    if found := [row["what"] for row in await connection.fetch(_OWNED, role)]:
        raise OperationError(
            f"tenant {tenant!r} cannot be moved: its role owns {', '.join(found[:_SHOWN])}; give that to the owner by "
            "ALTER ... OWNER TO, or drop it"
        )


__all__ = ["SamePolicy", "refuse_own_objects", "schema_differences"]
