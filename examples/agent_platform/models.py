"""The platform's tables: ordinary SQLAlchemy models that know nothing of tenants.

Every tenant has all of these tables in a database of its own, so no table has a tenant column and no query filters by
one.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID, uuid4

from pgvector.sqlalchemy import Vector
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    MetaData,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

EMBEDDING_DIMENSIONS = 384
"""Length of an embedding: that of the common small sentence models."""

_EMPTY_OBJECT = text("'{}'::jsonb")


class Base(DeclarativeBase):
    """Base of the platform's models."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        str: Text,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
    }


class Created:
    """A row with the time of its creation. Lists are in this order, newest first."""

    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Timestamped(Created):
    """A row that also has the time of its last change."""

    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now())


class User(Timestamped, Base):
    """A person who works for the customer."""

    __tablename__ = "users"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    email: Mapped[str]
    name: Mapped[str]
    role: Mapped[str] = mapped_column(server_default="member")
    preferences: Mapped[dict[str, Any]] = mapped_column(server_default=_EMPTY_OBJECT)

    __table_args__ = (
        CheckConstraint("role IN ('owner', 'admin', 'member')", name="role"),
        Index("uq_users_email", func.lower(text("email")), unique=True),
        Index("ix_users_created_at_id", "created_at", "id"),
    )


class Agent(Timestamped, Base):
    """An agent: a model, its instructions and its settings."""

    __tablename__ = "agents"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="RESTRICT"))
    name: Mapped[str]
    model: Mapped[str]
    instructions: Mapped[str] = mapped_column(server_default="")
    settings: Mapped[dict[str, Any]] = mapped_column(server_default=_EMPTY_OBJECT)

    __table_args__ = (
        Index("uq_agents_name", "name", unique=True),
        Index("ix_agents_owner_id", "owner_id"),
        Index("ix_agents_created_at_id", "created_at", "id"),
        Index(
            "ix_agents_settings",
            "settings",
            postgresql_using="gin",
            postgresql_ops={"settings": "jsonb_path_ops"},
        ),
    )


class DataSource(Timestamped, Base):
    """Where an agent's memories come from."""

    __tablename__ = "data_sources"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    created_by: Mapped[UUID | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"))
    name: Mapped[str]
    kind: Mapped[str]
    uri: Mapped[str]
    settings: Mapped[dict[str, Any]] = mapped_column(server_default=_EMPTY_OBJECT)

    __table_args__ = (
        CheckConstraint("kind IN ('web', 'files', 'database', 'api')", name="kind"),
        Index("uq_data_sources_name", "name", unique=True),
        Index("ix_data_sources_created_by", "created_by"),
        Index("ix_data_sources_created_at_id", "created_at", "id"),
    )


class Execution(Created, Base):
    """One run of an agent."""

    __tablename__ = "executions"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    agent_id: Mapped[UUID] = mapped_column(ForeignKey("agents.id", ondelete="CASCADE"))
    user_id: Mapped[UUID | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"))
    status: Mapped[str] = mapped_column(server_default="queued")
    input: Mapped[dict[str, Any]] = mapped_column(server_default=_EMPTY_OBJECT)
    output: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint("status IN ('queued', 'running', 'succeeded', 'failed')", name="status"),
        Index("ix_executions_created_at_id", "created_at", "id"),
        Index("ix_executions_agent_id_created_at_id", "agent_id", "created_at", "id"),
        Index("ix_executions_user_id", "user_id"),
        # for the workers' query: few rows of a table that only grows
        Index(
            "ix_executions_open",
            "created_at",
            postgresql_where=text("status IN ('queued', 'running')"),
        ),
    )


class Memory(Created, Base):
    """Something an agent knows: a text and its embedding."""

    __tablename__ = "memories"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    agent_id: Mapped[UUID] = mapped_column(ForeignKey("agents.id", ondelete="CASCADE"))
    data_source_id: Mapped[UUID | None] = mapped_column(ForeignKey("data_sources.id", ondelete="SET NULL"))
    content: Mapped[str]
    attributes: Mapped[dict[str, Any]] = mapped_column(server_default=_EMPTY_OBJECT)
    # deferred: a list or a search returns the text, not hundreds of numbers a row
    embedding: Mapped[Any] = mapped_column(Vector(EMBEDDING_DIMENSIONS), deferred=True)

    __table_args__ = (
        Index("ix_memories_created_at_id", "created_at", "id"),
        Index("ix_memories_agent_id_created_at_id", "agent_id", "created_at", "id"),
        Index("ix_memories_data_source_id", "data_source_id"),
        Index(
            "ix_memories_attributes",
            "attributes",
            postgresql_using="gin",
            postgresql_ops={"attributes": "jsonb_path_ops"},
        ),
        Index(
            "ix_memories_embedding",
            "embedding",
            postgresql_using="hnsw",
            postgresql_ops={"embedding": "vector_cosine_ops"},
        ),
    )
