"""The installed packages that a schema is built from, by digest of the files that their installer wrote down."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_RECORD = "RECORD"


def distributions(module: str, site: Path) -> Iterator[str]:
    """Yield the names of the distributions in ``site`` that have the top-level module, as directories spell them."""
    has_module = re.compile(rf"^{re.escape(module)}(/|\.py,|\.[\w.-]+\.(so|pyd),)", re.MULTILINE)
    for record in sorted(site.glob(f"*.dist-info/{_RECORD}")):
        if has_module.search(_text(record)):
            yield record.parent.name.partition("-")[0]


class PackageDigests:
    """Digests of installed packages, computed again when the list of a package's files has changed.

    The list has a digest of each file. So it costs no more than one file, however large the package is.
    """

    def __init__(self) -> None:
        # the list's path, time and size, and the digest, by the name of the distribution
        self._known: dict[str, tuple[Path, tuple[int, int], str]] = {}

    def of(self, name: str) -> tuple[Path, str] | None:
        """Return the list of a distribution's files, and the digest of it; None if it is not installed."""
        known = self._known.get(name)
        try:
            if known is not None and _stamp(known[0]) == known[1]:
                return known[0], known[2]
        except OSError:
            pass  # another version has another directory
        path = next((path for place in sys.path for path in Path(place).glob(f"{name}-*.dist-info/{_RECORD}")), None)
        try:
            if path is None:
                return None
            stamp, digest = _stamp(path), _digest(path)
        except OSError:
            return None
        self._known[name] = path, stamp, digest
        return path, digest


def _text(record: Path) -> str:
    return record.read_text(encoding="utf-8", errors="replace")


def _stamp(path: Path) -> tuple[int, int]:
    found = os.stat(path)  # noqa: PTH116 - as for files
    return found.st_mtime_ns, found.st_size


def _digest(path: Path) -> str:
    """The digest of the package's own files. Scripts and the installer's notes differ between machines."""
    own = []
    for line in _text(path).splitlines():
        name, _, rest = line.partition(",")
        if rest.startswith("sha256=") and not name.startswith(("..", "/", f"{path.parent.name}/")):
            own.append(line)
    return hashlib.sha256("\n".join(sorted(own)).encode()).hexdigest()
