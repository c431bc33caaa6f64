"""``SeedSet``: the seeds and reference tables of the configuration and of ``Tenancy.on_create``, as they are now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config import TenancyConfig
from ..config.values import load_object
from ..errors import ConfigurationError
from .definition import NAME, Seed, read_sql, seed
from .source import Reference

_Stamp = tuple[str, int, int]


class SeedSet:
    """The seeds in the order of the setting, then those of ``Tenancy.on_create``. SQL files are read when they change.

    Args:
        config: The settings ``provisioning.seeds`` and ``reference``.
        registered: What ``Tenancy.on_create`` has made.
    """

    def __init__(self, config: TenancyConfig, registered: Sequence[Seed] = ()) -> None:
        self._given = config.provisioning.seeds
        self._registered = registered
        self._loaded: dict[int, list[Seed]] = {}  # by the position in the setting
        self._files: dict[Path, tuple[_Stamp, Seed]] = {}
        self._checked: tuple[Seed, ...] = ()
        self.references = tuple(Reference(name, table) for name, table in config.reference.items())

    def __bool__(self) -> bool:
        """Whether there is any seed or reference table."""
        return bool(self._given or self._registered or self.references)

    def all(self) -> tuple[Seed, ...]:
        """Return all seeds. Every creation calls this: files are read again only if they have changed.

        Raises:
            ConfigurationError: one cannot be loaded, or two have the same name.
        """
        if not self._given and not self._registered:
            return ()
        found = tuple(one for position, given in enumerate(self._given) for one in self._load(position, given))
        found = (*found, *self._registered)
        if self._checked != found:
            of_references = ((one.name, "the reference table") for one in self.references)
            _check_names((*((one.name, one.origin) for one in found), *of_references))
            self._checked = found
        return found

    def for_template(self) -> tuple[Seed, ...]:
        """Return those that run in the template."""
        return tuple(one for one in self.all() if one.template)

    def for_tenants(self) -> tuple[Seed, ...]:
        """Return those that run for each new tenant."""
        return tuple(one for one in self.all() if not one.template)

    def check(self) -> None:
        """Load everything.

        Raises:
            ConfigurationError: as ``all``; or a source of reference data does not exist.
        """
        self.all()
        for reference in self.references:
            if not NAME.fullmatch(reference.name):
                raise ConfigurationError(f"reference.{reference.name}: {reference.name!r} is not a name")
            reference.check()

    def _load(self, position: int, given: Any) -> Iterable[Seed]:
        if isinstance(given, (str, Path)) and not _is_object(given):
            return self._read(Path(given))
        if position not in self._loaded:
            found = load_object(given) if isinstance(given, str) else given
            origin = given if isinstance(given, str) else ""
            self._loaded[position] = list(_made_of(found, origin))
        return self._loaded[position]

    def _read(self, path: Path) -> Iterable[Seed]:
        if path.is_dir():
            files = sorted(path.glob("*.sql"))
        elif path.is_file():
            files = [path]
        else:
            raise ConfigurationError(
                f"provisioning.seeds: {str(path)!r} is neither a directory nor a file; "
                "a function is written module:function"
            )
        return [self._read_file(file) for file in files]

    def _read_file(self, path: Path) -> Seed:
        status = path.stat()
        stamp = (str(path), status.st_mtime_ns, status.st_size)
        known = self._files.get(path)
        if known is None or known[0] != stamp:
            known = self._files[path] = (stamp, read_sql(path))
        return known[1]


def _is_object(given: str | Path) -> bool:
    return isinstance(given, str) and ":" in given


def _made_of(found: Any, origin: str) -> Iterable[Seed]:
    if isinstance(found, Seed):
        return [found]
    if isinstance(found, (list, tuple)):
        return [made for one in found for made in _made_of(one, origin)]
    if callable(found):
        return [seed(found)]
    raise ConfigurationError(f"provisioning.seeds: {origin or found!r} is neither a function nor a list of functions")


def _check_names(named: Iterable[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for name, origin in named:
        if name in seen:
            raise ConfigurationError(
                f"two seeds are named {name!r}: {seen[name] or 'one'} and {origin or 'another'}; give one of them "
                "another name"
            )
        seen[name] = origin
