"""Which version of ``pg_dump`` has written an archive: older ones of ``pg_restore`` may not read it."""

from __future__ import annotations

import re
from pathlib import Path

_MAGIC = b"PGDMP"
_CONTENTS = "toc.dat"  # of a directory, and the first file of a tar
_TAR_HEADER_BYTES = 512
_READ_BYTES = 65_536
_COMPRESSION_IS_A_BYTE = (1, 15)  # since that version of the format, which pg_dump 16 writes
_HAS_VERSIONS = (1, 10)
_TIMES = 7  # numbers: seconds, minutes, ...
_MAJOR = re.compile(rb"\d+")


def dump_version(archive: Path) -> int | None:
    """Return the major version of the ``pg_dump`` that has written an archive; None where it does not say that.

    Args:
        archive: A directory (``pg_dump -Fd``) or a file (``-Fc``, ``-Ft``).
    """
    try:
        with (archive / _CONTENTS if archive.is_dir() else archive).open("rb") as file:
            data = file.read(_READ_BYTES)
    except OSError:
        return None  # pg_restore says it better
    if data.startswith(_CONTENTS.encode() + b"\0"):
        data = data[_TAR_HEADER_BYTES:]
    if not data.startswith(_MAGIC):
        return None
    try:
        return _Header(data).dumped_by()
    except (IndexError, ValueError):
        return None


class _Header:
    """Reads the beginning of an archive, as ``ReadHead`` of PostgreSQL's pg_backup_archiver.c does."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = len(_MAGIC)
        self._int_bytes = 0

    def dumped_by(self) -> int | None:
        version = (self._byte(), self._byte())
        self._byte()  # revision
        self._int_bytes = self._byte()
        self._byte()  # size of an offset
        self._byte()  # kind of archive
        if version < _HAS_VERSIONS:
            return None
        if version >= _COMPRESSION_IS_A_BYTE:
            self._byte()
        else:
            self._int()
        for _ in range(_TIMES):
            self._int()
        self._text()  # database
        self._text()  # version of the server
        found = _MAJOR.match(self._text())
        return None if found is None else int(found[0][:4])

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _int(self) -> int:
        is_negative, begin = self._byte(), self._at
        self._at += self._int_bytes
        value = int.from_bytes(self._data[begin : self._at], "little")
        return -value if is_negative else value

    def _text(self) -> bytes:
        size, begin = self._int(), self._at
        self._at += max(size, 0)
        return self._data[begin : self._at]


__all__ = ["dump_version"]
