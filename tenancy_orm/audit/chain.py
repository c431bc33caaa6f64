"""The check of the audit log's hash chain, entry by entry. Pure state, no I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from ..errors import AuditChainError, AuditError
from .checkpoints import Checkpoint, Verifier

GENESIS = bytes(32)  # the previous hash of the first entry

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of ``AuditLog.verify``.

    Args:
        entries: How many entries were verified.
        first: The sequence number of the first of them; None for an empty log.
        last: The sequence number of the last of them.
        first_bad: The sequence number of the first entry that is not valid; None if all are.
        problem: What is wrong with it.
        confirmed: Sequence numbers of the given checkpoints that the log agrees with.
        removed: Sequence numbers of given checkpoints that could not be compared, since retention removed the entries.
        skipped: Sequence numbers of given checkpoints that were not compared, since verification began after them.
    """

    entries: int
    first: int | None
    last: int | None
    first_bad: int | None = None
    problem: str | None = None
    confirmed: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the whole chain is valid."""
        return self.first_bad is None

    def raise_if_bad(self) -> None:
        """Raise if the chain is not valid.

        Raises:
            AuditChainError: it is broken, with the first bad sequence number.
        """
        if self.first_bad is not None:
            raise AuditChainError(
                f"the audit log is broken at entry {self.first_bad}: {self.problem}", sequence=self.first_bad
            )


class ChainCheck:
    """Checks the chain entry by entry. Pure state, no I/O."""

    def __init__(
        self,
        cuts: Mapping[int, Checkpoint],
        checkpoints: Sequence[Checkpoint],
        verifier: Verifier,
        since: Checkpoint | None,
    ) -> None:
        self._cuts = cuts
        self._verifier = verifier
        self._since = since
        self._wanted: dict[int, list[Checkpoint]] = {}
        for checkpoint in checkpoints:
            self._wanted.setdefault(checkpoint.sequence, []).append(checkpoint)
        self._started = False
        self._origin = 0  # the sequence number before the first entry: a checkpoint's, a cut's, or 0
        self.sequence = 0  # of the last valid entry, or the origin
        self._hash = GENESIS
        self._first: int | None = None
        self._entries = 0
        self._confirmed: set[int] = set()
        self.previous: Any = None
        self.bad: int | None = None
        self.problem: str | None = None

    def check_entry(self, row: Any) -> bool:
        """Check the next entry, and return whether it is valid."""
        if not self._started and not self._start(row.sequence):
            return False
        expected = self.sequence + 1
        if self._since is not None and self._precedes(self._since, row):
            if row.sequence == self._since.sequence and row.hash != self._since.hash:
                return self._fail(row.sequence, "the checkpoint to begin from has another hash: it was rewritten")
            return True
        if row.sequence != expected:
            return self._fail(min(row.sequence, expected), f"entry {expected} is missing or out of order")
        if row.previous_hash != self._hash:
            return self._fail(expected, "it does not continue the entry before it")
        if hashlib.sha256(canonical(row)).digest() != row.hash:
            return self._fail(expected, "its content is not what was hashed")
        self.sequence, self._hash, self.previous = row.sequence, row.hash, row
        self._entries += 1
        self._first = self._first or row.sequence
        return self._check_checkpoints(row.sequence, row.hash)

    def check_head(self, head_sequence: int, head_hash: bytes) -> None:
        """Check, after the last entry, that the chain ends where its head and every checkpoint say."""
        if not self._started and not self._start(head_sequence + 1):
            return
        if self.sequence != head_sequence:
            self._fail(min(self.sequence, head_sequence) + 1, f"the head of the chain is at entry {head_sequence}")
        elif self._hash != head_hash:
            self._fail(self.sequence, "the head of the chain has another hash")
        beyond = [sequence for sequence in self._wanted if sequence > self.sequence]
        if beyond and self.problem is None:
            self._fail(self.sequence + 1, f"the log ends here, but a checkpoint of entry {max(beyond)} was signed")

    def add_problem(self, sequence: int, problem: str) -> None:
        """Record a problem that was found outside the chain, unless the chain has one."""
        if self.problem is None:
            self._fail(sequence, problem)

    def report(self) -> VerifyReport:
        """The result so far."""
        older = tuple(sorted(sequence for sequence in self._wanted if sequence < self._origin))
        from_cut = self._origin in self._cuts
        return VerifyReport(
            entries=self._entries,
            first=self._first,
            last=None if self.previous is None else self.previous.sequence,
            first_bad=self.bad,
            problem=self.problem,
            confirmed=tuple(sorted(self._confirmed)),
            removed=older if from_cut else (),
            skipped=() if from_cut else older,
        )

    def _precedes(self, since: Checkpoint, row: Any) -> bool:
        """Whether an entry has the checkpoint's time, up to the microsecond, and does not come after its entry.

        Such entries are read again, since times are no finer. A lower number at a later time is not among them.
        """
        return self._entries == 0 and row.sequence <= since.sequence and row.occurred_at == since.occurred_at

    def _start(self, first: int) -> bool:
        """Find what the first entry continues: the checkpoint to begin from, the genesis, or a signed cut."""
        self._started = True
        if self._since is not None and first <= self._since.sequence + 1:
            return self._start_after(self._since)
        if first == 1:
            return True
        cut = self._cuts.get(first - 1)
        if cut is None:
            return self._fail(1, f"the log begins at entry {first}, and no cut by retention explains it")
        try:
            self._verifier.verify(cut)
        except AuditError as exc:
            return self._fail(first, f"the log was cut before this entry, and {exc}")
        return self._start_after(cut)

    def _start_after(self, known: Checkpoint) -> bool:
        self._origin = self.sequence = known.sequence
        self._hash = known.hash
        return self._check_checkpoints(known.sequence, known.hash)

    def _check_checkpoints(self, sequence: int, found: bytes) -> bool:
        for checkpoint in self._wanted.get(sequence, ()):
            if checkpoint.hash != found:
                return self._fail(sequence, "a checkpoint of it has another hash: it was rewritten")
            self._confirmed.add(sequence)
        return True

    def _fail(self, sequence: int, problem: str) -> bool:
        self.bad, self.problem = sequence, problem
        return False


def canonical(row: Any) -> bytes:
    """Return the bytes that are hashed for an entry; ``tenancy.audit_canonical`` returns the same.

    A JSON array, with a comma and a space between items, of: the format's name, the previous hash in hexadecimal, the
    sequence number, microseconds since 1970, the actor's kind and id, the action, the tenant's id and slug, the texts
    of ``before``, ``after`` and ``detail`` as jsonb writes them, the request id, the source and the database role.
    """
    return json.dumps(
        [
            "tenancy-audit-1",
            row.previous_hash.hex(),
            row.sequence,
            (row.occurred_at - _EPOCH) // timedelta(microseconds=1),
            row.actor_kind,
            row.actor_id,
            row.action,
            None if row.tenant_id is None else str(row.tenant_id),
            row.slug,
            row.before,
            row.after,
            row.detail,
            row.request_id,
            row.source,
            row.database_role,
        ],
        ensure_ascii=False,
    ).encode()
