"""The age format, by pyrage, on streams of bytes. What is here blocks, and is called in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, Full, Queue
from typing import Any

from ..errors import BackupDamagedError, MissingExtraError
from .stores import CHUNK_BYTES

_QUEUED = 4  # chunks between the two threads
_LOOK_SECONDS = 0.5  # how often a thread looks whether the other one has ended


def new_identity() -> tuple[str, str]:
    """Return a new age identity, which is a secret, and its recipient.

    Raises:
        MissingExtraError: pyrage is not installed.
    """
    identity = _pyrage().x25519.Identity.generate()
    return str(identity), str(identity.to_public())


def recipient_of(identity: str) -> str:
    """Return the recipient of an identity."""
    return str(_pyrage().x25519.Identity.from_str(identity).to_public())


def encrypt(chunks: Iterable[bytes], recipients: Sequence[str]) -> Iterator[bytes]:
    """Encrypt a stream for recipients.

    Raises:
        MissingExtraError: pyrage is not installed.
    """
    pyrage = _pyrage()
    readers = [pyrage.x25519.Recipient.from_str(recipient) for recipient in recipients]
    return _through(lambda reader, writer: pyrage.encrypt_io(reader, writer, readers), chunks)


def decrypt(chunks: Iterable[bytes], identity: str) -> Iterator[bytes]:
    """Decrypt a stream.

    Raises:
        BackupDamagedError: it is not what was encrypted for this identity.
        MissingExtraError: pyrage is not installed.
    """
    pyrage = _pyrage()
    key = pyrage.x25519.Identity.from_str(identity)

    def work(reader: Any, writer: Any) -> None:
        try:
            pyrage.decrypt_io(reader, writer, [key])
        except (pyrage.DecryptError, OSError) as exc:
            raise BackupDamagedError(f"it cannot be decrypted: {exc}") from exc

    return _through(work, chunks)


def _pyrage() -> Any:
    try:
        import pyrage  # type: ignore[import-untyped]
    except ImportError as exc:
        raise MissingExtraError("pyrage", "backup") from exc
    return pyrage


class ChunkReader:
    """Reads a stream of chunks as a file."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")
        self.error: BaseException | None = None

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes, at least one unless the stream has ended."""
        while not self._rest:
            try:
                self._rest = memoryview(next(self._chunks))
            except StopIteration:
                return b""
            except BaseException as exc:
                # pyrage makes another error of it
                self.error = exc
                raise
        found, self._rest = (self._rest, memoryview(b"")) if size < 0 else (self._rest[:size], self._rest[size:])
        return bytes(found)


class _StoppedError(Exception):
    """Nobody reads any more what is written."""


class _QueueWriter:
    """Puts what is written into a queue, in large chunks."""

    def __init__(self, queue: Queue[bytes | BaseException | None], stopped: threading.Event) -> None:
        self._queue = queue
        self._stopped = stopped
        self._gathered = bytearray()

    def write(self, data: bytes) -> int:
        self._gathered += data
        if len(self._gathered) >= CHUNK_BYTES:
            self.flush()
        return len(data)

    def flush(self) -> None:
        if self._gathered:
            self.put(bytes(self._gathered))
            self._gathered.clear()

    def put(self, item: bytes | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=_LOOK_SECONDS)
            except Full:
                continue
        raise _StoppedError


def _through(work: Callable[[Any, Any], None], chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Run ``work(reader, writer)`` in a thread, and return what it writes."""
    queue: Queue[bytes | BaseException | None] = Queue(_QUEUED)
    stopped = threading.Event()
    reader, writer = ChunkReader(chunks), _QueueWriter(queue, stopped)

    def run() -> None:
        try:
            work(reader, writer)
            writer.flush()
            writer.put(None)
        except _StoppedError:
            return
        except BaseException as exc:  # noqa: BLE001 - it is raised where the chunks are read
            try:
                writer.put(reader.error or exc)
            except _StoppedError:
                return

    thread = threading.Thread(target=run, name="tenancy-backup-age", daemon=True)
    thread.start()
    try:
        while (item := _next(queue, thread)) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _next(queue: Queue[bytes | BaseException | None], thread: threading.Thread) -> bytes | BaseException | None:
    while True:
        try:
            return queue.get(timeout=_LOOK_SECONDS)
        except Empty:
            if not thread.is_alive() and queue.empty():
                raise BackupDamagedError("the encryption ended early") from None


__all__ = ["ChunkReader", "decrypt", "encrypt", "new_identity", "recipient_of"]
