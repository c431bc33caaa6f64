"""The platform's routes."""

from __future__ import annotations

from ..models import Agent, DataSource, Execution
from ..schemas import (
    AgentInput,
    AgentOutput,
    DataSourceInput,
    DataSourceOutput,
    ExecutionInput,
    ExecutionOutput,
    ExecutionQuery,
)
from .memories import memories
from .resource import Resource
from .users import users

agents = Resource(name="agents", model=Agent, input=AgentInput, output=AgentOutput)
executions = Resource(
    name="executions",
    model=Execution,
    input=ExecutionInput,
    output=ExecutionOutput,
    query=ExecutionQuery,
)
data_sources = Resource(name="data_sources", model=DataSource, input=DataSourceInput, output=DataSourceOutput)

RESOURCES = (users, agents, executions, memories, data_sources)
"""Every kind of row the platform serves."""

routes = [route for resource in RESOURCES for route in resource.routes]
"""Every route but the health check."""
