"""The rules of an anonymisation: what replaces the values of which columns."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..errors import AnonymisationError

RuleKind = Literal["keep", "null", "constant", "hash", "faker"]
_PLAIN = ("keep", "null", "hash")
_OPTIONS = {"constant": frozenset({"constant"}), "faker": frozenset({"faker", "seed", "locale"})}

RulesSource: TypeAlias = "AnonymisationRules | Mapping[str, Any] | str | Path"
"""Rules, the contents of a file of rules, or the path of one."""


def is_pattern(text: str) -> bool:
    """Whether a name of a file of rules may be several names."""
    return "*" in text or "?" in text


def matches(name: str, pattern: str) -> bool:
    """Whether a name is one of those that a pattern with ``*`` and ``?`` is about. Brackets are a part of names."""
    return fnmatchcase(name, pattern.replace("[", "[[]"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnRule:
    """What replaces the values of a column.

    Attributes:
        kind: "keep", "null", "constant", "hash" or "faker".
        value: The constant as text, as PostgreSQL reads it; or the method of Faker.
        seed: Of Faker: the same seed makes the same values.
        locale: Of Faker, such as "de_DE".
    """

    kind: RuleKind
    value: str = ""
    seed: int | None = None
    locale: str | None = None

    @classmethod
    def parse(cls, where: str, given: Any) -> ColumnRule:
        """Read a rule of a file.

        Raises:
            AnonymisationError: it is none.
        """
        if isinstance(given, str):
            if given not in _PLAIN:
                raise AnonymisationError(
                    f'{where}: {given!r} is not a rule; write "keep", "null", "hash", '
                    '{ constant = "..." } or { faker = "name" }',
                    columns=(where,),
                )
            return cls(kind=given)  # type: ignore[arg-type]
        kind: RuleKind
        if isinstance(given, Mapping):
            for kind in ("constant", "faker"):
                if kind in given and not (unknown := sorted(given.keys() - _OPTIONS[kind])):
                    return cls._parse_options(where, kind, given)
            unknown = sorted(given)
        else:
            unknown = [repr(given)]
        raise AnonymisationError(f"{where}: {', '.join(unknown) or 'nothing'} is not a rule", columns=(where,))

    @classmethod
    def _parse_options(cls, where: str, kind: RuleKind, given: Mapping[str, Any]) -> ColumnRule:
        value, seed, locale = given[kind], given.get("seed"), given.get("locale")
        if isinstance(value, bool):
            value = str(value).lower()
        if not isinstance(value, str | int | float) or "\x00" in str(value):
            raise AnonymisationError(f"{where}: write the constant as text, as PostgreSQL reads it", columns=(where,))
        if isinstance(seed, bool) or not isinstance(seed, int | None) or not isinstance(locale, str | None):
            raise AnonymisationError(f"{where}: seed is a whole number, and locale a text", columns=(where,))
        return cls(kind=kind, value=str(value), seed=seed, locale=locale)


@dataclass(frozen=True, slots=True)
class TableRules:
    """The rules of the tables that a pattern names.

    Attributes:
        pattern: ``schema.table``, with ``*`` and ``?``.
        columns: Rules by column, or pattern of columns.
    """

    pattern: str
    columns: Mapping[str, ColumnRule]

    @property
    def is_pattern(self) -> bool:
        """Whether it may name several tables."""
        return is_pattern(self.pattern)

    def is_of(self, names: tuple[str, ...]) -> bool:
        """Whether it names one of these tables, which are one and those that it is a part of."""
        return any(matches(name, self.pattern) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnonymisationRules:
    """What replaces the values of which columns.

    Attributes:
        tables: By pattern of tables.
        keep_large_objects: Whether large objects come along. No rule can change what is in them.
    """

    tables: tuple[TableRules, ...] = field(default=())
    keep_large_objects: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> AnonymisationRules:
        """Read the contents of a file of rules.

        Raises:
            AnonymisationError: something in it is no rule.
        """
        if unknown := sorted(given.keys() - {"tables", "keep_large_objects"}):
            raise AnonymisationError(f"the rules have {', '.join(unknown)}: write [tables.NAME]", columns=())
        tables = given.get("tables", {})
        keep = given.get("keep_large_objects", False)
        if not isinstance(tables, Mapping) or not isinstance(keep, bool):
            raise AnonymisationError("tables is a table of TOML, and keep_large_objects true or false", columns=())
        found = []
        for pattern, columns in tables.items():
            full = pattern if "." in pattern else f"public.{pattern}"
            if not isinstance(columns, Mapping) or not columns:
                raise AnonymisationError(f"table {pattern} has no rules: write column = rule", columns=(pattern,))
            parsed = {name: ColumnRule.parse(f"{pattern}.{name}", rule) for name, rule in columns.items()}
            found.append(TableRules(full, parsed))
        return cls(tables=tuple(found), keep_large_objects=keep)

    @classmethod
    def load(cls, path: str | Path) -> AnonymisationRules:
        """Read a file of rules, in TOML.

        Raises:
            AnonymisationError: it cannot be read, or something in it is no rule.
        """
        try:
            given = tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as exc:
            raise AnonymisationError(f"the rules in {path} cannot be read: {exc}", columns=()) from exc
        return cls.parse(given)

    @classmethod
    def of(cls, source: RulesSource) -> AnonymisationRules:
        """Return rules, whichever way they are given.

        Raises:
            AnonymisationError: they cannot be read.
        """
        if isinstance(source, AnonymisationRules):
            return source
        return cls.parse(source) if isinstance(source, Mapping) else cls.load(source)


__all__ = ["AnonymisationRules", "ColumnRule", "RuleKind", "RulesSource", "TableRules", "is_pattern", "matches"]
