"""``Reference``: a reference table's source, a file or a function, and the rows that it has now."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import inspect
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ..config.sections import ReferenceTable
from ..config.values import load_object, named
from ..errors import ConfigurationError
from ..migrations.statements import statements
from ..postgres.quoting import quote_qualified

# Changes when this package writes the same rows in another way.
_LAYOUT = "1"
_VERSION_DIGITS = 12
_SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".sql")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReferenceRows:
    """What a source has: its rows, or the query that finds them in each database.

    ``digest`` is 64 hexadecimal digits that change with the rows, the key, the table and its protection. Where
    ``as_text``, all values are texts, as PostgreSQL reads them.
    """

    name: str
    table: str
    key: tuple[str, ...]
    protected: bool
    digest: str
    rows: tuple[Row, ...] = field(default=(), repr=False)
    query: str | None = field(default=None, repr=False)
    as_text: bool = False

    @property
    def version(self) -> str:
        """What status shows of the digest."""
        return version_of(self.digest)


def version_of(digest: str) -> str:
    """Return what status shows of a digest."""
    return digest[:_VERSION_DIGITS]


class Reference:
    """One reference table of the configuration.

    Args:
        name: Its name there.
        table: Its settings.
    """

    def __init__(self, name: str, table: ReferenceTable) -> None:
        self.name = name
        self.settings = table
        self._known: tuple[tuple[int, int], str] | None = None  # a file's digest, as long as its stamp is this
        self.loaded: ReferenceRows | None = None
        """The rows that this process has read last."""

    @property
    def is_function(self) -> bool:
        """Whether the source is a function."""
        source = self.settings.source
        return callable(source) or (isinstance(source, str) and ":" in source)

    def check(self) -> None:
        """Refuse a source that does not exist.

        Raises:
            ConfigurationError: it does not, or it is of an unknown kind.
        """
        if self.is_function:
            self._function()
        else:
            path = self._path()
            if path.suffix.lower() not in _SUFFIXES:
                raise ConfigurationError(f"{self._where}: {str(path)!r} must end in {', '.join(_SUFFIXES)}")
            self._stamp(path)

    def fingerprint(self) -> str:
        """Return a text that changes with the file; of a function's rows, nothing. Every creation calls this."""
        settings = self.settings
        parts = [_LAYOUT, self.name, settings.table, *settings.key, str(settings.protected)]
        if self.is_function:
            return "\0".join([*parts, named(settings.source)])
        path = self._path()
        stamp = self._stamp(path)
        if self._known is None or self._known[0] != stamp:
            self._known = stamp, hashlib.sha256(self._read(path)).hexdigest()
        return "\0".join([*parts, self._known[1]])

    async def load(self) -> ReferenceRows:
        """Read the source.

        Raises:
            ConfigurationError: it cannot be read, or its rows do not fit together. The message names the row.
        """
        settings = self.settings
        query: str | None = None
        rows: tuple[Row, ...] = ()
        if self.is_function:
            rows = await self._call()
        elif self._path().suffix.lower() == ".sql":
            query = self._query(self._path())
        else:
            rows = await asyncio.to_thread(self._parse, self._path())
        if query is None:
            check_rows(self._where, rows, settings.key)
        content = [_LAYOUT, settings.table, settings.key, settings.protected, query, rows]
        digest = hashlib.sha256(json_of(content).encode()).hexdigest()
        self.loaded = ReferenceRows(
            name=self.name,
            table=quote_qualified(*settings.place),
            key=settings.key,
            protected=settings.protected,
            digest=digest,
            rows=rows,
            query=query,
            as_text=not self.is_function and self._path().suffix.lower() == ".csv",
        )
        return self.loaded

    @property
    def _where(self) -> str:
        return f"reference.{self.name}"

    def _path(self) -> Path:
        return Path(self.settings.source)

    def _stamp(self, path: Path) -> tuple[int, int]:
        try:
            status = path.stat()
        except OSError as exc:
            raise ConfigurationError(f"{self._where}: {str(path)!r} cannot be read: {exc.strerror}") from exc
        return status.st_mtime_ns, status.st_size

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as exc:
            raise ConfigurationError(f"{self._where}: {str(path)!r} cannot be read: {exc.strerror}") from exc

    def _function(self) -> Any:
        source = self.settings.source
        found = load_object(source) if isinstance(source, str) else source
        if not callable(found):
            raise ConfigurationError(f"{self._where}: {source!r} is not a function")
        return found

    async def _call(self) -> tuple[Row, ...]:
        found = self._function()()
        if inspect.isawaitable(found):
            found = await found
        rows = [row async for row in found] if hasattr(found, "__aiter__") else list(found)
        for row in rows:
            if not isinstance(row, Mapping):
                raise ConfigurationError(f"{self._where}: the function must yield mappings, not {type(row).__name__}")
        return tuple(dict(row) for row in rows)

    def _text(self, path: Path) -> str:
        try:
            return self._read(path).decode("utf-8-sig")
        except UnicodeDecodeError as exc:
            raise ConfigurationError(f"{self._where}: {str(path)!r} is not UTF-8: {exc}") from exc

    def _parse(self, path: Path) -> tuple[Row, ...]:
        text = self._text(path)
        try:
            match path.suffix.lower():
                case ".csv":
                    return _csv_rows(text)
                case ".json":
                    found = json.loads(text)
                case _:
                    # a text in JSON may have the other characters that splitlines takes for the end of a line
                    found = [json.loads(line) for line in text.split("\n") if line.strip()]
        except (ValueError, csv.Error) as exc:
            raise ConfigurationError(f"{self._where}: {str(path)!r} cannot be read: {exc}") from exc
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ConfigurationError(f"{self._where}: {str(path)!r} must be a list of objects")
        return tuple(found)

    def _query(self, path: Path) -> str:
        text = self._text(path)
        found = statements(text)
        if len(found) != 1 or found[0].changes:
            raise ConfigurationError(f"{self._where}: {str(path)!r} must be one query (SELECT or VALUES)")
        return text[found[0].start : found[0].end]


def _csv_rows(text: str) -> tuple[Row, ...]:
    """The rows of a CSV with a header line; an empty cell is NULL."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    header = reader.fieldnames or ()
    if repeated := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"two columns are named {repeated[0]!r}")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has another number of cells than the header")
        rows.append({name: value if value != "" else None for name, value in row.items()})
    return tuple(rows)


def check_rows(where: str, rows: Iterable[Row], key: tuple[str, ...]) -> None:
    """Refuse rows with different columns, without a key, or with the same one.

    Raises:
        ConfigurationError: the message names the row, counted from 1.
    """
    columns: list[str] | None = None
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        columns = list(row) if columns is None else columns
        if set(row) != set(columns) or not all(isinstance(name, str) for name in row):
            raise ConfigurationError(f"{where}: row {number} has other columns than the first one")
        if missing := [name for name in key if row.get(name) is None]:
            raise ConfigurationError(f"{where}: row {number} has no {', '.join(missing)}, which is its key")
        identity = json_of([row[name] for name in key])
        if identity in seen:
            raise ConfigurationError(f"{where}: rows {seen[identity]} and {number} have the same key")
        seen[identity] = number


def json_of(value: Any) -> str:
    """Return JSON that PostgreSQL reads into a column of any type."""
    return json.dumps(value, default=_plain, ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"\\x{bytes(value).hex()}"
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    # dates, decimals, UUIDs: PostgreSQL reads what Python writes
    return str(value)
