"""A directory of files as one stream, in tar's format: what is encrypted, and what is unpacked again."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import BackupDamagedError
from .encryption import ChunkReader
from .manifest import BackupFile, Manifest
from .stores import CHUNK_BYTES

_BLOCK = tarfile.BLOCKSIZE


def pack(files: Iterable[Path], done: Callable[[BackupFile], None]) -> Iterator[bytes]:
    """Return a tar of complete files, in the order in which they come; each is deleted once it was read.

    Args:
        files: The files. The iterator may wait until the next one is complete.
        done: Called with each file that was read.
    """
    for file in files:
        info = tarfile.TarInfo(file.name)
        info.size, info.mode = file.stat().st_size, 0o600
        yield info.tobuf(format=tarfile.PAX_FORMAT)
        digest, read = hashlib.sha256(), 0
        with file.open("rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                digest.update(chunk)
                read += len(chunk)
                yield chunk
        if read != info.size:
            raise BackupDamagedError(f"{file.name} has changed while it was read")
        yield bytes(-read % _BLOCK)
        file.unlink()
        done(BackupFile(file.name, read, digest.hexdigest()))
    yield bytes(2 * _BLOCK)


def unpack(chunks: Iterable[bytes], manifest: Manifest, directory: Path) -> None:
    """Write the files of a tar into a directory, those that the manifest has and no others.

    Raises:
        BackupDamagedError: it has other files, or one is not what it was.
    """
    reader = ChunkReader(chunks)
    expected = iter(manifest.files)
    try:
        with tarfile.open(fileobj=reader, mode="r|", bufsize=CHUNK_BYTES) as archive:  # type: ignore[call-overload]
            for info in archive:
                file = next(expected, None)
                if file is None or not info.isreg() or info.name != file.name or Path(file.name).name != file.name:
                    raise BackupDamagedError(f"the archive has {info.name!r}, which is not in its manifest")
                # first: anybody can encrypt for the key, and fill the disk
                if info.size != file.bytes:
                    raise BackupDamagedError(f"{file.name} has {info.size} bytes, and its manifest says {file.bytes}")
                content = archive.extractfile(info)
                digest, size = hashlib.sha256(), 0
                with (directory / file.name).open("xb") as written:
                    while content is not None and (chunk := content.read(CHUNK_BYTES)):
                        digest.update(chunk)
                        size += written.write(chunk)
                if size != file.bytes or digest.hexdigest() != file.sha256:
                    raise BackupDamagedError(f"{file.name} differs from its manifest")
        for _ in iter(lambda: reader.read(CHUNK_BYTES), b""):
            pass  # to the end, so that all of it is verified
    except (tarfile.TarError, EOFError, OverflowError) as exc:
        raise reader.error or BackupDamagedError(f"the archive cannot be read: {exc}") from exc
    if (missing := next(expected, None)) is not None:
        raise BackupDamagedError(f"the archive lacks {missing.name}")


class Digest:
    """Counts and hashes the chunks that pass."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.bytes = 0

    def passing(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Return the chunks."""
        for chunk in chunks:
            self._hash.update(chunk)
            self.bytes += len(chunk)
            yield chunk

    @property
    def sha256(self) -> str:
        """The hash in hexadecimal digits."""
        return self._hash.hexdigest()

    def check(self, manifest: Manifest) -> None:
        """Refuse another archive than the manifest's.

        Raises:
            BackupDamagedError: it is another one.
        """
        if (self.bytes, self.sha256) != (manifest.archive_bytes, manifest.archive_sha256):
            raise BackupDamagedError("the archive is not the one that the manifest names: its checksum differs")


__all__ = ["Digest", "pack", "unpack"]
