"""The audit log on a real PostgreSQL: appending, reading, verifying, and its upkeep."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tenancy_orm.audit.actor import Actor, ActorKind
from tenancy_orm.audit.chain import canonical
from tenancy_orm.audit.checkpoints import Checkpoint, Signer, Verifier
from tenancy_orm.errors import AuditChainError, AuditError, ConfigurationError
from tenancy_orm.postgres.errors import sqlstate_of
from tests.support.audit import age
from tests.support.quotas import KEYS, QuotaPlane, quota_plane
from tests.support.waiting import HANGS


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[QuotaPlane]:
    async with quota_plane(control_url) as opened:
        yield opened


async def forge(plane: QuotaPlane, sequence: int, moment: str) -> None:
    """Insert a copy of the first entry, as the owner can: with another number, at another time."""
    await plane.sql(
        f"INSERT INTO tenancy.audit_log SELECT {sequence}, {moment}, action, tenant_id, slug, actor_kind, actor_id, "
        "before, after, detail, request_id, source, database_role, previous_hash, hash "
        "FROM tenancy.audit_log WHERE sequence = 1"
    )


# --- appending ------------------------------------------------------------------------------------------------------


async def test_an_entry_says_who_did_what_to_whom(plane: QuotaPlane) -> None:
    """An entry has all given values, and those that the database added."""
    tenant_id = uuid4()
    actor = Actor("operator", "ada", request_id="req-1", source="192.0.2.7")
    sequence = await plane.append(
        "tenant.update",
        tenant_id=tenant_id,
        slug="acme",
        actor=actor,
        before={"tier": "free"},
        after={"tier": "pro"},
        detail={"ticket": 7},
    )
    [event] = await plane.audit.events()
    assert event.sequence == sequence == 1
    assert (event.action, event.tenant_id, event.slug, event.actor) == ("tenant.update", tenant_id, "acme", actor)
    assert (event.before, event.after, event.detail) == ({"tier": "free"}, {"tier": "pro"}, {"ticket": 7})
    assert event.database_role == (await plane.sql("SELECT session_user"))[0][0]
    assert abs(event.occurred_at - datetime.now(UTC)) < timedelta(minutes=1)


async def test_an_entry_is_part_of_the_callers_transaction(plane: QuotaPlane) -> None:
    """The next entry gets the number of one that was rolled back."""
    async with plane.control.transaction() as connection:
        assert await plane.audit.append(connection, action="test.undone") == 1
        await connection.rollback()
    assert await plane.append() == 1
    assert (await plane.audit.verify()).ok


async def test_several_entries_of_one_transaction_follow_one_another(plane: QuotaPlane) -> None:
    """The head moves within it."""
    async with plane.control.transaction() as connection:
        numbers = [await plane.audit.append(connection, action="test.done") for _ in range(3)]
    assert numbers == [1, 2, 3]
    assert (await plane.audit.verify()).entries == 3


async def test_text_that_postgresql_cannot_keep_does_not_fail_the_change(plane: QuotaPlane) -> None:
    """A request id comes from outside: NUL, half a surrogate pair and a megabyte are made valid."""
    actor = Actor("key", "k", request_id="a\x00b" + "x" * 1_000_000, source="\ud800")
    await plane.append(actor=actor, after={"note\x00": ["\x00", "\ud800", {"deep": "\x00"}]})
    [event] = await plane.audit.events()
    assert event.actor.request_id is not None and event.actor.request_id.startswith("a\N{REPLACEMENT CHARACTER}bx")
    assert len(event.actor.request_id) == 256
    assert event.after == {
        "note\N{REPLACEMENT CHARACTER}": ["\N{REPLACEMENT CHARACTER}", "?", {"deep": "\N{REPLACEMENT CHARACTER}"}]
    }
    assert (await plane.audit.verify()).ok


class Colour(enum.StrEnum):
    """Any enum."""

    RED = "red"


async def test_times_ids_and_enums_are_written_as_text(plane: QuotaPlane) -> None:
    """Callers may pass datetimes, ids, sets and tuples."""
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    after = {"at": moment, "id": UUID(int=1), "colour": Colour.RED, "set": {"b", "a"}, "tuple": (1, None, True, 1.5)}
    await plane.append(after=after)
    [event] = await plane.audit.events()
    assert event.after == {
        "at": "2026-01-02T00:00:00+00:00",
        "id": str(UUID(int=1)),
        "colour": "red",
        "set": ["a", "b"],
        "tuple": [1, None, True, 1.5],
    }


@pytest.mark.parametrize("value", [b"secret", object(), float("nan")])
async def test_what_is_not_json_is_refused(plane: QuotaPlane, value: Any) -> None:
    """Bytes in particular: they are likely a secret. Nothing is appended."""
    with pytest.raises((TypeError, ValueError)):
        await plane.append(after={"value": value})
    assert await plane.audit.events() == []


async def test_an_action_must_be_a_name(plane: QuotaPlane) -> None:
    """The database refuses another text, and the chain continues."""
    with pytest.raises(DBAPIError) as caught:
        await plane.append("Not A Name")
    assert sqlstate_of(caught.value) == "23514"
    assert await plane.append() == 1


async def test_time_never_runs_backwards_along_the_chain(plane: QuotaPlane) -> None:
    """A clock that was set back does not put an entry before its predecessor."""
    await plane.append()
    await plane.sql("UPDATE tenancy.audit_head SET occurred_at = now() + interval '1 hour'")
    await plane.append()
    first, second = reversed(await plane.audit.events())
    assert second.occurred_at - first.occurred_at >= timedelta(minutes=59)


# --- reading --------------------------------------------------------------------------------------------------------


async def test_events_are_found_by_tenant_actor_action_and_time(plane: QuotaPlane) -> None:
    """Filters combine, and the newest comes first."""
    acme, globex = await plane.tenant("acme"), await plane.tenant("globex")
    ada, key = Actor("operator", "ada"), Actor("key", "k1")
    for actor in (ada, key):
        await plane.append("key.rotate", tenant_id=acme.id, slug="acme", actor=actor)
    between = (await plane.sql("SELECT clock_timestamp()"))[0][0]
    await plane.append("key.revoke", tenant_id=globex.id, slug="globex", actor=ada)

    async def found(**filters: Any) -> list[tuple[str, str | None]]:
        return [(event.action, event.slug) for event in await plane.audit.events(**filters)]

    assert await found(actor=ada) == [("key.revoke", "globex"), ("key.rotate", "acme")]
    assert await found(actor="k1") == await found(actor=key) == [("key.rotate", "acme")]
    assert await found(actor=Actor("operator"), tenant="acme") == [("key.rotate", "acme")]
    for tenant in (globex, globex.id, "globex"):
        assert (await plane.audit.events(tenant=tenant))[0].action == "key.revoke"
    assert await found(action="key.revoke") == await found(since=between) == [("key.revoke", "globex")]
    assert await found(action=["key.revoke", "key.rotate"], tenant=acme) == [("key.rotate", "acme")] * 2
    assert len(await found(action="key.")) == 3
    assert len(await found(action=["tenant."], until=between)) == 4
    assert await found(tenant="nobody") == []


async def test_a_slug_that_was_given_up_still_finds_its_entries(plane: QuotaPlane) -> None:
    """A creation that failed leaves nothing but its entries."""
    await plane.append("tenant.create_failed", tenant_id=uuid4(), slug="ghost")
    assert len(await plane.audit.events(tenant="ghost")) == 1


async def test_pages_continue_where_the_last_one_ended(plane: QuotaPlane) -> None:
    """By the entry or by its number, without gaps or repetitions."""
    for _ in range(7):
        await plane.append()
    numbers: list[int] = []
    after: Any = None
    while page := await plane.audit.events(limit=3, after=after):
        numbers += [event.sequence for event in page]
        after = page[-1] if len(numbers) < 4 else page[-1].sequence
    assert numbers == [7, 6, 5, 4, 3, 2, 1]


async def test_queries_use_an_index_and_the_newest_month_alone(plane: QuotaPlane) -> None:
    """With or without a filter, no plan sorts or reads the whole log."""
    await plane.sql(
        "INSERT INTO tenancy.audit_log (sequence, occurred_at, action, tenant_id, actor_kind, database_role, "
        "previous_hash, hash) SELECT n, now() + make_interval(secs => n / 1000.0), 'test.bulk', gen_random_uuid(), "
        "'system', 'x', sha256(''), sha256('') FROM generate_series(1, 20000) n"
    )
    await plane.sql("ANALYZE tenancy.audit_log")
    month = (await partitions(plane))[0]
    for condition in (
        "true",
        f"tenant_id = '{uuid4()}'",
        "actor_kind = 'operator' AND actor_id = 'ada'",
        "actor_kind = ANY(ARRAY['system', 'operator', 'key']) AND actor_id = 'ada'",
        "slug = 'acme'",
        "action = 'test.other'",
    ):
        rows = await plane.sql(
            "EXPLAIN (COSTS OFF) SELECT * FROM tenancy.audit_log "
            f"WHERE {condition} ORDER BY occurred_at DESC, sequence DESC LIMIT 10"
        )
        plan = "\n".join(row[0] for row in rows)
        # PostgreSQL reads the empty coming months in full; without a filter nothing may be sorted
        assert f"Seq Scan on {month}" not in plan, plan
        assert condition != "true" or "Sort" not in plan, plan


async def test_the_summary_counts_by_day_and_action(plane: QuotaPlane) -> None:
    """It reads the view that operators can read too."""
    tenant_id = uuid4()
    for _ in range(2):
        await plane.append("key.issue", tenant_id=tenant_id)
    await plane.append("key.revoke", actor=Actor("operator", "ada"))
    today = (await plane.sql("SELECT (now() AT TIME ZONE 'UTC')::date"))[0][0]
    summary = await plane.audit.summary(since=today)
    assert [(row.action, row.actor_kind, row.entries, row.tenants) for row in summary] == [
        ("key.issue", "system", 2, 1),
        ("key.revoke", "operator", 1, 0),
    ]
    assert await plane.audit.summary(until=today) == []


async def test_every_kind_of_actor_can_be_entered(plane: QuotaPlane) -> None:
    """In partitions that were made before the log took credentials other than keys, and in those made later."""
    await plane.sql("SELECT tenancy.audit_ensure_partitions(9)")
    kinds = get_args(ActorKind)
    for kind in kinds:
        await plane.append(actor=Actor(kind, "somebody"))
    assert [entry.actor.kind for entry in reversed(await plane.audit.events(limit=len(kinds)))] == list(kinds)
    checks = await plane.sql(
        "SELECT DISTINCT pg_get_expr(c.conbin, c.conrelid) FROM pg_constraint c JOIN pg_class t ON t.oid = c.conrelid "
        "WHERE c.conname = 'audit_log_actor_kind_check' AND (t.relkind = 'p' OR t.relispartition)"
    )
    assert len(checks) == 1 and all(f"'{kind}'" in checks[0][0] for kind in kinds)
    with pytest.raises(DBAPIError, match="audit_log_actor_kind_check"):
        await plane.sql("SELECT tenancy.audit_append('a', NULL, NULL, 'x', NULL, NULL, NULL, NULL, NULL, NULL)")
    assert (await plane.audit.verify()).ok


# --- verifying ------------------------------------------------------------------------------------------------------


async def test_python_and_the_database_hash_the_same(plane: QuotaPlane) -> None:
    """For every kind of content, Python and SQL compute the same canonical text."""
    await plane.append(
        tenant_id=uuid4(),
        slug="acme",
        actor=Actor("key", 'q"\\\n\t\x01\x7f', request_id="ü\u2028😀", source="::1"),
        before={"numbers": [0, -1, 1.5, 1e20, 1e-7, 10**30], "text": "\x01\u2028😀"},
        after={"bb": 1, "a": {"nested": [None, True, {}]}},
    )
    await plane.append()
    rows = await plane.sql(
        "SELECT tenancy.audit_canonical(l) AS text, sequence, occurred_at, action, tenant_id, slug, actor_kind, "
        "actor_id, before::text AS before, after::text AS after, detail::text AS detail, request_id, source, "
        "database_role, previous_hash FROM tenancy.audit_log l"
    )
    assert [canonical(row).decode() for row in rows] == [row.text for row in rows]
    assert (await plane.audit.verify()).ok


async def test_verification_streams_a_long_log(plane: QuotaPlane) -> None:
    """More entries than one batch."""
    async with plane.control.transaction() as connection:
        for number in range(1_203):
            await plane.audit.append(connection, action="test.done", after={"n": number})
    report = await plane.audit.verify()
    assert (report.entries, report.first, report.last, report.ok) == (1_203, 1, 1_203, True)


async def test_verification_is_not_disturbed_by_appends(plane: QuotaPlane) -> None:
    """It reads the head and the entries in one snapshot."""
    async with plane.control.transaction() as connection:
        for _ in range(1_000):
            await plane.audit.append(connection, action="test.done")
    stop = asyncio.Event()

    async def keep_appending() -> None:
        while not stop.is_set():
            await plane.append()

    task = asyncio.create_task(keep_appending())
    try:
        for _ in range(5):
            assert (await plane.audit.verify()).ok
    finally:
        stop.set()
        await task


async def test_a_checkpoint_verifies_later_with_the_public_key_alone(plane: QuotaPlane) -> None:
    """Exported as JSON, kept elsewhere, read back, confirmed; and the next run may begin there."""
    with pytest.raises(AuditError, match="empty"):
        await plane.audit.export_checkpoint()
    await plane.append()
    kept = (await plane.audit.export_checkpoint()).to_json()
    await plane.append()
    await plane.append()
    checkpoint = Checkpoint.from_json(kept)
    auditor = Verifier(Signer(KEYS).public_keys)
    report = await plane.audit.verify(checkpoint, verifier=auditor)
    assert report.ok and report.confirmed == (1,)
    with pytest.raises(AuditError, match="not known"):
        await plane.audit.verify(checkpoint, verifier=Verifier({}))
    later = await plane.audit.verify(since=checkpoint, verifier=auditor)
    assert (later.ok, later.entries, later.first, later.last) == (True, 2, 2, 3)


async def test_a_checkpoint_of_somebody_else_is_refused(plane: QuotaPlane) -> None:
    """Another installation's checkpoint, or one with an invalid signature, is refused."""
    await plane.append()
    checkpoint = await plane.audit.export_checkpoint()
    with pytest.raises(AuditError, match="installation"):
        await plane.audit.verify(replace(checkpoint, installation=uuid4()))
    for options in ({"checkpoints": replace(checkpoint, sequence=7)}, {"since": replace(checkpoint, hash=b"x" * 32)}):
        with pytest.raises(AuditError, match="not valid"):
            await plane.audit.verify(**options)  # type: ignore[arg-type]
    with pytest.raises(AuditError, match="installation"):
        await plane.audit.verify(since=replace(checkpoint, installation=uuid4()))
    async with quota_plane(plane.config.control_url, initialise=False, keys={}) as keyless:
        with pytest.raises(ConfigurationError):
            await keyless.audit.export_checkpoint()


async def test_a_forged_entry_of_an_old_number_is_found_from_a_checkpoint_too(plane: QuotaPlane) -> None:
    """It is dated after the checkpoint, so that ``events`` shows it among the newest."""
    for _ in range(3):
        await plane.append()
    checkpoint = await plane.audit.export_checkpoint()
    await forge(plane, 2, "clock_timestamp()")
    await plane.append()
    report = await plane.audit.verify(since=checkpoint)
    assert report.first_bad == 2


@pytest.mark.parametrize(
    ("bounds", "moment"), [("(MINVALUE) TO ('0001-01-02')", "0001-01-01"), ("('9999-12-31') TO (MAXVALUE)", "infinity")]
)
async def test_entries_at_impossible_times_are_found(plane: QuotaPlane, bounds: str, moment: str) -> None:
    """``events`` would show them, in a partition that the owner made."""
    await plane.append()
    # neither a name without a month nor a month without an end stops housekeeping
    name = "audit_log_far" if moment == "infinity" else "audit_log_y9999m12"
    await plane.sql(f"CREATE TABLE tenancy.{name} PARTITION OF tenancy.audit_log FOR VALUES FROM {bounds}")
    await forge(plane, 77, f"'{moment}'")
    report = await plane.audit.verify()
    assert report.first_bad == 77 and "years" in str(report.problem)
    with pytest.raises(AuditError, match="not created by this package"):
        await plane.audit.prune(before=datetime(2025, 1, 1, tzinfo=UTC))


async def test_a_head_that_is_gone_is_reported(plane: QuotaPlane) -> None:
    """It is reported as a problem, not raised as an error."""
    await plane.append()
    await plane.sql("ALTER TABLE tenancy.audit_head DISABLE TRIGGER ALL")
    await plane.sql("DELETE FROM tenancy.audit_head")
    report = await plane.audit.verify()
    assert report.first_bad == 2 and "head" in str(report.problem)


# --- keys that are retired ------------------------------------------------------------------------------------------

BOTH: Mapping[str, bytes] = {**KEYS, "2": b"l" * 32}
NEXT: Mapping[str, bytes] = {"2": b"l" * 32, "3": b"m" * 32}


@asynccontextmanager
async def with_keys(plane: QuotaPlane, keys: Mapping[str, bytes]) -> AsyncIterator[QuotaPlane]:
    """Another process, which is configured with these keys."""
    async with quota_plane(plane.config.control_url, initialise=False, keys=keys) as other:
        await other.audit.vouch_for_keys()
        yield other


async def cut_and_checkpoint(plane: QuotaPlane) -> Checkpoint:
    """Make a log of three months, cut off the first under the plane's key, and sign a checkpoint with it."""
    for month in (1, 2, 3):
        await age(plane.control, plane.audit, datetime(2024, month, 15, tzinfo=UTC), 2)
    assert await plane.audit.prune(before=datetime(2024, 2, 1, tzinfo=UTC)) is not None
    return await plane.audit.export_checkpoint()


async def test_what_a_retired_key_signed_still_verifies(plane: QuotaPlane) -> None:
    """Both keys were configured for a while, as docs/secrets.md says; also after two retirements."""
    checkpoint = await cut_and_checkpoint(plane)
    async with with_keys(plane, BOTH):
        pass
    async with with_keys(plane, {"2": BOTH["2"]}) as second:
        assert (await second.audit.verifier()).public_keys == Signer(BOTH).public_keys
        report = await second.audit.verify(checkpoint)
        assert report.ok and report.confirmed == (7,)
        assert (await second.audit.verify(since=checkpoint)).ok
    async with with_keys(plane, NEXT):
        pass
    async with with_keys(plane, {"3": NEXT["3"]}) as third:
        report = await third.audit.verify(checkpoint)
        assert report.ok and report.confirmed == (7,)
        cut = await third.audit.prune(before=datetime(2024, 3, 1, tzinfo=UTC))
        assert cut is not None and cut.key_id == "3"
        assert (await third.audit.verify(checkpoint)).ok


async def test_a_key_that_nobody_vouched_for_needs_its_public_key(plane: QuotaPlane) -> None:
    """The key was replaced at once: the error says what to do, and the next cut is signed with the new key."""
    checkpoint = await cut_and_checkpoint(plane)
    async with with_keys(plane, {"2": BOTH["2"]}) as second:
        report = await second.audit.verify()
        assert report.first_bad == 3 and "give a Verifier" in str(report.problem)
        with pytest.raises(AuditChainError, match="not known; give a Verifier"):
            await second.audit.prune(before=datetime(2024, 3, 1, tzinfo=UTC))
        kept = Verifier({**plane.audit.public_keys, **second.audit.public_keys})
        assert (await second.audit.verify(checkpoint, verifier=kept)).ok
        assert await second.audit.prune(before=datetime(2024, 3, 1, tzinfo=UTC), verifier=kept) is not None
        assert (await second.audit.verify()).ok


async def test_keeping_public_keys_writes_each_once(plane: QuotaPlane) -> None:
    """With one key there is nothing to do; concurrent processes do not collide."""
    rows = "SELECT key_id, signed_by FROM tenancy.audit_keys ORDER BY created_at"
    await plane.audit.vouch_for_keys()
    assert await plane.sql(rows) == []
    async with with_keys(plane, BOTH) as one, with_keys(plane, BOTH) as other:
        await asyncio.gather(*(p.audit.vouch_for_keys() for p in (one, other) * 3))
        assert await plane.sql(rows) == [("1", "2")]
        # the key in use vouches for the new key before that is the last one
        async with with_keys(plane, {"2": BOTH["2"], "1": KEYS["1"]}):
            assert await plane.sql(rows) == [("1", "2"), ("2", "1")]


async def test_a_process_that_learns_of_a_key_signs_with_it_and_keeps_the_old_one(plane: QuotaPlane) -> None:
    """As when a data key is created."""
    await plane.append()
    before = await plane.audit.export_checkpoint()
    await plane.audit.add_keys(BOTH)
    after = await plane.audit.export_checkpoint()
    assert (before.key_id, after.key_id) == ("1", "2")
    async with with_keys(plane, {"2": BOTH["2"]}) as fresh:
        assert (await fresh.audit.verify([before, after])).confirmed == (1,)


# --- upkeep ---------------------------------------------------------------------------------------------------------


async def partitions(plane: QuotaPlane) -> list[str]:
    """The names of the log's partitions."""
    rows = await plane.sql(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
        "WHERE i.inhparent = 'tenancy.audit_log'::regclass ORDER BY 1"
    )
    return [row[0] for row in rows]


async def test_partitions_are_made_ahead(plane: QuotaPlane) -> None:
    """This month and three more from the start; more on request, and none twice."""
    assert len(await partitions(plane)) == 4
    assert await plane.audit.ensure_partitions(5) == 2
    assert await plane.audit.ensure_partitions(5) == 0
    with pytest.raises(DBAPIError):
        await plane.audit.ensure_partitions(121)


async def test_appending_makes_a_missing_partition(plane: QuotaPlane) -> None:
    """Without housekeeping, appends create the partitions, months and years later."""
    for moment in (datetime(2031, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(2032, 1, 1, tzinfo=UTC)):
        await age(plane.control, plane.audit, moment, 2)
    names = await partitions(plane)
    assert {"audit_log_y2031m12", "audit_log_y2032m01"} <= set(names)
    assert (await plane.audit.verify()).entries == 4


async def test_making_partitions_does_not_lock_out_readers(plane: QuotaPlane) -> None:
    """A long report on the log does not wait for the next month's partition, nor the partition for it."""
    async with plane.control.transaction() as reader:
        await reader.execute(text("SELECT count(*) FROM tenancy.audit_log"))
        async with asyncio.timeout(HANGS):
            assert await plane.audit.ensure_partitions(6) == 3


async def test_retention_removes_whole_months_and_the_rest_still_verifies(plane: QuotaPlane) -> None:
    """From a signed cut, which is itself an entry."""
    await age(plane.control, plane.audit, datetime(2024, 1, 15, tzinfo=UTC), 3)
    early = await plane.audit.export_checkpoint()
    await age(plane.control, plane.audit, datetime(2024, 3, 15, tzinfo=UTC), 2)
    await plane.append()
    cut = await plane.audit.prune(before=datetime(2024, 3, 31, tzinfo=UTC), actor=Actor("operator", "ada"))
    assert cut is not None and (cut.sequence, cut.kind) == (3, "cut")
    assert "audit_log_y2024m01" not in await partitions(plane)
    newest = (await plane.audit.events(limit=1))[0]
    assert (newest.action, newest.actor.id) == ("audit.cut", "ada")
    assert newest.detail is not None and newest.detail["sequence"] == 3
    report = await plane.audit.verify(early)
    assert report.ok and (report.first, report.entries, report.confirmed) == (4, 4, (3,))
    assert await plane.audit.prune(before=datetime(2024, 3, 31, tzinfo=UTC)) is None
    assert await plane.audit.prune(before=datetime(2024, 4, 1, tzinfo=UTC), detach=True) is not None
    assert (await plane.sql("SELECT count(*) FROM tenancy.audit_log_y2024m03"))[0][0] == 2
    report = await plane.audit.verify(early)
    assert report.ok and (report.first, report.confirmed, report.removed) == (6, (), (3,))


async def test_retention_keeps_what_does_not_verify(plane: QuotaPlane) -> None:
    """It is evidence."""
    await age(plane.control, plane.audit, datetime(2024, 1, 15, tzinfo=UTC), 3)
    await plane.sql("ALTER TABLE tenancy.audit_log_y2024m01 DISABLE TRIGGER ALL")
    await plane.sql("UPDATE tenancy.audit_log_y2024m01 SET actor_id = 'mallory' WHERE sequence = 2")
    with pytest.raises(AuditChainError) as caught:
        await plane.audit.prune(before=datetime(2025, 1, 1, tzinfo=UTC))
    assert caught.value.sequence == 2
    assert "audit_log_y2024m01" in await partitions(plane)


@pytest.mark.parametrize(
    ("lost", "bad", "followed"),
    [("sequence > 3", 4, True), ("sequence > 3", 4, False), ("true", 1, True), ("true", 1, False)],
    ids=["last entries", "last entries of the log", "all entries", "all entries of the log"],
)
async def test_retention_keeps_months_whose_last_entries_are_gone(
    plane: QuotaPlane, lost: str, bad: int, followed: bool
) -> None:
    """The next entry, or else the head, shows that they are missing."""
    await age(plane.control, plane.audit, datetime(2024, 1, 15, tzinfo=UTC), 5)
    if followed:
        await age(plane.control, plane.audit, datetime(2024, 2, 15, tzinfo=UTC), 2)
    await plane.sql("ALTER TABLE tenancy.audit_log_y2024m01 DISABLE TRIGGER ALL")
    await plane.sql(f"DELETE FROM tenancy.audit_log_y2024m01 WHERE {lost}")
    with pytest.raises(AuditChainError) as caught:
        await plane.audit.prune(before=datetime(2024, 2, 10, tzinfo=UTC))
    assert caught.value.sequence == bad
    assert "audit_log_y2024m01" in await partitions(plane)


async def test_retention_never_removes_the_current_month(plane: QuotaPlane) -> None:
    """By the database's clock, whatever the argument: the next entry, such as the cut's, needs its partition."""
    await age(plane.control, plane.audit, datetime(2024, 1, 15, tzinfo=UTC), 1)
    await plane.append()
    current = (await plane.sql("SELECT to_char(now() AT TIME ZONE 'UTC', '\"audit_log_y\"YYYY\"m\"MM')"))[0][0]
    cut = await plane.audit.prune(before=datetime(9999, 1, 1, tzinfo=UTC))
    assert cut is not None and cut.sequence == 1
    assert (await partitions(plane))[0] == current
    assert await plane.audit.prune(before=datetime(9999, 1, 1, tzinfo=UTC)) is None
    await plane.append()
    assert (await plane.audit.verify()).entries == 3


async def test_retention_waits_for_an_entry_on_its_way_and_does_not_lose_it(plane: QuotaPlane) -> None:
    """It was added after the month was verified. The month stays, and is removed the next time."""
    await age(plane.control, plane.audit, datetime(2024, 1, 15, tzinfo=UTC), 2)
    source = (await plane.sql("SELECT pg_get_functiondef('tenancy.audit_append'::regproc)"))[0][0]
    late = source.replace("clock_timestamp()", "timestamptz '2024-01-31'").replace("audit_append", "append_late")
    await plane.sql(late.replace(":", "\\:"))
    append = "SELECT tenancy.append_late('test.late', NULL, NULL, 'system', NULL, NULL, NULL, NULL, NULL, NULL)"
    async with plane.holding(append):
        pruning = asyncio.create_task(plane.audit.prune(before=datetime(2024, 2, 1, tzinfo=UTC), lock_timeout=60))
        await plane.waiting(pruning)
    with pytest.raises(AuditError, match="changed since"):
        await pruning
    assert (await plane.audit.verify()).entries == 3
    cut = await plane.audit.prune(before=datetime(2024, 2, 1, tzinfo=UTC))
    assert cut is not None and cut.sequence == 3


async def test_two_that_remove_old_months_at_once_remove_them_once(plane: QuotaPlane) -> None:
    """Both have verified them when the first one removes them; the other finds nothing left."""
    await age(plane.control, plane.audit, datetime(2024, 1, 15, tzinfo=UTC), 2)
    async with plane.holding("SELECT 1 FROM tenancy.audit_head FOR UPDATE"):
        prunings = [
            asyncio.create_task(plane.audit.prune(before=datetime(2024, 2, 1, tzinfo=UTC), lock_timeout=60))
            for _ in range(2)
        ]
        await plane.waiting(*prunings)
    cuts = await asyncio.gather(*prunings)
    assert sorted(cut.sequence for cut in cuts if cut) == [2] and None in cuts
    assert (await plane.audit.verify()).ok


async def test_retention_that_waits_for_readers_does_not_hold_up_those_who_append(plane: QuotaPlane) -> None:
    """A report that runs for hours must not block appends for as long as retention tries."""
    await age(plane.control, plane.audit, datetime(2024, 1, 15, tzinfo=UTC), 2)
    async with plane.holding("SELECT count(*) FROM tenancy.audit_log"):
        pruning = asyncio.create_task(plane.audit.prune(before=datetime(2024, 2, 1, tzinfo=UTC), lock_timeout=60))
        for sequence in (3, 4):
            await plane.waiting(pruning)
            async with asyncio.timeout(HANGS):
                assert await plane.append() == sequence
        assert not pruning.done()
    assert await pruning is not None
    assert (await plane.audit.verify()).entries == 3


async def test_retention_gives_way_to_a_reader_that_appends(plane: QuotaPlane) -> None:
    """Each would wait for the other: retention releases the chain's head, and tries again."""
    await age(plane.control, plane.audit, datetime(2024, 1, 15, tzinfo=UTC), 2)
    async with plane.holding("SELECT count(*) FROM tenancy.audit_log") as reader:
        pruning = asyncio.create_task(plane.audit.prune(before=datetime(2024, 2, 1, tzinfo=UTC), lock_timeout=60))
        await plane.waiting(pruning)
        assert await plane.audit.append(reader, action="test.report") == 3
    cut = await pruning
    assert cut is not None and cut.sequence == 2
    assert (await plane.audit.verify()).entries == 2


async def test_a_deadlock_with_retention_is_tried_again_and_then_said_in_words(
    plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If PostgreSQL detects the deadlock before the lock's timeout ends."""
    await age(plane.control, plane.audit, datetime(2024, 1, 15, tzinfo=UTC), 2)
    cut, tries = plane.audit._retention._remove, 0

    async def aborted_once(*arguments: Any) -> Checkpoint | None:
        nonlocal tries
        tries += 1
        if tries in (1, 2):
            await plane.sql("DO $$BEGIN RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01'; END$$")
        return await cut(*arguments)

    monkeypatch.setattr(plane.audit._retention, "_remove", aborted_once)
    with pytest.raises(AuditError, match="waits to append"):
        await plane.audit.prune(before=datetime(2024, 2, 1, tzinfo=UTC), lock_timeout=0)
    assert await plane.audit.prune(before=datetime(2024, 2, 1, tzinfo=UTC), lock_timeout=60) is not None
    assert tries == 3


async def test_retention_waits_for_readers_only_so_long(plane: QuotaPlane) -> None:
    """A report that runs for hours makes it fail rather than hang; nothing is removed."""
    await age(plane.control, plane.audit, datetime(2024, 1, 15, tzinfo=UTC), 1)
    async with plane.control.transaction() as reader:
        await reader.execute(text("SELECT count(*) FROM tenancy.audit_log"))
        with pytest.raises(AuditError, match="too long"):
            await plane.audit.prune(before=datetime(2025, 1, 1, tzinfo=UTC), lock_timeout=0.1)
    assert (await plane.audit.verify()).ok
