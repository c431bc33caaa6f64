"""Users, agents, data sources, executions and memories.

The ``vector`` type comes with the template database (``TenancyConfig.extensions``): a tenant's
schema is changed by a role that may not create extensions.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import Vector
from sqlalchemy.dialects import postgresql

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None


def _created() -> sa.Column[datetime]:
    return sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False)


def _updated() -> sa.Column[datetime]:
    return sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False)


def _object(name: str) -> sa.Column[Any]:
    return sa.Column(name, postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False)


def _identity() -> sa.Column[int]:
    return sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False)


def upgrade() -> None:
    """Create all tables."""
    _create_users()
    _create_agents()
    _create_data_sources()
    _create_executions()
    _create_memories()


def _create_users() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), server_default="member", nullable=False),
        _object("preferences"),
        _created(),
        _updated(),
        sa.CheckConstraint("role IN ('owner', 'admin', 'member')", name=op.f("ck_users_role")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
    )
    op.create_index("uq_users_email", "users", [sa.text("lower(email)")], unique=True)
    op.create_index("ix_users_created_at_id", "users", ["created_at", "id"])


def _create_agents() -> None:
    op.create_table(
        "agents",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("instructions", sa.Text(), server_default="", nullable=False),
        _object("settings"),
        _created(),
        _updated(),
        sa.ForeignKeyConstraint(
            ["owner_id"],
            ["users.id"],
            name=op.f("fk_agents_owner_id_users"),
            ondelete="RESTRICT",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_agents")),
    )
    op.create_index("uq_agents_name", "agents", ["name"], unique=True)
    op.create_index("ix_agents_owner_id", "agents", ["owner_id"])
    op.create_index("ix_agents_created_at_id", "agents", ["created_at", "id"])
    op.create_index(
        "ix_agents_settings",
        "agents",
        ["settings"],
        postgresql_using="gin",
        postgresql_ops={"settings": "jsonb_path_ops"},
    )


def _create_data_sources() -> None:
    op.create_table(
        "data_sources",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_by", sa.Uuid(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        _object("settings"),
        _created(),
        _updated(),
        sa.CheckConstraint("kind IN ('web', 'files', 'database', 'api')", name=op.f("ck_data_sources_kind")),
        sa.ForeignKeyConstraint(
            ["created_by"],
            ["users.id"],
            name=op.f("fk_data_sources_created_by_users"),
            ondelete="SET NULL",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_data_sources")),
    )
    op.create_index("uq_data_sources_name", "data_sources", ["name"], unique=True)
    op.create_index("ix_data_sources_created_by", "data_sources", ["created_by"])
    op.create_index("ix_data_sources_created_at_id", "data_sources", ["created_at", "id"])


def _create_executions() -> None:
    op.create_table(
        "executions",
        _identity(),
        sa.Column("agent_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=True),
        sa.Column("status", sa.Text(), server_default="queued", nullable=False),
        _object("input"),
        sa.Column("output", postgresql.JSONB(), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        _created(),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'succeeded', 'failed')",
            name=op.f("ck_executions_status"),
        ),
        sa.ForeignKeyConstraint(
            ["agent_id"],
            ["agents.id"],
            name=op.f("fk_executions_agent_id_agents"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["user_id"],
            ["users.id"],
            name=op.f("fk_executions_user_id_users"),
            ondelete="SET NULL",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_executions")),
    )
    op.create_index("ix_executions_created_at_id", "executions", ["created_at", "id"])
    op.create_index("ix_executions_agent_id_created_at_id", "executions", ["agent_id", "created_at", "id"])
    op.create_index("ix_executions_user_id", "executions", ["user_id"])
    op.create_index(
        "ix_executions_open",
        "executions",
        ["created_at"],
        postgresql_where=sa.text("status IN ('queued', 'running')"),
    )


def _create_memories() -> None:
    op.create_table(
        "memories",
        _identity(),
        sa.Column("agent_id", sa.Uuid(), nullable=False),
        sa.Column("data_source_id", sa.Uuid(), nullable=True),
        sa.Column("content", sa.Text(), nullable=False),
        _object("attributes"),
        sa.Column("embedding", Vector(384), nullable=False),
        _created(),
        sa.ForeignKeyConstraint(
            ["agent_id"],
            ["agents.id"],
            name=op.f("fk_memories_agent_id_agents"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["data_source_id"],
            ["data_sources.id"],
            name=op.f("fk_memories_data_source_id_data_sources"),
            ondelete="SET NULL",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memories")),
    )
    op.create_index("ix_memories_created_at_id", "memories", ["created_at", "id"])
    op.create_index("ix_memories_agent_id_created_at_id", "memories", ["agent_id", "created_at", "id"])
    op.create_index("ix_memories_data_source_id", "memories", ["data_source_id"])
    op.create_index(
        "ix_memories_attributes",
        "memories",
        ["attributes"],
        postgresql_using="gin",
        postgresql_ops={"attributes": "jsonb_path_ops"},
    )
    op.create_index(
        "ix_memories_embedding",
        "memories",
        ["embedding"],
        postgresql_using="hnsw",
        postgresql_ops={"embedding": "vector_cosine_ops"},
    )


def downgrade() -> None:
    """Drop all tables."""
    for table in ("memories", "executions", "data_sources", "agents", "users"):
        op.drop_table(table)
