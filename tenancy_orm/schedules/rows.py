"""The statements of schedules."""

from __future__ import annotations

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP
from sqlalchemy.types import Text, Uuid

# The moment, and the time zones that tenants are in.
SEEN = text(
    "INSERT INTO tenancy.schedules AS s (name, first_seen_at) "
    "VALUES (:name, COALESCE(CAST(:now AS timestamptz), now()) - CAST(:margin AS interval)) "
    "ON CONFLICT (name) DO UPDATE SET seen_at = now() "
    "RETURNING s.first_seen_at, COALESCE(CAST(:now AS timestamptz), now()) AS now"
)
ZONES = text(
    "SELECT DISTINCT COALESCE(NULLIF(metadata ->> CAST(:key AS text), ''), timezone) AS zone FROM tenancy.tenants "
    "WHERE status = ANY(:status)"
).bindparams(bindparam("status", type_=ARRAY(Text)))

# A tenant's own delay is a digest of its id, the same whoever computes it. Of several times that it has missed the last
# one is due. Those that were begun least often come first, so that one that fails every time keeps nobody waiting.
CLAIM = text("""
WITH times AS (
    SELECT * FROM unnest(:zones, :moments) AS x (zone, moment)
), due AS (
    SELECT t.id, max(d.due_at) AS due_at
    FROM tenancy.tenants AS t
    JOIN times AS x ON x.zone = COALESCE(NULLIF(t.metadata ->> CAST(:key AS text), ''), t.timezone)
    CROSS JOIN LATERAL (
        SELECT x.moment + CASE WHEN :spread = 0 THEN interval '0' ELSE interval '1 ms' * (
            ('x' || left(encode(sha256(convert_to(:name || ' ' || t.id::text, 'UTF8')), 'hex'), 8))::bit(32)::bigint
            % :spread
        ) END AS due_at
    ) AS d
    WHERE t.status = ANY(:status) AND (:tier IS NULL OR t.tier = ANY(:tier))
      AND d.due_at <= :now AND d.due_at > :oldest AND d.due_at >= t.created_at
    GROUP BY t.id
), waiting AS (
    SELECT due.id, due.due_at
    FROM due LEFT JOIN tenancy.schedule_runs AS r ON r.schedule = :name AND r.tenant_id = due.id
    WHERE (r.sent_for IS NULL OR r.sent_for < due.due_at)
      AND (r.claimed_until IS NULL OR r.claimed_until <= clock_timestamp())
    ORDER BY COALESCE(r.attempts, 0), due.due_at, due.id
    LIMIT :batch
), claimed AS (
    INSERT INTO tenancy.schedule_runs AS r (schedule, tenant_id, claimed_for, claimed_until, claim)
    SELECT :name, id, due_at, clock_timestamp() + CAST(:retry_after AS interval), :claim FROM waiting ORDER BY id
    ON CONFLICT (schedule, tenant_id) DO UPDATE SET
        claimed_for = excluded.claimed_for, claimed_until = excluded.claimed_until, claim = excluded.claim
    WHERE (r.sent_for IS NULL OR r.sent_for < excluded.claimed_for)
      AND (r.claimed_until IS NULL OR r.claimed_until <= clock_timestamp())
    RETURNING r.tenant_id, r.claimed_for, r.attempts
)
SELECT c.tenant_id, c.claimed_for, (SELECT count(*) FROM waiting) AS waiting
FROM (SELECT 1) AS one LEFT JOIN claimed AS c ON true
ORDER BY c.attempts, c.claimed_for, c.tenant_id
""").bindparams(
    bindparam("zones", type_=ARRAY(Text)),
    bindparam("moments", type_=ARRAY(TIMESTAMP(timezone=True))),
    bindparam("status", type_=ARRAY(Text)),
    bindparam("tier", type_=ARRAY(Text)),
    bindparam("name", type_=Text),
    bindparam("claim", type_=Uuid),
)

# Nothing where the claim has run out and another process has it.
BEGIN = text(
    "UPDATE tenancy.schedule_runs SET attempts = attempts + 1, "
    "claimed_until = clock_timestamp() + CAST(:retry_after AS interval) "
    "WHERE schedule = :name AND tenant_id = :tenant AND claim = :claim RETURNING claimed_for"
).bindparams(bindparam("claim", type_=Uuid), bindparam("tenant", type_=Uuid))
# The claim of a later time stays: another process took it when this one was slow.
SENT = text("""
UPDATE tenancy.schedule_runs SET
    sent_for = :due_at, sent_at = now(),
    claimed_for = CASE WHEN claimed_for > :due_at THEN claimed_for END,
    claimed_until = CASE WHEN claimed_for > :due_at THEN claimed_until END,
    claim = CASE WHEN claimed_for > :due_at THEN claim END,
    attempts = CASE WHEN claimed_for > :due_at THEN attempts ELSE 0 END
WHERE schedule = :name AND tenant_id = :tenant AND (sent_for IS NULL OR sent_for < :due_at)
""").bindparams(bindparam("due_at", type_=TIMESTAMP(timezone=True)), bindparam("tenant", type_=Uuid))
LIST = text(
    "SELECT s.name, s.first_seen_at, s.seen_at, count(r.sent_for) AS sent, max(r.sent_at) AS last_sent_at, "
    "count(*) FILTER (WHERE r.claim IS NOT NULL) AS unfinished "
    "FROM tenancy.schedules AS s LEFT JOIN tenancy.schedule_runs AS r ON r.schedule = s.name "
    "GROUP BY s.name ORDER BY s.name"
)
FORGET = text("DELETE FROM tenancy.schedules WHERE name = :name")

__all__ = ["BEGIN", "CLAIM", "FORGET", "LIST", "SEEN", "SENT", "ZONES"]
