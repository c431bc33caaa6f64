"""Memories: texts with embeddings, searched by similarity."""

from __future__ import annotations

from sqlalchemy import func, select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..models import Memory
from ..schemas import Match, MemoryInput, MemoryOutput, MemoryQuery, SearchInput
from .resource import Resource, tenancy_of


class Memories(Resource):
    """Memories, and the search among them."""

    @property
    def routes(self) -> list[Route]:
        """The search, before the routes of every resource: ``/memories/{id}`` would match it too."""
        return [Route("/memories/search", self.search, methods=["POST"]), *super().routes]

    async def search(self, request: Request) -> Response:
        """Answer the memories nearest to an embedding by cosine distance, nearest first."""
        body = SearchInput.model_validate_json(await request.body())
        distance = Memory.embedding.cosine_distance(body.embedding).label("distance")
        nearest = select(Memory, distance).order_by(distance).limit(body.limit)
        if body.agent_id is not None:
            nearest = nearest.where(Memory.agent_id == body.agent_id)
        async with tenancy_of(request).session() as session:
            # otherwise HNSW stops after ef_search candidates, even if a filter has dropped them all
            await session.execute(select(func.set_config("hnsw.iterative_scan", "strict_order", True)))
            found = (await session.execute(nearest)).all()
            matches = [Match(distance=row.distance, memory=MemoryOutput.model_validate(row.Memory)) for row in found]
        return JSONResponse({"items": [match.model_dump(mode="json") for match in matches]})


memories = Memories(name="memories", model=Memory, input=MemoryInput, output=MemoryOutput, query=MemoryQuery)
