"""The statements of jobs. All times are by the control database's clock."""

from __future__ import annotations

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.types import Text, Uuid

_NAMES = bindparam("names", type_=ARRAY(Text))
_CLAIM = bindparam("claim", type_=Uuid)

ENSURE = text(
    "INSERT INTO tenancy.jobs (name, due_at) "
    "SELECT name, COALESCE(:due_at, clock_timestamp()) FROM unnest(:names) AS name ORDER BY name "
    "ON CONFLICT (name) DO NOTHING"
).bindparams(_NAMES, bindparam("due_at", type_=TIMESTAMP(timezone=True)))

# A row that another process is about to claim is locked, and skipped. ``before`` is who had it and did not finish it.
CLAIM = text("""
WITH found AS (
    SELECT name, claim, host, pid FROM tenancy.jobs
    WHERE name = ANY(:names) AND due_at <= clock_timestamp()
      AND (claimed_until IS NULL OR claimed_until <= clock_timestamp())
    ORDER BY due_at, name LIMIT :limit FOR UPDATE SKIP LOCKED
)
UPDATE tenancy.jobs AS j SET
    claim = :claim, host = :host, pid = :pid, started_at = clock_timestamp(), ended_at = NULL,
    claimed_until = clock_timestamp() + make_interval(secs => :seconds)
FROM found WHERE j.name = found.name
RETURNING j.name, j.failures, found.claim IS NOT NULL AS was_claimed, found.host AS before_host, found.pid AS before_pid
""").bindparams(_NAMES, _CLAIM)

# Nothing where the claim has run out and another process has it.
RENEW = text(
    "UPDATE tenancy.jobs SET claimed_until = clock_timestamp() + make_interval(secs => :seconds) "
    "WHERE name = :name AND claim = :claim"
).bindparams(_CLAIM)
FINISH = text(
    "UPDATE tenancy.jobs SET claim = NULL, claimed_until = NULL, ended_at = clock_timestamp(), "
    "due_at = clock_timestamp() + make_interval(secs => :after), error = :error, result = :result, "
    "failures = CASE WHEN :error IS NULL THEN 0 ELSE failures + 1 END "
    "WHERE name = :name AND claim = :claim"
).bindparams(_CLAIM, bindparam("error", type_=Text), bindparam("result", type_=JSONB(none_as_null=True)))
RELEASE = text(
    "UPDATE tenancy.jobs SET claim = NULL, claimed_until = NULL, ended_at = clock_timestamp(), "
    "due_at = clock_timestamp() WHERE name = :name AND claim = :claim"
).bindparams(_CLAIM)

HASTEN = text("UPDATE tenancy.jobs SET due_at = LEAST(due_at, clock_timestamp()) WHERE name = :name RETURNING due_at")
WAIT = text(
    "SELECT EXTRACT(EPOCH FROM min(GREATEST(due_at, COALESCE(claimed_until, due_at))) - clock_timestamp())::float8 "
    "FROM tenancy.jobs WHERE name = ANY(:names)"
).bindparams(_NAMES)
LIST = text(
    "SELECT name, due_at, claim IS NOT NULL AND claimed_until > clock_timestamp() AS is_claimed, "
    "claim IS NOT NULL AND claimed_until <= clock_timestamp() AS is_abandoned, "
    "host, pid, claimed_until, started_at, ended_at, failures, error, result, "
    "EXTRACT(EPOCH FROM clock_timestamp() - due_at)::float8 AS late_seconds "
    "FROM tenancy.jobs ORDER BY name"
)
FORGET = text(
    "DELETE FROM tenancy.jobs WHERE name = :name AND (claimed_until IS NULL OR claimed_until <= clock_timestamp())"
)

__all__ = ["CLAIM", "ENSURE", "FINISH", "FORGET", "HASTEN", "LIST", "RELEASE", "RENEW", "WAIT"]
