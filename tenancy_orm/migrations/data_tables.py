"""The key of a table that is migrated in batches, and the conditions of SQL for rows in its order.

The values of keys are tenants' data. So they are in settings of the transaction, and no statement has them in its text:
the text of a batch is the same for all batches, and a log of statements shows no key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection as SyncConnection
from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import Text

from ..errors import MigrationError
from ..postgres.quoting import quote_identifier
from .data_migrations import DataMigration

# A unique index on the key's columns, in their order, that sorts as ORDER BY does.
# ``schemas`` are those of the operators of that order: where a tenant may create operators, a name could find its.
_KEY = text("""
WITH candidates AS (
    SELECT i.indrelid, i.indisprimary, array_agg(a.attname::text ORDER BY k.position) AS columns,
           array_agg(pg_catalog.format_type(a.atttypid, a.atttypmod) ORDER BY k.position) AS types,
           bool_and(a.attnotnull) AS not_null,
           bool_and(o.opcdefault AND coalesce(i.indcollation[k.position - 1], 0) = a.attcollation) AS in_order,
           array_agg(DISTINCT pg_catalog.quote_ident(n.nspname)) AS schemas
    FROM pg_catalog.pg_index AS i
    CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k (number, position)
    JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.number
    JOIN pg_catalog.pg_opclass AS o ON o.oid = i.indclass[k.position - 1]
    JOIN pg_catalog.pg_amop AS p ON p.amopfamily = o.opcfamily AND p.amoplefttype = o.opcintype
      AND p.amoprighttype = o.opcintype AND p.amopstrategy = 5
    JOIN pg_catalog.pg_operator AS r ON r.oid = p.amopopr
    JOIN pg_catalog.pg_namespace AS n ON n.oid = r.oprnamespace
    WHERE i.indrelid = pg_catalog.to_regclass(:table) AND i.indisvalid AND i.indisunique AND i.indpred IS NULL
      AND i.indexprs IS NULL AND k.position <= i.indnkeyatts
    GROUP BY i.indexrelid, i.indrelid, i.indisprimary
)
SELECT x.columns, x.types, x.schemas FROM candidates AS x
WHERE x.not_null AND x.in_order AND CASE WHEN :key IS NULL THEN x.indisprimary ELSE x.columns = :key END
ORDER BY x.indisprimary DESC LIMIT 1
""").bindparams(bindparam("key", type_=ARRAY(Text)), bindparam("table", type_=Text))
_EXISTS = text("SELECT pg_catalog.to_regclass(:table) IS NOT NULL").bindparams(bindparam("table", type_=Text))

_SAMPLED_PAGES = 500
# no arithmetic: where a tenant may create operators, that could find its
_SIZE = text("""
SELECT COALESCE(
    (SELECT pg_catalog.sum(pg_catalog.pg_relation_size(relid)) FROM pg_catalog.pg_partition_tree(x.t)),
    pg_catalog.pg_relation_size(x.t)
)::pg_catalog.int8 AS bytes, pg_catalog.current_setting('block_size')::pg_catalog.int4 AS page
FROM (SELECT pg_catalog.to_regclass(:table)) AS x (t)
""").bindparams(bindparam("table", type_=Text))

_SET = text(
    "SELECT count(pg_catalog.set_config('tenancy.batch_' || CAST(:bound AS text) || n, v, true)) "
    "FROM unnest(CAST(:values AS text[])) WITH ORDINALITY AS x (v, n)"
).bindparams(bindparam("values", type_=ARRAY(Text)))


@dataclass(frozen=True, slots=True)
class BatchedTable:
    """A table: its quoted name, the columns of its key and their types.

    ``schema`` is the quoted one of the operators that compare the key; None where there are several.
    """

    quoted: str
    name: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    schema: str | None

    @classmethod
    def of(cls, connection: SyncConnection, migration: DataMigration) -> BatchedTable:
        """Read the key of a data migration's table.

        Raises:
            MigrationError: there is no such table, or it has no such key.
        """
        key = None if migration.key is None else list(migration.key)
        row = connection.execute(_KEY, {"table": migration.quoted, "key": key}).first()
        if row is not None:
            schema = row.schemas[0] if len(row.schemas) == 1 else None
            return cls(migration.quoted, migration.table, tuple(row.columns), tuple(row.types), schema)
        if not connection.scalar(_EXISTS, {"table": migration.quoted}):
            raise MigrationError(f"there is no table {migration.quoted}")
        if key is None:
            raise MigrationError(
                f"the table {migration.quoted} has no primary key: name the columns of a unique index on columns that "
                "are NOT NULL as key="
            )
        raise MigrationError(
            f"the table {migration.quoted} has no unique index on ({', '.join(key)}), in this order, with columns that "
            "are NOT NULL"
        )

    def columns_of(self, alias: str, suffix: str = "") -> str:
        """The key's columns, quoted, with a table's name and what follows each."""
        return ", ".join(f"{alias}.{quote_identifier(column)}{suffix}" for column in self.columns)

    def compare(self, operator: str, bound: str, alias: str | None = None) -> str:
        """A condition that compares the key with the values that ``set_bound`` has set."""
        columns = self.columns_of(alias or quote_identifier(self.name))
        values = ", ".join(
            f"CAST(pg_catalog.current_setting('tenancy.batch_{bound}{number}') AS {kind})"
            for number, kind in enumerate(self.types, start=1)
        )
        compared = operator if self.schema is None else f"OPERATOR({self.schema}.{operator})"
        return f"({columns}) {compared} ({values})" if len(self.columns) > 1 else f"{columns} {compared} {values}"

    def rows(self, *, has_after: bool, where: str | None, alias: str | None = None) -> str:
        """The condition for the rows of a batch, or of what is left of a pass."""
        found = [self.compare("<=", "upto", alias)]
        if has_after:
            found.insert(0, self.compare(">", "after", alias))
        if where is not None:
            found.append(f"({where})")
        return f"({' AND '.join(found)})"

    def estimate(self, connection: SyncConnection) -> int:
        """Return about how many rows the table has now; exactly, where it is small.

        It counts those of some pages: of a table that was just filled there are no statistics, and from the types of
        its columns the planner guesses too few.
        """
        size = connection.execute(_SIZE, {"table": self.quoted}).one()
        share = min(100.0, 100.0 * _SAMPLED_PAGES * size.page / size.bytes) if size.bytes else 100.0
        query = f"SELECT count(*) FROM {self.quoted} TABLESAMPLE SYSTEM ({share!r})"  # noqa: S608 - quoted, a number
        return round(int(connection.exec_driver_sql(query).scalar_one()) * 100.0 / share)

    def last_key(self, connection: SyncConnection) -> tuple[str, ...] | None:
        """Return the key of the last row; None if there is no row."""
        alias = quote_identifier(self.name)
        order = self.columns_of(alias, " DESC")
        query = f"SELECT ARRAY[{self.columns_of(alias, '::text')}] FROM {self.quoted} ORDER BY {order} LIMIT 1"  # noqa: S608
        found = connection.exec_driver_sql(query).scalar()
        return None if found is None else tuple(found)

    def next_keys(
        self, connection: SyncConnection, *, has_after: bool, size: int
    ) -> tuple[int, tuple[str, ...] | None]:
        """Return how many rows the next batch has, ``size`` at most, and the key of the last one.

        It looks after ``after``, if that is set, and up to ``until``.
        """
        alias = quote_identifier(self.name)
        found = [self.compare("<=", "until"), *([self.compare(">", "after")] if has_after else [])]
        names = [f"k{number}" for number in range(1, len(self.columns) + 1)]
        order = self.columns_of(alias)
        query = (
            f"WITH keys ({', '.join(names)}) AS MATERIALIZED (SELECT {order} FROM {self.quoted} "  # noqa: S608 - quoted
            f"WHERE {' AND '.join(found)} ORDER BY {order} LIMIT {int(size)}) "
            f"SELECT (SELECT count(*) FROM keys), ARRAY[{', '.join(f'{name}::text' for name in names)}] "
            f"FROM keys ORDER BY {', '.join(f'{name} DESC' for name in names)} LIMIT 1"
        )
        row = connection.exec_driver_sql(query).first()
        return (0, None) if row is None else (row[0], tuple(row[1]))

    def count(self, connection: SyncConnection, rows: str) -> int:
        """Return how many rows fulfil a condition."""
        return int(connection.exec_driver_sql(f"SELECT count(*) FROM {self.quoted} WHERE {rows}").scalar_one())  # noqa: S608


def set_bound(connection: SyncConnection, bound: str, values: Sequence[str] | None) -> None:
    """Set the values of a bound (``after``, ``upto``, ``until``) for the conditions of this transaction."""
    if values is not None:
        connection.execute(_SET, {"bound": bound, "values": list(values)})


__all__ = ["BatchedTable", "set_bound"]
