"""The rows that come along, counted and checked in the source's snapshot before one of them is copied."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import asyncpg

from ..errors import AdoptionError
from ..postgres.login import reason_of
from ..postgres.quoting import quote_identifier, quote_literal
from .mapping import RowsMapping
from .reach import OWNED, Reach, Reached, Way
from .relations import ForeignKey, Relation
from .rows_report import TableRows
from .source import OpenSource

# the texts of values must mean the same on both sides, whatever the databases say
PLAIN_TEXTS = (
    "SET LOCAL DateStyle = 'ISO, YMD'",
    "SET LOCAL IntervalStyle = 'postgres'",
    "SET LOCAL TimeZone = 'UTC'",
    "SET LOCAL bytea_output = 'hex'",
    "SET LOCAL extra_float_digits = 3",
    "SET LOCAL lc_monetary = 'C'",
)
_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Transferred:
    """A table that is copied: which columns of the target come from which expression."""

    reached: Reached
    target: Relation
    columns: tuple[tuple[str, str], ...]  # (expression of the source, column of the target)


def pair(reach: Reach, targets: Sequence[Relation]) -> tuple[list[Transferred], list[str], list[str]]:
    """Pair the source's tables with the target's.

    Returns:
        What is copied, what is in the way, and what is worth knowing.
    """
    places = {one.label: one for one in targets}
    pairs: list[Transferred] = []
    problems: list[str] = []
    notes: list[str] = []
    taken: dict[str, str] = {}
    for reached in reach:
        if not reached.comes_along:
            continue
        label = reached.relation.label
        name = reach.mapping.of(label).rename or label
        if (target := places.get(name)) is None:
            problems.append(f"table {label} has no table {name} in the tenant's database: rename it, or exclude it")
            continue
        if (other := taken.setdefault(name, label)) != label:
            problems.append(f"tables {other} and {label} both become {name}")
            continue
        pairs.append(Transferred(reached, target, _columns(reach.mapping, reached, target, problems, notes)))
    return pairs, problems, notes


def _columns(
    mapping: RowsMapping, reached: Reached, target: Relation, problems: list[str], notes: list[str]
) -> tuple[tuple[str, str], ...]:
    relation, said = reached.relation, mapping.of(reached.relation.label)
    places = {one.name: one for one in target.columns}
    found: dict[str, str] = {}
    for column in relation.columns:
        name = said.columns.get(column.name, column.name)
        if column.name in said.drop or (column.name in mapping.drop and column.name not in said.columns):
            continue
        if name in said.values or (name in places and places[name].generated):
            continue
        if name not in places:
            if column.name == mapping.column and reached.way is Way.COLUMN:
                notes.append(f"column {relation.label}.{name} is not copied: it is the same for every row")
            else:
                problems.append(f"column {relation.label}.{column.name} has no place in {target.label}: drop or rename")
        elif name in found:
            problems.append(f"two columns of {relation.label} become {target.label}.{name}")
        else:
            found[name] = quote_identifier(column.name)
    for name, value in said.values.items():
        if name not in places or places[name].generated:
            problems.append(f"column {name} of {target.label}, which gets a value, is not there or is generated")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        found[name] = f"{quote_literal(text)}::text"
    wanted = [one.name for one in target.columns if one.wanted and one.name not in found]
    problems += [f"column {target.label}.{name} gets no value from {relation.label}: name one" for name in wanted]
    return tuple((expression, name) for name, expression in found.items())


class Selection:
    """Counts and checks what comes along, in one snapshot of the source.

    Args:
        opened: The source.
        reach: How its tables are reached.
        pairs: What is copied.
        totals: The rows of whole tables, which customers of one snapshot share.
    """

    def __init__(
        self,
        opened: OpenSource,
        reach: Reach,
        pairs: Sequence[Transferred],
        totals: dict[int, tuple[int, int]] | None = None,
    ) -> None:
        self._opened = opened
        self._reach = reach
        self._pairs = {one.reached.relation.oid: one for one in pairs}
        self._totals = {} if totals is None else totals
        self.customer: str | None = None
        """The value of the customer's column; None until ``problems`` was called, and where no row has one."""

    async def check_conditions(self) -> None:
        """Refuse what is not one condition: text that closes a parenthesis, for example.

        Raises:
            AdoptionError: PostgreSQL does not take one.
        """
        for reached in self._reach:
            said = self._reach.mapping.of(reached.relation.label).where
            condition = said if reached.way is Way.WHERE else self._reach.mapping.where
            if reached.way not in (Way.WHERE, Way.COLUMN) or condition is None:
                continue
            rows = reached.relation.rows(self._reach.alias())
            for form in (f"(\n{condition}\n)", f"CASE WHEN\n{condition}\nTHEN true END"):
                try:
                    await self._opened.connection.prepare(f"SELECT 1 FROM {rows} WHERE {form}")  # noqa: S608 - checked
                except asyncpg.PostgresError as exc:
                    raise AdoptionError(
                        f"{condition!r} is not a condition for table {reached.relation.label}: {reason_of(exc)}"
                    ) from exc

    async def count(self) -> list[TableRows]:
        """Count the rows of every table.

        Raises:
            AdoptionError: one cannot be read.
        """
        return [await self._count(reached) for reached in self._reach]

    async def problems(self, counted: Sequence[TableRows]) -> list[str]:
        """Return what is in the way: lost tables, and rows that refer to what does not come along.

        Raises:
            AdoptionError: a table cannot be read.
        """
        found = [
            f"nothing reaches table {one.source} with {one.total} rows: share it, exclude it, or give it a where"
            for reached, one in zip(self._reach, counted, strict=True)
            if reached.way is Way.NONE and one.total
        ]
        found += await self._other_customers()
        for reached in self._reach:
            for key in reached.relation.keys:
                if text := await self._broken(reached, key):
                    found.append(text)
            found += await self._strays(reached)
        return found

    def query(self, pair: Transferred) -> str:
        """Return the query of the rows that come along."""
        alias = self._reach.alias()
        columns = ", ".join(expression for expression, _ in pair.columns)
        return f"SELECT {columns} FROM {self._rows(pair.reached, alias)}"  # noqa: S608 - quoted, or the operator's

    # --- counting ---------------------------------------------------------------------------------------------------

    def _rows(self, reached: Reached, alias: str) -> str:
        return f"{reached.relation.rows(alias)} WHERE {self._reach.belongs(reached, alias)}"

    async def _count(self, reached: Reached) -> TableRows:
        relation, reach = reached.relation, self._reach
        alias = reach.alias()
        if not relation.readable:  # it is excluded
            self._totals[relation.oid] = (0, 0)
        if relation.oid not in self._totals:
            of_nobody = f"count(*) FILTER (WHERE {reach.nobodys(reached, alias)})"
            counts = f"SELECT count(*), {of_nobody} FROM {relation.rows(alias)}"  # noqa: S608 - quoted
            row = await self._fetch(counts, relation)
            self._totals[relation.oid] = (row[0][0], row[0][1])
        total, nobodys = self._totals[relation.oid]
        rows = total if reached.way is Way.SHARED else 0
        if reached.way in OWNED:
            rows = (await self._fetch(f"SELECT count(*) FROM {self._rows(reached, alias)}", relation))[0][0]  # noqa: S608
        pair = self._pairs.get(relation.oid)
        return TableRows(
            source=relation.label,
            target=None if pair is None else pair.target.label,
            rows=rows,
            total=total,
            nobodys=nobodys,
            how=reached.how,
            shared=reached.way is Way.SHARED,
        )

    # --- checks -----------------------------------------------------------------------------------------------------

    async def _other_customers(self) -> list[str]:
        """All rows that come along have the same customer, or none where the operator says so."""
        values: dict[str, str] = {}
        found = []
        column = self._reach.mapping.column
        for reached in self._reach:
            relation = reached.relation
            name = reached.root_column if reached.way is Way.ROOT else column
            if reached.way not in OWNED or name is None or not relation.has(name):
                continue
            alias = self._reach.alias()
            value = f"{alias}.{quote_identifier(name)}::text"
            query = f"SELECT DISTINCT {value} FROM {self._rows(reached, alias)} LIMIT {_SAMPLES + 1}"  # noqa: S608
            for (one,) in await self._fetch(query, relation):
                if one is not None:
                    values.setdefault(one, relation.label)
                elif self._reach.mapping.of(relation.label).strays != "follow":
                    found.append(f"rows of {relation.label} would be copied that have no {column}")
        self.customer = next(iter(values), None)
        if len(values) > 1:
            listed = ", ".join(f"{value} (in {table})" for value, table in list(values.items())[: _SAMPLES + 1])
            found.insert(0, f"rows of more than one customer would be copied, by {column}: {listed}")
        return found + await self._shared_customers(values)

    async def _shared_customers(self, own: Container[str]) -> list[str]:
        """What is copied whole has no row of another customer, with or without a foreign key that would say so."""
        found = []
        for reached in self._reach:
            relation, name = reached.relation, self._reach.customers_column(reached)
            if reached.way is not Way.SHARED or name is None:
                continue
            alias = self._reach.alias()
            column = f"{alias}.{quote_identifier(name)}"
            query = f"SELECT DISTINCT {column}::text FROM {relation.rows(alias)} WHERE {column} IS NOT NULL LIMIT 2"  # noqa: S608
            if others := [one for (one,) in await self._fetch(query, relation) if one not in own]:
                found.append(
                    f"table {relation.label} is shared, and has rows of other customers ({name} = {others[0]}): it "
                    "would be copied whole; take it out of shared, or give it a where"
                )
        return found

    async def _broken(self, reached: Reached, key: ForeignKey) -> str | None:
        """Rows that come along, and refer to what does not."""
        pair = self._pairs.get(reached.relation.oid)
        target = self._reach.tables.get(key.target)
        copied = set() if pair is None else {expression for expression, _ in pair.columns}
        if pair is None or target is None or not {quote_identifier(one) for one in key.columns} <= copied:
            return None
        if target.way is Way.SHARED:
            return None
        alias = self._reach.alias()
        condition = f"{self._rows(reached, alias)} AND {key.is_set(alias)}"
        if target.way in OWNED:
            condition += f" AND NOT {self._reach.refers(key, alias)}"
            what = f"rows of {target.relation.label} that do not belong to this customer"
        else:
            what = f"table {target.relation.label}, which is not copied"
        said = await self._sample(reached.relation, alias, condition)
        return said and f"{said} belong to this customer, and refer by {', '.join(key.columns)} to {what}"

    async def _strays(self, reached: Reached) -> Iterator[str]:
        """Rows that do not come along, and refer to rows that do."""
        found: list[str] = []
        said = self._reach.mapping.of(reached.relation.label).strays
        for key in self._reach.stray_keys(reached) if said != "leave" else ():
            alias = self._reach.alias()
            # of others' rows, the row is wrong; of nobody's, it may be either
            outside = f"({self._reach.belongs(reached, alias)}) IS NOT TRUE AND {self._reach.refers(key, alias)}"
            text = await self._sample(reached.relation, alias, f"{reached.relation.rows(alias)} WHERE {outside}")
            if text:
                what, remedy = "are reached by no other way", 'give the table a where, or set strays = "leave"'
                if reached.way is Way.COLUMN:
                    choices = '"leave"' if said == "follow" else '"leave" or "follow"'
                    what, remedy = "do not belong to this customer", f"correct them, or set strays = {choices}"
                found.append(
                    f"{text} {what}, and refer by {', '.join(key.columns)} to its rows of "
                    f"{self._reach.tables[key.target].relation.label}: {remedy}"
                )
        return iter(found)

    async def _sample(self, relation: Relation, alias: str, rows: str) -> str | None:
        """The number of rows, with the keys of some, in words; None without any."""
        if not (count := (await self._fetch(f"SELECT count(*) FROM {rows}", relation))[0][0]):  # noqa: S608
            return None
        text = f"{count} row{'s' * (count != 1)} of {relation.label}"
        if not relation.primary_key:
            return text
        columns = " || ', ' || ".join(f"{alias}.{quote_identifier(name)}::text" for name in relation.primary_key)
        keys = await self._fetch(f"SELECT {columns} FROM {rows} ORDER BY 1 LIMIT {_SAMPLES}", relation)  # noqa: S608
        names = ", ".join(relation.primary_key)
        return f"{text} ({names} = {'; '.join(row[0] for row in keys)}{'; ...' if count > _SAMPLES else ''})"

    async def _fetch(self, query: str, relation: Relation) -> list[asyncpg.Record]:
        try:
            return list(await self._opened.connection.fetch(query))
        except asyncpg.PostgresError as exc:
            raise AdoptionError(f"table {relation.label} cannot be read: {reason_of(exc)}") from exc


__all__ = ["PLAIN_TEXTS", "Selection", "Transferred", "pair"]
