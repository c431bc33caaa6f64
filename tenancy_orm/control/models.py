"""The control database's tables, as SQLAlchemy Core. Triggers, functions and checks live in the migrations."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import CIDR, JSONB

SCHEMA = "tenancy"

metadata = MetaData(
    schema=SCHEMA,
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(table_name)s_%(column_0_name)s_idx",
    },
)

_EMPTY_OBJECT = text("'{}'::jsonb")

installation = Table(
    "installation",
    metadata,
    # one row: the primary key admits true alone
    Column(
        "singleton", Boolean, CheckConstraint("singleton", name="singleton"), primary_key=True, server_default="true"
    ),
    Column("id", Uuid, nullable=False),
    # the role that reads for one tenant; None until ``ControlDatabase.upgrade`` has created it
    Column("viewer", Text, nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

# one row; no revision where it is not known
fleet_revision = Table(
    "fleet_revision",
    metadata,
    Column(
        "singleton", Boolean, CheckConstraint("singleton", name="singleton"), primary_key=True, server_default="true"
    ),
    Column("revision", Text, nullable=True),
    Column("set_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

servers = Table(
    "servers",
    metadata,
    Column("name", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("port", Integer, nullable=False),
    Column("accepts_tenants", Boolean, nullable=False, server_default="true"),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    # where advisory locks are taken: those in another database do not exclude them
    Column("maintenance_database", Text, nullable=True),
    Column("region", Text, nullable=True),
    Column("labels", JSONB, nullable=False, server_default=_EMPTY_OBJECT),
    # how many tenants it may hold
    Column("capacity", Integer, nullable=True),
    Column("weight", Double, nullable=False, server_default="1"),
    # accepts_tenants says the same, for processes of the former version
    Column("state", Text, nullable=False, server_default="active"),
    # for all processes together; None: as many as the server has
    Column("max_connections", Integer, nullable=True),
    # logins at once
    Column("max_opening", Integer, nullable=True),
    # None: each process has them from its settings
    Column("sealed_addresses", LargeBinary, nullable=True),
    # which cluster it is
    Column("identity", Text, nullable=True),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    CheckConstraint("region ~ '^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$'", name="region"),
    CheckConstraint("jsonb_typeof(labels) = 'object'", name="labels"),
    CheckConstraint("capacity >= 0", name="capacity"),
    CheckConstraint("weight > 0 AND weight < 'Infinity'", name="weight"),
    CheckConstraint("state IN ('active', 'drain')", name="state"),
    CheckConstraint("max_connections > 0", name="max_connections"),
    CheckConstraint("max_opening > 0", name="max_opening"),
)

tiers = Table(
    "tiers",
    metadata,
    Column("name", Text, primary_key=True),
    Column("rank", Integer, nullable=False, server_default="0"),
    Column("limits", JSONB, nullable=False, server_default=_EMPTY_OBJECT),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("weight", Double, nullable=False, server_default="1"),
    CheckConstraint("weight > 0", name="weight"),
    CheckConstraint("name ~ '^[a-z][a-z0-9_-]{0,30}$'", name="name"),
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("slug", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("tier", Text, ForeignKey("tiers.name"), nullable=False),
    # None: a tombstone, the server of which was removed
    Column("server", Text, ForeignKey("servers.name", ondelete="SET NULL"), nullable=True),
    Column("database_name", Text, nullable=False),
    Column("role_name", Text, nullable=False),
    Column("sealed_password", LargeBinary, nullable=True),
    # set while the password is being rotated: one of the two is the role's
    Column("next_sealed_password", LargeBinary, nullable=True),
    Column("schema_revision", Text, nullable=True),
    Column("metadata", JSONB, nullable=False, server_default=_EMPTY_OBJECT),
    Column("quotas", JSONB, nullable=False, server_default=_EMPTY_OBJECT),
    Column("reason", Text, nullable=True),
    Column("timezone", Text, nullable=False, server_default="UTC"),
    Column("trial_ends_at", DateTime(timezone=True), nullable=True),
    # the status after a creation, or after the restore of a deleted tenant
    Column("next_status", Text, nullable=True),
    Column("step", Text, nullable=True),
    Column("step_error", Text, nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("deleted_at", DateTime(timezone=True), nullable=True),
    Column("purge_started_at", DateTime(timezone=True), nullable=True),
    Column("purged_at", DateTime(timezone=True), nullable=True),
    # the status and reason of a tenant before its maintenance
    Column("former_status", Text, nullable=True),
    Column("former_reason", Text, nullable=True),
    Column("suspend_at", DateTime(timezone=True), nullable=True),
    Column("suspend_reason", Text, nullable=True),
    Column("purge_at", DateTime(timezone=True), nullable=True),
    # when a migration last changed the revision; None: the tenant was created with it
    Column("migrated_at", DateTime(timezone=True), nullable=True),
    # where the tenant's data has to stay; None: anywhere
    Column("region", Text, nullable=True),
    # the revision that a migration brings it to now ("base" for none), and until when that can last
    Column("migrating_to", Text, nullable=True),
    Column("migrating_until", DateTime(timezone=True), nullable=True),
    # when an operator last moved it to another revision than by an upgrade; None since its next upgrade
    Column("held_at", DateTime(timezone=True), nullable=True),
    # until when its sessions wait, since its database is being exchanged for another one
    Column("paused_until", DateTime(timezone=True), nullable=True),
    # the tenant that its first contents were copied from, which an erasure names; None: none
    Column("copied_from", Uuid, nullable=True),
    CheckConstraint("region ~ '^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$'", name="region"),
    CheckConstraint(r"slug ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'", name="slug"),
    CheckConstraint(
        "status IN ('provisioning', 'trial', 'active', 'suspended', 'maintenance', 'deleted', 'purged')", name="status"
    ),
    CheckConstraint("next_status IN ('trial', 'active', 'suspended', 'maintenance')", name="next_status"),
    CheckConstraint("former_status IN ('trial', 'active', 'suspended')", name="former_status"),
    CheckConstraint("tier ~ '^[a-z][a-z0-9_-]{0,30}$'", name="tier"),
    CheckConstraint("jsonb_typeof(metadata) = 'object'", name="metadata"),
    CheckConstraint("jsonb_typeof(quotas) = 'object'", name="quotas"),
    CheckConstraint("status = 'purged' OR server IS NOT NULL", name="server"),
    CheckConstraint("status = 'purged' OR sealed_password IS NOT NULL", name="sealed_password"),
    CheckConstraint("status <> 'purged' OR next_sealed_password IS NULL", name="next_sealed_password"),
    CheckConstraint("(status IN ('deleted', 'purged')) = (deleted_at IS NOT NULL)", name="deleted_at"),
    # a purged tenant's slug is free again: its database does not exist
    Index("tenants_slug_key", "slug", unique=True, postgresql_where=text("status <> 'purged'")),
    Index("tenants_database_name_key", "server", "database_name", unique=True),
    # keyset pages are ordered by id, which is time-ordered
    Index("tenants_status_id_idx", "status", "id"),
    Index("tenants_tier_id_idx", "tier", "id"),
    Index("tenants_region_id_idx", "region", "id", postgresql_where=text("region IS NOT NULL")),
    Index("tenants_server_idx", "server", postgresql_where=text("status <> 'purged'")),
    Index(
        "tenants_metadata_idx",
        "metadata",
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_with={"fastupdate": False},
    ),
    Index(
        "tenants_unfinished_idx",
        "id",
        postgresql_where=text("status = 'provisioning' OR (status = 'deleted' AND purge_started_at IS NOT NULL)"),
    ),
)

former_slugs = Table(
    "former_slugs",
    metadata,
    Column("slug", Text, primary_key=True),
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("redirects_until", DateTime(timezone=True), nullable=False),
    Index("former_slugs_tenant_id_idx", "tenant_id"),
)

domains = Table(
    "domains",
    metadata,
    Column("domain", Text, primary_key=True),
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("token", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("verified_at", DateTime(timezone=True), nullable=True),
    Column("checked_at", DateTime(timezone=True), nullable=True),
    Column("failing_since", DateTime(timezone=True), nullable=True),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("lapsed_at", DateTime(timezone=True), nullable=True),
    Index("domains_tenant_id_idx", "tenant_id"),
    Index("domains_verified_key", "domain", unique=True, postgresql_where=text("verified_at IS NOT NULL")),
)

templates = Table(
    "templates",
    metadata,
    Column("server", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("base", Text, nullable=False),
    Column("revision", Text, nullable=True),
    Column("inputs", JSONB, nullable=False),
    # None where it is not known: the template was found, and not built
    Column("built_at", DateTime(timezone=True), nullable=True, server_default=func.now()),
    Column("last_used_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("last_used_by", Text, nullable=True),
    Column("retired", Boolean, nullable=False, server_default="false"),
    Index("templates_base_idx", "server", "base"),
)

data_keys = Table(
    "data_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("number", BigInteger, Identity(always=True), unique=True, nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("wrapper", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    CheckConstraint("id ~ '^[A-Za-z0-9_-]{1,16}$'", name="id"),
)

key_checks = Table(
    "key_checks",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    CheckConstraint("kind IN ('encryption', 'pepper')", name="kind"),
    CheckConstraint("octet_length(value) = 32", name="value"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False, server_default=""),
    Column("prefix", Text, nullable=False, server_default=""),
    Column("digest", LargeBinary, nullable=False),
    Column("digest_version", Text, nullable=False, server_default="0"),
    Column("scopes", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")),
    Column("networks", ARRAY(CIDR), nullable=False, server_default=text("'{}'::cidr[]")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("expires_at", DateTime(timezone=True), nullable=True),
    Column("revoked_at", DateTime(timezone=True), nullable=True),
    Column("revoked_reason", Text, nullable=True),
    Column("last_used_at", DateTime(timezone=True), nullable=True),
    Column("rotated_from", Text, nullable=True),
    CheckConstraint("id ~ '^[0-9A-Za-z]{16}$'", name="id"),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
    Index("api_keys_tenant_id_idx", "tenant_id", "created_at"),
)

members = Table(
    "members",
    metadata,
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("subject", Text, nullable=False),
    Column("roles", ARRAY(Text), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    PrimaryKeyConstraint("subject", "tenant_id"),
    CheckConstraint("length(subject) BETWEEN 1 AND 255", name="subject"),
    Index("members_tenant_id_idx", "tenant_id", "created_at"),
)

invitations = Table(
    "invitations",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("roles", ARRAY(Text), nullable=False),
    Column("email", Text, nullable=True),
    Column("digest", LargeBinary, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("accepted_at", DateTime(timezone=True), nullable=True),
    Column("accepted_by", Text, nullable=True),
    Column("withdrawn_at", DateTime(timezone=True), nullable=True),
    CheckConstraint("length(email) BETWEEN 1 AND 320", name="email"),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
    CheckConstraint("(accepted_at IS NULL) = (accepted_by IS NULL)", name="accepted_by"),
    Index("invitations_tenant_id_idx", "tenant_id", "created_at"),
)

revocations = Table(
    "revocations",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("value", Text, primary_key=True),
    Column("revoked_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("expires_at", DateTime(timezone=True), nullable=True),
    Column("reason", Text, nullable=True),
    CheckConstraint("kind IN ('subject', 'token')", name="kind"),
    CheckConstraint("length(value) BETWEEN 1 AND 255", name="value"),
    Index("revocations_expires_at_idx", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
)

# --- the audit log: only tenancy.audit_append writes it --------------------------------------------------------------

audit_log = Table(
    "audit_log",
    metadata,
    Column("sequence", BigInteger, primary_key=True),
    Column("occurred_at", DateTime(timezone=True), primary_key=True),
    Column("action", Text, nullable=False),
    Column("tenant_id", Uuid, nullable=True),
    Column("slug", Text, nullable=True),
    Column("actor_kind", Text, nullable=False),
    Column("actor_id", Text, nullable=True),
    Column("before", JSONB, nullable=True),
    Column("after", JSONB, nullable=True),
    Column("detail", JSONB, nullable=True),
    Column("request_id", Text, nullable=True),
    Column("source", Text, nullable=True),
    Column("database_role", Text, nullable=False),
    Column("previous_hash", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    postgresql_partition_by="RANGE (occurred_at)",
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("singleton", Boolean, primary_key=True, server_default="true"),
    Column("sequence", BigInteger, nullable=False),
    Column("occurred_at", DateTime(timezone=True), nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("partitioned_until", DateTime(timezone=True), nullable=False),
    CheckConstraint("singleton", name="singleton"),
)

audit_cuts = Table(
    "audit_cuts",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("occurred_at", DateTime(timezone=True), nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("cut_at", DateTime(timezone=True), nullable=False),
    Column("key_id", Text, nullable=False),
    Column("signature", LargeBinary, nullable=False),
)

audit_keys = Table(
    "audit_keys",
    metadata,
    Column("signature", LargeBinary, primary_key=True),
    Column("key_id", Text, nullable=False),
    Column("public_key", LargeBinary, nullable=False),
    Column("signed_by", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

# --- quotas: written by the functions of migration 0003 ---------------------------------------------------------------


def _tenant_id_column(*, key: bool = False) -> Column[Any]:
    return Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=key, nullable=False)


usage = Table(
    "usage",
    metadata,
    _tenant_id_column(key=True),
    Column("resource", Text, primary_key=True),
    Column("period", Text, primary_key=True),
    Column("period_start", DateTime(timezone=True), primary_key=True),
    Column("period_end", DateTime(timezone=True), nullable=False),
    Column("used", BigInteger, nullable=False, server_default="0"),
    Column("soft_reached", Double, nullable=False, server_default="0"),
    Column("soft_limit", BigInteger, nullable=True),
    Column("soft_at", DateTime(timezone=True), nullable=True),
    Column("closed_at", DateTime(timezone=True), nullable=True),
    Column("headroom_below", BigInteger, nullable=True),
    Column("headroom_limit", BigInteger, nullable=True),
    Column("headroom_tier", JSONB, nullable=True),
    Column("headroom_override", JSONB, nullable=True),
    Column("headroom_reached", Double, nullable=True),
    Column("headroom_soft_limit", BigInteger, nullable=True),
)

usage_keys = Table(
    "usage_keys",
    metadata,
    _tenant_id_column(key=True),
    Column("key", Text, primary_key=True),
    Column("resource", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

quota_holds = Table(
    "quota_holds",
    metadata,
    Column("id", Uuid, primary_key=True),
    _tenant_id_column(),
    Column("resource", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
)

quota_blocks = Table(
    "quota_blocks",
    metadata,
    Column("id", Uuid, primary_key=True),
    _tenant_id_column(),
    Column("resource", Text, nullable=False),
    Column("period", Text, nullable=False),
    Column("period_start", DateTime(timezone=True), nullable=False),
    Column("unspent", BigInteger, nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("reclaim", Boolean, nullable=False, server_default="false"),
)

quota_pressure = Table(
    "quota_pressure",
    metadata,
    _tenant_id_column(key=True),
    Column("policy", Text, primary_key=True),
    Column("resource", Text, nullable=False),
    Column("tier", Text, nullable=False),
    Column("since", DateTime(timezone=True), nullable=False),
    Column("proposed_at", DateTime(timezone=True), nullable=True),
    Column("claimed_until", DateTime(timezone=True), nullable=True),
)

usage_records = Table(
    "usage_records",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    _tenant_id_column(),
    Column("resource", Text, nullable=False),
    Column("period", Text, nullable=False),
    Column("period_start", DateTime(timezone=True), nullable=False),
    Column("period_end", DateTime(timezone=True), nullable=False),
    Column("quantity", BigInteger, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("metadata", JSONB, nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("sent_at", DateTime(timezone=True), nullable=True),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("due_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("failed_at", DateTime(timezone=True), nullable=True),
    Column("error", Text, nullable=True),
)

tenant_metrics = Table(
    "tenant_metrics",
    metadata,
    _tenant_id_column(key=True),
    Column("sampled_at", DateTime(timezone=True), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("connections", Integer, nullable=False),
    Column("queries", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
)

# --- schedules --------------------------------------------------------------------------------------------------------

schedules = Table(
    "schedules",
    metadata,
    Column("name", Text, primary_key=True),
    # nothing is due before
    Column("first_seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    CheckConstraint("length(name) BETWEEN 1 AND 100", name="name"),
)

schedule_runs = Table(
    "schedule_runs",
    metadata,
    Column("schedule", Text, ForeignKey("schedules.name", ondelete="CASCADE"), nullable=False),
    _tenant_id_column(),
    # the time that was sent last
    Column("sent_for", DateTime(timezone=True), nullable=True),
    Column("sent_at", DateTime(timezone=True), nullable=True),
    # the time that somebody is sending now, until when nobody else does, and who
    Column("claimed_for", DateTime(timezone=True), nullable=True),
    Column("claimed_until", DateTime(timezone=True), nullable=True),
    Column("claim", Uuid, nullable=True),
    # how often sending it was begun
    Column("attempts", Integer, nullable=False, server_default="0"),
    PrimaryKeyConstraint("schedule", "tenant_id"),
    Index("schedule_runs_tenant_id_idx", "tenant_id"),
)

# --- connections ------------------------------------------------------------------------------------------------------

connection_caps = Table(
    "connection_caps",
    metadata,
    # a server's name, or a replica's
    Column("server", Text, primary_key=True),
    # what the server accepts, less what it reserves
    Column("accepted", Integer, nullable=True),
    # connections of others than the processes, as they were counted last
    Column("others", Integer, nullable=True),
    Column("counted_at", DateTime(timezone=True), nullable=True),
)

connection_leases = Table(
    "connection_leases",
    metadata,
    Column("server", Text, ForeignKey("connection_caps.server", ondelete="CASCADE"), nullable=False),
    # another one on each server, and after a loss
    Column("process", Uuid, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("granted", Integer, nullable=False),
    # how many of them it keeps while it cannot reach this database
    Column("guaranteed", Integer, nullable=False),
    Column("wanted", Integer, nullable=False),
    Column("in_use", Integer, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    # set while its connections are being ended: it cannot be renewed any more
    Column("ending_at", DateTime(timezone=True), nullable=True),
    PrimaryKeyConstraint("server", "process"),
    CheckConstraint("granted >= 0", name="granted"),
)

# --- jobs -------------------------------------------------------------------------------------------------------------

jobs = Table(
    "jobs",
    metadata,
    Column("name", Text, primary_key=True),
    Column("due_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    # who does it now, and until when nobody else does
    Column("claim", Uuid, nullable=True),
    Column("host", Text, nullable=True),
    Column("pid", Integer, nullable=True),
    Column("claimed_until", DateTime(timezone=True), nullable=True),
    Column("started_at", DateTime(timezone=True), nullable=True),
    Column("ended_at", DateTime(timezone=True), nullable=True),
    # how often in a row it failed, and with what
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("error", Text, nullable=True),
    Column("result", JSONB, nullable=True),
    CheckConstraint("length(name) BETWEEN 1 AND 200", name="name"),
    Index("jobs_due_at_idx", "due_at"),
)

# --- runs -------------------------------------------------------------------------------------------------------------

migration_runs = Table(
    "migration_runs",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("command", Text, nullable=False),
    Column("target", Text, nullable=False),
    # the run that this one undoes
    Column("undoes", BigInteger, ForeignKey("migration_runs.id"), nullable=True),
    Column("actor_kind", Text, nullable=False),
    Column("actor_id", Text, nullable=True),
    Column("host", Text, nullable=False),
    Column("package_version", Text, nullable=False),
    # the version of the application, where it is known
    Column("code_version", Text, nullable=True),
    # of the revisions and their options: a process with others must not take part
    Column("fingerprint", Text, nullable=False),
    # the arguments, the waves, the concurrency
    Column("plan", JSONB, nullable=False),
    Column("state", Text, nullable=False, server_default="running"),
    # the wave that runs now, from 0; -1 while the run is prepared
    Column("wave", Integer, nullable=False, server_default=text("'-1'::integer")),
    # the process that prepares the next wave, or ends the run
    Column("gate", Uuid, nullable=True),
    # why it is paused, or failed as a whole
    Column("reason", Text, nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("ended_at", DateTime(timezone=True), nullable=True),
    CheckConstraint("command IN ('upgrade', 'downgrade', 'stamp', 'extensions', 'undo')", name="command"),
    CheckConstraint("state IN ('running', 'paused', 'done', 'failed', 'cancelled')", name="state"),
)

migration_run_tenants = Table(
    "migration_run_tenants",
    metadata,
    Column("run", BigInteger, ForeignKey("migration_runs.id", ondelete="CASCADE"), nullable=False),
    _tenant_id_column(),
    Column("server", Text, nullable=False),
    Column("wave", Integer, nullable=False, server_default="0"),
    # the order within its wave
    Column("position", Integer, nullable=False),
    Column("state", Text, nullable=False, server_default="waiting"),
    # the revision that it is brought to, where each tenant has its own
    Column("target", Text, nullable=True),
    # the process that migrates it, or will; of a row that waits, it has not begun to
    Column("claim", Uuid, nullable=True),
    Column("host", Text, nullable=True),
    Column("attempts", Integer, nullable=False, server_default="0"),
    # how often its process was lost
    Column("losses", Integer, nullable=False, server_default="0"),
    # the revision that it had before this run; is_read from when that was read under the tenant's lock, just before the
    # run's first change of it
    Column("revision_before", Text, nullable=True),
    Column("is_read", Boolean, nullable=False, server_default="false"),
    Column("revision_after", Text, nullable=True),
    Column("changed", Boolean, nullable=False, server_default="false"),
    Column("started_at", DateTime(timezone=True), nullable=True),
    Column("ended_at", DateTime(timezone=True), nullable=True),
    Column("seconds", Double, nullable=True),
    Column("sqlstate", Text, nullable=True),
    Column("error", Text, nullable=True),
    # what further parts of the run keep for this tenant: progress of data migrations, for example
    Column("detail", JSONB, nullable=False, server_default=_EMPTY_OBJECT),
    PrimaryKeyConstraint("run", "tenant_id"),
    CheckConstraint("state IN ('waiting', 'running', 'done', 'failed', 'skipped')", name="state"),
    # what can be claimed
    Index(
        "migration_run_tenants_waiting_idx",
        "run",
        "server",
        "wave",
        "position",
        postgresql_where=text("state = 'waiting' AND claim IS NULL"),
    ),
    Index("migration_run_tenants_tenant_id_idx", "tenant_id"),
)

# an upgrade before a tenant's use that runs now, or has failed
tenant_upgrades = Table(
    "tenant_upgrades",
    metadata,
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("target", Text, nullable=False),
    # who does it now, and until when nobody else does
    Column("claim", Uuid, nullable=True),
    Column("host", Text, nullable=True),
    Column("claimed_until", DateTime(timezone=True), nullable=True),
    # how often in a row it has failed, with what, and until when it is not tried again
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("error", Text, nullable=True),
    Column("sqlstate", Text, nullable=True),
    Column("failed_at", DateTime(timezone=True), nullable=True),
    Column("next_at", DateTime(timezone=True), nullable=True),
)

migration_run_processes = Table(
    "migration_run_processes",
    metadata,
    Column("run", BigInteger, ForeignKey("migration_runs.id", ondelete="CASCADE"), nullable=False),
    Column("id", Uuid, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    # how many tenants it may migrate at once, by server
    Column("slots", JSONB, nullable=False, server_default=_EMPTY_OBJECT),
    # until when its tenants are its own, unless it renews that
    Column("claimed_until", DateTime(timezone=True), nullable=False),
    Column("joined_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("left_at", DateTime(timezone=True), nullable=True),
    # it did not renew its claims in time
    Column("is_lost", Boolean, nullable=False, server_default="false"),
    PrimaryKeyConstraint("run", "id"),
)

# --- warm databases ---------------------------------------------------------------------------------------------------

warm_databases = Table(
    "warm_databases",
    metadata,
    # of the database, and of its role
    Column("name", Text, primary_key=True),
    Column("server", Text, ForeignKey("servers.name", ondelete="CASCADE"), nullable=False),
    # the template that it was cloned from
    Column("template", Text, nullable=False),
    # a digest of all that decides what a new tenant's database is like: a creation claims those of its own recipe
    Column("recipe", Text, nullable=False),
    Column("revision", Text, nullable=True),
    # only a "ready" one can be claimed; one that stays in another state is removed
    Column("state", Text, nullable=False, server_default="making"),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    # when a process with this recipe last asked for it; others drop it some time later
    Column("wanted_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    CheckConstraint("state IN ('making', 'ready', 'dropping')", name="state"),
    Index("warm_databases_server_idx", "server", "recipe", "state", "created_at"),
)

# --- operations -------------------------------------------------------------------------------------------------------

operations = Table(
    "operations",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("kind", Text, nullable=False),
    _tenant_id_column(),
    # "waiting" for an operator's decision
    Column("state", Text, nullable=False, server_default="running"),
    # the step that was begun last: what a process that takes over looks at
    Column("step", Text, nullable=False),
    # what the steps need and have found; no secrets
    Column("detail", JSONB, nullable=False, server_default=_EMPTY_OBJECT),
    Column("actor_kind", Text, nullable=False),
    Column("actor_id", Text, nullable=True),
    # who does it now, and until when nobody else does
    Column("claim", Uuid, nullable=True),
    Column("host", Text, nullable=True),
    Column("pid", Integer, nullable=True),
    Column("claimed_until", DateTime(timezone=True), nullable=True),
    Column("error", Text, nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("ended_at", DateTime(timezone=True), nullable=True),
    CheckConstraint("kind IN ('restore', 'clone', 'adopt', 'move', 'export', 'erasure')", name="kind"),
    CheckConstraint("state IN ('running', 'waiting', 'done', 'failed', 'undone')", name="state"),
    Index("operations_tenant_id_idx", "tenant_id", "id"),
    # one at a time of those that change where a tenant's data is
    Index(
        "operations_unfinished_key",
        "tenant_id",
        unique=True,
        postgresql_where=text("state IN ('running', 'waiting') AND kind IN ('restore', 'adopt', 'move')"),
    ),
)

# databases beside the one in use, which the tenant's own row names
tenant_databases = Table(
    "tenant_databases",
    metadata,
    Column("server", Text, ForeignKey("servers.name"), nullable=False),
    Column("name", Text, nullable=False),
    _tenant_id_column(),
    # the operation that makes it, or has left it behind
    Column("operation", BigInteger, ForeignKey("operations.id", ondelete="SET NULL"), nullable=True),
    # the role that uses it, or would
    Column("role_name", Text, nullable=False),
    Column("schema_revision", Text, nullable=True),
    # "kept" is what a switch has left behind, and what it can go back to
    Column("state", Text, nullable=False),
    # None: until somebody decides
    Column("kept_until", DateTime(timezone=True), nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    PrimaryKeyConstraint("server", "name"),
    CheckConstraint("state IN ('making', 'kept', 'dropping')", name="state"),
    Index("tenant_databases_tenant_id_idx", "tenant_id"),
)

# --- backups ----------------------------------------------------------------------------------------------------------

# a tenant's own key: without it, its backups cannot be read
backup_keys = Table(
    "backup_keys",
    metadata,
    Column("id", Text, primary_key=True),
    # None: the control database's own
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=True),
    # the age recipient
    Column("recipient", Text, nullable=False),
    # the age identity; None once it is destroyed
    Column("sealed_identity", LargeBinary, nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("destroyed_at", DateTime(timezone=True), nullable=True),
    CheckConstraint("(sealed_identity IS NULL) = (destroyed_at IS NOT NULL)", name="destroyed"),
    Index("backup_keys_tenant_id_idx", "tenant_id", "created_at"),
)

backups = Table(
    "backups",
    metadata,
    Column("id", Uuid, primary_key=True),
    # None: of the control database
    Column("tenant_id", Uuid, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=True),
    # where the database was, for the cap on a server's backups at once
    Column("server", Text, nullable=True),
    # the store, without credentials, and where it is in there
    Column("store", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("state", Text, nullable=False, server_default="running"),
    # the process that makes it, and until when nobody else does
    Column("claim", Uuid, nullable=True),
    Column("host", Text, nullable=True),
    Column("claimed_until", DateTime(timezone=True), nullable=True),
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("ended_at", DateTime(timezone=True), nullable=True),
    # encrypted, in the store
    Column("bytes", BigInteger, nullable=True),
    Column("manifest", JSONB, nullable=True),
    Column("error", Text, nullable=True),
    Column("verified_at", DateTime(timezone=True), nullable=True),
    Column("verify_error", Text, nullable=True),
    # never pruned before; None: by the retention policy alone
    Column("kept_until", DateTime(timezone=True), nullable=True),
    Column("pruned_at", DateTime(timezone=True), nullable=True),
    # the processes that have it decrypted: for each its host, and until when unless it renews that
    Column("readers", JSONB, nullable=True),
    CheckConstraint("state IN ('running', 'done', 'failed', 'pruned')", name="state"),
    Index("backups_tenant_id_idx", "tenant_id", "started_at"),
    Index("backups_running_idx", "server", postgresql_where=text("state = 'running'")),
    # one at a time of each tenant
    Index(
        "backups_running_key",
        text("COALESCE(tenant_id, '00000000-0000-0000-0000-000000000000')"),
        unique=True,
        postgresql_where=text("state = 'running'"),
    ),
)

__all__ = ["SCHEMA", "api_keys", "installation", "metadata", "servers", "templates", "tenants", "tiers"]
