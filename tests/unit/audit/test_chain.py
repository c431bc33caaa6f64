"""The hash chain and its checkpoints, without a database."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenancy_orm.audit.actor import Actor
from tenancy_orm.audit.chain import GENESIS, ChainCheck, canonical
from tenancy_orm.audit.checkpoints import Checkpoint, Signer, Verifier, Voucher
from tenancy_orm.errors import AuditChainError, AuditError, ConfigurationError

INSTALLATION = UUID(int=7)
START = datetime(2026, 11, 1, 12, tzinfo=UTC)
SIGNER = Signer({"1": b"a" * 32, "2": b"b" * 32})


@dataclass(frozen=True)
class Entry:
    """A row of the log, as ``AuditLog.verify`` reads it."""

    sequence: int
    occurred_at: datetime
    previous_hash: bytes
    hash: bytes = b""
    action: str = "test.done"
    tenant_id: UUID | None = None
    slug: str | None = None
    actor_kind: str = "system"
    actor_id: str | None = None
    before: str | None = None
    after: str | None = None
    detail: str | None = None
    request_id: str | None = None
    source: str | None = None
    database_role: str = "app"


def sealed(entry: Entry) -> Entry:
    """The entry with the hash of its content."""
    return replace(entry, hash=hashlib.sha256(canonical(entry)).digest())


def log(length: int, *, apart: timedelta = timedelta(seconds=1)) -> list[Entry]:
    """A valid chain."""
    entries: list[Entry] = []
    previous = GENESIS
    for sequence in range(1, length + 1):
        entry = sealed(Entry(sequence, START + apart * sequence, previous, after=f'{{"n": {sequence}}}'))
        previous = entry.hash
        entries.append(entry)
    return entries


def signed(entry: Entry, kind: str = "checkpoint") -> Checkpoint:
    """A statement about an entry."""
    return SIGNER.sign(
        "cut" if kind == "cut" else "checkpoint",
        installation=INSTALLATION,
        sequence=entry.sequence,
        digest=entry.hash,
        occurred_at=entry.occurred_at,
    )


def check(
    entries: list[Entry],
    *,
    head: Entry | None = None,
    cuts: tuple[Checkpoint, ...] = (),
    checkpoints: tuple[Checkpoint, ...] = (),
    since: Checkpoint | None = None,
) -> ChainCheck:
    """Check ``entries``; ``head`` (None: the last of them) is the head of the chain."""
    chain = ChainCheck({cut.sequence: cut for cut in cuts}, checkpoints, SIGNER, since)
    if all(chain.check_entry(entry) for entry in entries):
        last = head or (entries[-1] if entries else None)
        chain.check_head(last.sequence if last else 0, last.hash if last else GENESIS)
    return chain


def test_a_chain_that_holds_is_reported_so() -> None:
    """Every entry is counted."""
    report = check(log(5)).report()
    assert report.ok and (report.entries, report.first, report.last) == (5, 1, 5)
    report.raise_if_bad()


def test_an_empty_log_holds() -> None:
    """An empty log is valid."""
    assert check([]).report().ok


@pytest.mark.parametrize(
    "change",
    [
        {"action": "test.other"},
        {"actor_kind": "operator"},
        {"actor_id": "mallory"},
        {"tenant_id": UUID(int=9)},
        {"slug": "other"},
        {"before": "{}"},
        {"after": '{"n": 4}'},
        {"detail": "{}"},
        {"request_id": "r"},
        {"source": "192.0.2.1"},
        {"database_role": "other"},
        {"occurred_at": START},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_field_is_found(change: dict[str, object]) -> None:
    """Every field is part of what is hashed."""
    entries = log(5)
    entries[2] = replace(entries[2], **change)  # type: ignore[arg-type]
    assert check(entries).report().first_bad == 3


def test_a_changed_entry_with_a_new_hash_breaks_the_next() -> None:
    """The next entry continues another hash."""
    entries = log(5)
    entries[2] = sealed(replace(entries[2], actor_id="mallory"))
    assert check(entries).report().first_bad == 4


def test_a_removed_entry_is_found() -> None:
    """The first bad sequence number is the missing one."""
    entries = log(5)
    del entries[2]
    assert check(entries).report().first_bad == 3


def test_an_inserted_entry_is_found() -> None:
    """A sequence number occurs once."""
    entries = log(5)
    entries.insert(3, sealed(replace(entries[2], previous_hash=entries[2].hash)))
    assert check(entries).report().first_bad == 3


def test_swapped_entries_are_found() -> None:
    """Order is part of the chain."""
    entries = log(5)
    entries[2], entries[3] = entries[3], entries[2]
    assert check(entries).report().first_bad == 3


def test_a_tail_that_was_cut_off_is_found_by_the_head() -> None:
    """The head says how long the chain is."""
    entries = log(5)
    report = check(entries[:3], head=entries[-1]).report()
    assert report.first_bad == 4
    with pytest.raises(AuditChainError) as caught:
        report.raise_if_bad()
    assert caught.value.sequence == 4
    assert pickle.loads(pickle.dumps(caught.value)).sequence == 4  # noqa: S301 - our own bytes


def test_a_head_with_another_hash_is_found() -> None:
    """The head is compared, not only counted."""
    entries = log(3)
    assert check(entries, head=replace(entries[-1], hash=b"x" * 32)).report().first_bad == 3


def test_a_tail_cut_off_with_its_head_needs_a_checkpoint() -> None:
    """Without a checkpoint the shorter log is valid; with one it is not."""
    entries = log(5)
    assert check(entries[:3]).report().ok
    report = check(entries[:3], checkpoints=(signed(entries[4]),)).report()
    assert report.first_bad == 4 and "checkpoint" in str(report.problem)


def test_a_rewritten_log_needs_a_checkpoint() -> None:
    """A chain with all hashes recomputed is valid, but does not agree with a checkpoint."""
    entries, forged = log(5), []
    previous = GENESIS
    for entry in entries:
        forged.append(sealed(replace(entry, previous_hash=previous, actor_id="mallory")))
        previous = forged[-1].hash
    assert check(forged).report().ok
    assert check(forged, checkpoints=(signed(entries[3]),)).report().first_bad == 4


def test_checkpoints_that_agree_are_confirmed() -> None:
    """The report names them."""
    entries = log(5)
    report = check(entries, checkpoints=(signed(entries[1]), signed(entries[4]))).report()
    assert report.ok and report.confirmed == (2, 5)


def test_a_log_that_begins_late_needs_a_signed_cut() -> None:
    """Retention signs what it removes; nobody else can."""
    entries = log(6)
    assert check(entries[3:]).report().first_bad == 1
    report = check(entries[3:], cuts=(signed(entries[2], "cut"),)).report()
    assert report.ok and report.first == 4
    forged = replace(signed(entries[2], "cut"), signature=b"x" * 64)
    assert check(entries[3:], cuts=(forged,)).report().first_bad == 4


def test_a_checkpoint_cannot_stand_in_for_a_cut() -> None:
    """The signature covers the kind of statement."""
    entries = log(6)
    posing = replace(signed(entries[2]), kind="cut")
    assert check(entries[3:], cuts=(posing,)).report().first_bad == 4


def test_a_checkpoint_older_than_the_cut_says_nothing_any_more() -> None:
    """It is reported as removed, neither confirmed nor contradicted."""
    entries = log(6)
    report = check(entries[3:], cuts=(signed(entries[2], "cut"),), checkpoints=(signed(entries[0]),)).report()
    assert report.ok and (report.confirmed, report.removed) == ((), (1,))


def test_following_can_begin_at_a_checkpoint() -> None:
    """Earlier entries are not read again, except those of the same microsecond."""
    entries = log(6)
    report = check(entries[3:], since=signed(entries[3])).report()
    assert report.ok and (report.entries, report.first, report.last) == (2, 5, 6)
    assert check(entries[4:], since=replace(signed(entries[3]), hash=b"x" * 32)).report().first_bad == 5
    assert check([], head=entries[1], since=signed(entries[3])).report().first_bad == 3
    at_once = log(6, apart=timedelta(0))
    assert check(at_once, since=signed(at_once[3])).report().entries == 2


def test_following_from_a_checkpoint_does_not_pass_over_entries_with_an_older_number() -> None:
    """They would be shown among the newest, and not be verified."""
    entries = log(6)
    forged = sealed(replace(entries[1], occurred_at=entries[4].occurred_at, actor_id="mallory"))
    assert check([entries[3], forged, *entries[4:]], since=signed(entries[3])).report().first_bad == 2


def test_the_entry_that_following_begins_after_is_compared() -> None:
    """It is in the log, and its signed hash is known."""
    entries = log(6)
    rewritten = sealed(replace(entries[3], actor_id="mallory"))
    report = check([rewritten, *entries[4:]], since=signed(entries[3])).report()
    assert report.first_bad == 4 and "rewritten" in str(report.problem)


def test_checkpoints_are_compared_skipped_or_removed_and_never_silently_dropped() -> None:
    """Every given checkpoint is in one of the three lists."""
    entries = log(6)
    given = tuple(signed(entry) for entry in (entries[1], entries[3], entries[5]))
    report = check(entries[3:], since=signed(entries[3]), checkpoints=given).report()
    assert report.ok and (report.confirmed, report.skipped, report.removed) == ((4, 6), (2,), ())
    cut = signed(entries[3], "cut")
    report = check(entries[4:], cuts=(cut,), checkpoints=given).report()
    assert report.ok and (report.confirmed, report.skipped, report.removed) == ((4, 6), (), (2,))
    report = check([], head=entries[3], cuts=(cut,), checkpoints=given[:1]).report()
    assert report.ok and report.removed == (2,)


def test_a_checkpoint_of_the_entry_before_the_first_is_compared() -> None:
    """It has the cut's hash, or that of the checkpoint to begin from."""
    entries = log(6)
    other = replace(signed(entries[3]), hash=b"x" * 32)
    assert check(entries[4:], cuts=(signed(entries[3], "cut"),), checkpoints=(other,)).report().first_bad == 4
    assert check(entries[3:], since=signed(entries[3]), checkpoints=(other,)).report().first_bad == 4


def test_the_canonical_form_is_json_that_anyone_can_compute() -> None:
    """An auditor needs a JSON library and SHA-256."""
    entry = log(1)[0]
    assert json.loads(canonical(entry))[:4] == ["tenancy-audit-1", "00" * 32, 1, 1793534401000000]


@given(left=st.lists(st.text(max_size=5) | st.none(), min_size=4, max_size=4), right=st.integers(0, 2))
def test_moving_text_between_fields_changes_the_canonical_form(left: list[str | None], right: int) -> None:
    """No two entries share one, since fields are delimited."""
    names = ("actor_id", "slug", "request_id", "source")
    entry = replace(log(1)[0], **dict(zip(names, left, strict=True)))  # type: ignore[arg-type]
    moved = list(left)
    moved[right], moved[right + 1] = (moved[right] or "") + (moved[right + 1] or ""), ""
    other = replace(entry, **dict(zip(names, moved, strict=True)))  # type: ignore[arg-type]
    assert (canonical(entry) == canonical(other)) == (entry == other)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_survives_its_journey_as_json() -> None:
    """A checkpoint that is written and read again is equal."""
    checkpoint = signed(log(3)[2])
    again = Checkpoint.from_json(checkpoint.to_json())
    assert again == checkpoint
    SIGNER.verify(again)
    Verifier(SIGNER.public_keys).verify(again)


@pytest.mark.parametrize("name", ["sequence", "hash", "installation", "occurred_at", "signed_at", "kind", "key_id"])
def test_a_changed_checkpoint_is_refused(name: str) -> None:
    """The signature covers every field."""
    values = json.loads(signed(log(3)[2]).to_json())
    changed = {
        "sequence": 2,
        "hash": "11" * 32,
        "installation": str(UUID(int=8)),
        "occurred_at": "2026-11-01T00:00:00.000000+00:00",
        "signed_at": "2026-11-01T00:00:00.000000+00:00",
        "kind": "cut",
        "key_id": "1",
    }
    values[name] = changed[name]
    with pytest.raises(AuditError):
        SIGNER.verify(Checkpoint.from_json(json.dumps(values)))


def test_another_installations_signature_is_refused() -> None:
    """Its key is derived from another secret, whatever id it has."""
    checkpoint = signed(log(1)[0])
    with pytest.raises(AuditError, match="not valid"):
        Signer({"2": b"c" * 32}).verify(checkpoint)
    with pytest.raises(AuditError, match="not known"):
        Signer({"9": b"b" * 32}).verify(checkpoint)


def test_the_newest_key_signs_and_older_ones_still_verify() -> None:
    """Keys can be rotated."""
    old = Signer({"1": b"a" * 32}).sign(
        "checkpoint", installation=INSTALLATION, sequence=1, digest=GENESIS, occurred_at=START
    )
    SIGNER.verify(old)
    assert signed(log(1)[0]).key_id == "2"


NO_TIME = {"occurred_at": "0001-01-01T00:00:00+14:00"}


@pytest.mark.parametrize("change", [{"sequence": float("inf")}, NO_TIME], ids=["infinity", "year 0"])
def test_a_checkpoint_with_impossible_values_is_refused(change: dict[str, object]) -> None:
    """With the same error as for a text that is not a checkpoint."""
    values = {**json.loads(signed(log(1)[0]).to_json()), **change}
    with pytest.raises(AuditError, match="not a checkpoint"):
        Checkpoint.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "tenancy-audit-1", "kind": "other"}', "null", "1"])
def test_what_is_not_a_checkpoint_is_refused(text: str) -> None:
    """With an error of this package."""
    with pytest.raises(AuditError):
        Checkpoint.from_json(text)


def test_signing_needs_a_key_and_public_keys_must_be_keys() -> None:
    """Mistakes in the configuration are reported as such."""
    with pytest.raises(ConfigurationError):
        Signer({}).sign("checkpoint", installation=INSTALLATION, sequence=1, digest=GENESIS, occurred_at=START)
    for text in ("?", base64.b64encode(b"short").decode()):
        with pytest.raises(ConfigurationError):
            Verifier({"1": text})


# --- retired keys ---------------------------------------------------------------------------------------------------

OLD = Signer({"1": b"a" * 32})
NEW = Signer({"2": b"b" * 32})


def voucher(signer: Signer = NEW, of: Signer = OLD, *, installation: UUID = INSTALLATION) -> Voucher:
    """A voucher for the only key of ``of``."""
    [(key_id, public_key)] = of.public_keys.items()
    return signer.vouch(installation=installation, key_id=key_id, public_key=base64.b64decode(public_key))


def test_a_key_that_a_known_one_vouches_for_verifies() -> None:
    """Without it, a retired key's signature could not be distinguished from a forgery."""
    entry = log(1)[0]
    old = OLD.sign("cut", installation=INSTALLATION, sequence=1, digest=entry.hash, occurred_at=entry.occurred_at)
    with pytest.raises(AuditError, match="not known"):
        NEW.verify(old)
    NEW.including([voucher()]).verify(old)
    assert NEW.including([voucher()]).public_keys == {**OLD.public_keys, **NEW.public_keys}
    assert NEW.public_keys.keys() == {"2"}


def test_only_what_a_known_key_signed_vouches() -> None:
    """Not an unknown key's, not one that was changed, not one of a key that only vouches for itself."""
    stranger, posing = Signer({"9": b"c" * 32}), Signer({"2": b"c" * 32})
    forged = [
        voucher(stranger),
        voucher(posing),
        voucher(stranger, stranger),
        replace(voucher(), public_key=base64.b64decode(posing.public_keys["2"])),
        replace(voucher(), key_id="9"),
        replace(voucher(), installation=UUID(int=8)),
        replace(voucher(), public_key=b"short"),
    ]
    for one in forged:
        assert NEW.including([one]).public_keys == NEW.public_keys
    # nor can a voucher for a known key replace the key
    assert NEW.including([voucher(NEW, posing)]).public_keys == NEW.public_keys


def test_a_signer_that_is_renewed_signs_with_the_last_key_and_verifies_with_all() -> None:
    """A running process can get a new key."""
    signer = Signer({"1": b"a" * 32})
    signer.add_keys({"1": b"a" * 32, "2": b"b" * 32})
    assert signer.public_keys == SIGNER.public_keys
    checkpoint = signer.sign("cut", installation=INSTALLATION, sequence=1, digest=GENESIS, occurred_at=START)
    NEW.verify(checkpoint)


def test_a_signer_shows_no_key() -> None:
    """Not in its repr either."""
    assert repr(SIGNER) == "Signer(1, 2)"


def test_an_actor_has_a_known_kind() -> None:
    """The mistake is reported at once."""
    with pytest.raises(ValueError, match="robot"):
        Actor("robot")  # type: ignore[arg-type]
