"""The bodies of requests and answers, as pydantic models."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from .models import EMBEDDING_DIMENSIONS


def _has_direction(vector: list[float]) -> list[float]:
    # the cosine distance to a vector of length zero is not defined, and PostgreSQL's is NaN
    if not any(vector):
        raise ValueError("an embedding must not be all zeros")
    return vector


Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Prose = Annotated[str, StringConstraints(max_length=100_000)]
Email = Annotated[str, StringConstraints(max_length=254, pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$")]
Embedding = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]],
    Field(min_length=EMBEDDING_DIMENSIONS, max_length=EMBEDDING_DIMENSIONS),
    AfterValidator(_has_direction),
]


class Input(BaseModel):
    """The body of a request; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


class Output(BaseModel):
    """A row as the API returns it."""

    model_config = ConfigDict(from_attributes=True)

    created_at: datetime


class PageQuery(Input):
    """A page of a list. A sub-class adds the columns that its list can be filtered by."""

    limit: Annotated[int, Field(ge=1, le=100)] = 50
    after: Annotated[str, StringConstraints(max_length=200)] | None = None


class UserInput(Input):
    """A new user."""

    email: Email
    name: Name
    role: Literal["owner", "admin", "member"] = "member"
    preferences: dict[str, Any] = {}


class UserOutput(Output):
    """A user."""

    id: UUID
    email: str
    name: str
    role: str
    preferences: dict[str, Any]
    updated_at: datetime


class AgentInput(Input):
    """A new agent."""

    owner_id: UUID
    name: Name
    model: Name
    instructions: Prose = ""
    settings: dict[str, Any] = {}


class AgentOutput(Output):
    """An agent."""

    id: UUID
    owner_id: UUID
    name: str
    model: str
    instructions: str
    settings: dict[str, Any]
    updated_at: datetime


class DataSourceInput(Input):
    """A new data source."""

    created_by: UUID | None = None
    name: Name
    kind: Literal["web", "files", "database", "api"]
    uri: Name
    settings: dict[str, Any] = {}


class DataSourceOutput(Output):
    """A data source."""

    id: UUID
    created_by: UUID | None
    name: str
    kind: str
    uri: str
    settings: dict[str, Any]
    updated_at: datetime


class ExecutionInput(Input):
    """A run to queue."""

    agent_id: UUID
    user_id: UUID | None = None
    input: dict[str, Any] = {}


class ExecutionQuery(PageQuery):
    """A page of runs."""

    agent_id: UUID | None = None
    status: Literal["queued", "running", "succeeded", "failed"] | None = None


class ExecutionOutput(Output):
    """A run of an agent."""

    id: int
    agent_id: UUID
    user_id: UUID | None
    status: str
    input: dict[str, Any]
    output: dict[str, Any] | None
    finished_at: datetime | None


class MemoryInput(Input):
    """A new memory, with the embedding that the caller's model gave its content."""

    agent_id: UUID
    data_source_id: UUID | None = None
    content: Annotated[Prose, StringConstraints(min_length=1)]
    attributes: dict[str, Any] = {}
    embedding: Embedding


class MemoryQuery(PageQuery):
    """A page of memories."""

    agent_id: UUID | None = None


class MemoryOutput(Output):
    """A memory, without the 384 numbers of its embedding."""

    id: int
    agent_id: UUID
    data_source_id: UUID | None
    content: str
    attributes: dict[str, Any]


class SearchInput(Input):
    """A search: an embedding, and optionally the agent."""

    embedding: Embedding
    agent_id: UUID | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 10


class Match(BaseModel):
    """A memory and its cosine distance from the given embedding: 0 same direction, 2 opposite."""

    distance: float
    memory: MemoryOutput
