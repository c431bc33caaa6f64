"""Which rows of a shared database belong to one customer, as conditions in SQL.

A row belongs if the root condition holds for it, where its table has the customer's column. In other tables it belongs
if a row that it refers to belongs. Tables are reached in rounds: a foreign key counts if it leads to a table of an
earlier round, or to the table itself. The others are checked and never followed, so that a circle has an end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ..errors import AdoptionError
from ..postgres.quoting import quote_identifier
from .mapping import RowsMapping
from .relations import ForeignKey, Relation


class Way(Enum):
    """How the rows of a table are reached."""

    COLUMN = "column"
    ROOT = "root"
    WHERE = "where"
    KEYS = "keys"
    SHARED = "shared"
    EXCLUDED = "excluded"
    NONE = "none"


OWNED = frozenset({Way.COLUMN, Way.ROOT, Way.WHERE, Way.KEYS})
"""The ways of tables with rows of this customer alone."""


@dataclass(frozen=True, slots=True)
class Reached:
    """A table, how its rows are reached, and the foreign keys that are followed."""

    relation: Relation
    way: Way
    how: str
    keys: tuple[ForeignKey, ...] = ()
    root_column: str | None = None

    @property
    def comes_along(self) -> bool:
        """Whether it is copied."""
        return self.way in OWNED or self.way is Way.SHARED


@dataclass(slots=True)
class Reach:
    """How all tables of a source are reached.

    Args:
        relations: The source's tables.
        mapping: What the operator says.

    Raises:
        AdoptionError: the mapping names tables or columns that are not there, or no table has the column.
    """

    relations: Sequence[Relation]
    mapping: RowsMapping
    tables: dict[int, Reached] = field(init=False, default_factory=dict)
    _aliases: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._check_names()
        for relation in self.relations:
            if (found := self._direct(relation)) is not None:
                self.tables[relation.oid] = found
        self._find_roots()
        while found_now := list(self._round()):
            self.tables.update((one.relation.oid, one) for one in found_now)
        for relation in self.relations:
            self.tables.setdefault(relation.oid, Reached(relation, Way.NONE, "nothing reaches it"))
        if not any(one.way in OWNED for one in self.tables.values()):
            raise AdoptionError(f"no table has a column {self.mapping.column!r}: there is nothing to adopt")

    def __iter__(self) -> Iterator[Reached]:
        """The tables, by name."""
        return iter(self.tables[one.oid] for one in self.relations)

    def _check_names(self) -> None:
        known = {one.label: one for one in self.relations}
        if unknown := sorted(self.mapping.named - known.keys()):
            raise AdoptionError(f"the mapping names table {unknown[0]!r}, which the source does not have")
        for name, said in self.mapping.tables.items():
            columns = {one.name for one in known[name].columns}
            if missing := sorted({*said.via, *said.drop, *said.columns} - columns):
                raise AdoptionError(f"the mapping names column {missing[0]!r} of table {name!r}, which is not there")
            references = {column for key in known[name].keys for column in key.columns}
            if missing := sorted(set(said.via) - references):
                raise AdoptionError(f"column {missing[0]!r} of table {name!r} is not a foreign key: via must name one")

    def _direct(self, relation: Relation) -> Reached | None:
        mapping, said = self.mapping, self.mapping.of(relation.label)
        if relation.label in mapping.exclude:
            return Reached(relation, Way.EXCLUDED, "excluded")
        if relation.label in mapping.shared:
            return Reached(relation, Way.SHARED, "shared: copied whole")
        if said.where is not None:
            return Reached(relation, Way.WHERE, f"where {said.where}")
        if relation.has(mapping.column) and not said.via:
            return Reached(relation, Way.COLUMN, f"where {mapping.where}")
        return None

    def _find_roots(self) -> None:
        """The table that the customer's column refers to has the customer itself."""
        known = {one.oid: one for one in self.relations}
        for reached in list(self.tables.values()):
            for key in reached.relation.keys if reached.way is Way.COLUMN else ():
                if key.columns != (self.mapping.column,) or key.target in self.tables or key.target not in known:
                    continue
                column = key.target_columns[0]
                how = f"its {column} is {self.mapping.column} of other tables"
                self.tables[key.target] = Reached(known[key.target], Way.ROOT, how, root_column=column)

    def customers_column(self, reached: Reached) -> str | None:
        """The column of a table that says the customer: of this name, or what that column of other tables refers to."""
        relation, column = reached.relation, self.mapping.column
        if relation.has(column):
            return column
        keys = (key for other in self.relations for key in other.keys if key.target == relation.oid)
        return next((key.target_columns[0] for key in keys if key.columns == (column,)), None)

    def _round(self) -> Iterator[Reached]:
        for relation in self.relations:
            if relation.oid in self.tables:
                continue
            via = self.mapping.of(relation.label).via
            usable = [key for key in relation.keys if not via or set(key.columns) <= set(via)]
            followed = [key for key in usable if self._is_owned(key.target)]
            if followed:
                itself = [key for key in usable if key.target == relation.oid]
                how = ", ".join(self._words(key) for key in (*followed, *itself))
                yield Reached(relation, Way.KEYS, how, (*followed, *itself))

    def _is_owned(self, oid: int) -> bool:
        return oid in self.tables and self.tables[oid].way in OWNED

    def _words(self, key: ForeignKey) -> str:
        name = next(one.label for one in self.relations if one.oid == key.target)
        return f"{', '.join(key.columns)} -> {name}"

    # --- conditions -------------------------------------------------------------------------------------------------

    def alias(self) -> str:
        """Return a new alias, which no name in the operator's SQL is."""
        self._aliases += 1
        return f"tenancy_{self._aliases}"

    def belongs(self, reached: Reached, alias: str) -> str:
        """The condition that a row of ``alias`` comes along."""
        match reached.way:
            case Way.SHARED:
                return "true"
            case Way.WHERE:
                return _said(self.mapping.of(reached.relation.label).where or "false")
            case Way.COLUMN:
                return self._by_column(reached, alias)
            case Way.ROOT:
                return self.root(reached, alias)
            case Way.KEYS:
                return self._by_keys(reached, alias)
        return "false"

    def root(self, reached: Reached, alias: str) -> str:
        """The root condition for a row of ``alias``."""
        if reached.root_column is None:
            return _said(self.mapping.where)
        column, inner = f"{alias}.{quote_identifier(reached.root_column)}", self.alias()
        # the condition's column means the other one here
        renamed = f"SELECT {column} AS {quote_identifier(self.mapping.column)}"
        return f"(SELECT {_said(self.mapping.where)} FROM ({renamed}) AS {inner})"  # noqa: S608 - quoted, or the operator's

    def nobodys(self, reached: Reached, alias: str) -> str:
        """The condition that a row of ``alias`` has no customer: by its column, or since it refers to nothing."""
        if reached.relation.has(self.mapping.column):
            return f"{alias}.{quote_identifier(self.mapping.column)} IS NULL"
        unset = (f"NOT ({key.is_set(alias)})" for key in reached.keys)
        return " AND ".join(unset) or "false"

    def refers(self, key: ForeignKey, alias: str) -> str:
        """The condition that a row of ``alias`` refers to a row that comes along."""
        target, inner = self.tables[key.target], self.alias()
        found = f"{key.matches(alias, inner)} AND {self.belongs(target, inner)}"
        return f"EXISTS (SELECT FROM {target.relation.rows(inner)} WHERE {found})"

    def stray_keys(self, reached: Reached) -> list[ForeignKey]:
        """The foreign keys by which a row may refer to rows that come along, although it does not."""
        if self.mapping.of(reached.relation.label).via or reached.way not in (Way.COLUMN, Way.KEYS):
            return []
        # that of the customer's column says nothing that the column does not say
        return [
            key
            for key in reached.relation.keys
            if key not in (reached.keys if reached.way is Way.KEYS else ())
            and key.columns != (self.mapping.column,)
            and self._is_owned(key.target)
        ]

    def _by_column(self, reached: Reached, alias: str) -> str:
        condition = self.root(reached, alias)
        if self.mapping.of(reached.relation.label).strays != "follow":
            return condition
        # not through another one that follows: two of them might follow each other
        keys = [key for key in self.stray_keys(reached) if self._is_certain(key.target)]
        followed = " OR ".join(self.refers(key, alias) for key in keys) or "false"
        return f"({condition} OR ({self.nobodys(reached, alias)} AND ({followed})))"

    def _is_certain(self, oid: int) -> bool:
        found = self.tables[oid]
        return found.way in (Way.COLUMN, Way.ROOT) and self.mapping.of(found.relation.label).strays != "follow"

    def _by_keys(self, reached: Reached, alias: str) -> str:
        relation = reached.relation
        outside = [key for key in reached.keys if key.target != relation.oid]
        inside = [key for key in reached.keys if key.target == relation.oid]
        if not inside:
            return "(" + " OR ".join(self.refers(key, alias) for key in outside) + ")"
        first, following, members = self.alias(), self.alias(), self.alias()
        names = list(dict.fromkeys(name for key in inside for name in key.target_columns))
        start = " OR ".join(self.refers(key, first) for key in outside)
        step = " OR ".join(f"({key.matches(following, members)})" for key in inside)
        return f"""({alias}.tableoid, {alias}.ctid) IN (WITH RECURSIVE {members} AS (
            SELECT {_columns(first, names)} FROM {relation.rows(first)} WHERE {start}
             UNION SELECT {_columns(following, names)} FROM {relation.rows(following)} JOIN {members} ON {step})
            SELECT tableoid, ctid FROM {members})"""  # noqa: S608 - quoted


def _columns(alias: str, names: Sequence[str]) -> str:
    return ", ".join(f"{alias}.{name}" for name in ("tableoid", "ctid", *map(quote_identifier, names)))


def _said(condition: str) -> str:
    """The operator's SQL; a comment ends with its line."""
    return f"(\n{condition}\n)"


__all__ = ["OWNED", "Reach", "Reached", "Way"]
