"""A server on the loopback that speaks as much of Stripe's API as meter events need, and misbehaves when told to.

It is as strict as https://docs.stripe.com/idempotency and https://docs.stripe.com/api/billing/meter-event/create allow
Stripe to be, and nothing that it remembers is forgotten: Stripe does that after 24 hours at the earliest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl

Answer = tuple[int, dict[str, object]]

_DAY_SECONDS: Final = 86_400


@dataclass
class FakeStripe:
    """Remembers the events it accepted by their identifier, and refuses a second one with the same.

    Args:
        key: The API key it accepts.
        url: Where it listens.
        events: What it accepted, by identifier.
        answers: What it answered to each Idempotency-Key, with the request: the same answer is given again.
        requests: All it was sent, headers and form.
        failures: Statuses to answer with next, the first one first.
        silent: Whether it answers nothing at all.
        lost: Whether it accepts, and says that it failed.
    """

    key: str
    url: str = ""
    events: dict[str, dict[str, str]] = field(default_factory=dict)
    answers: dict[str, tuple[str, Answer]] = field(default_factory=dict)
    requests: list[dict[str, str]] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    silent: bool = False
    lost: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self.tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().split("\r\n")
                headers = {name.lower(): value for name, value in (text.split(": ", 1) for text in lines)}
                body = (await reader.readexactly(int(headers.get("content-length", "0")))).decode()
                if self.silent:
                    await reader.read()  # until the other side has had enough
                    return
                status, answer = self._answer(first, headers, body)
                content = json.dumps(answer).encode()
                writer.write(
                    f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
                    f"Stripe-Should-Retry: false\r\n\r\n".encode()
                    + content
                )
                await writer.drain()

    def _answer(self, first: str, headers: dict[str, str], body: str) -> Answer:
        form = dict(parse_qsl(body))
        self.requests.append({**headers, **form})
        if first != "POST /v1/billing/meter_events HTTP/1.1":
            return 404, _error("invalid_request_error", f"unrecognised: {first}")
        if headers.get("authorization") != f"Bearer {self.key}":
            return 401, _error("invalid_request_error", "Invalid API Key provided")
        if self.failures and self.failures[0] == 429:
            return self.failures.pop(0), _error("invalid_request_error", "Request rate limit exceeded")
        if not {"event_name", "payload[stripe_customer_id]", "payload[value]"} <= set(form):
            return 400, _error("invalid_request_error", "Missing required param")
        # from here on its endpoint executes, and its answer is saved whatever it is, with 24 hours to live or more
        key = headers["idempotency-key"]
        if key in self.answers:
            said, answer = self.answers[key]
            return answer if said == body else (400, _error("idempotency_error", "used with other parameters"))
        answer = self._execute(form)
        self.answers[key] = (body, answer)
        return answer

    def _execute(self, form: dict[str, str]) -> Answer:
        if self.failures:
            return self.failures.pop(0), _error("api_error", "try again")
        if not form["payload[stripe_customer_id]"].startswith("cus_"):
            return 400, _error("invalid_request_error", "No such customer")
        if not -300 <= time.time() - int(form["timestamp"]) <= 35 * _DAY_SECONDS:
            return 400, _error("invalid_request_error", "The timestamp is out of range")
        if form["identifier"] in self.events:
            message = f"An event already exists with identifier {form['identifier']}."
            return 400, _error("invalid_request_error", message)
        self.events[form["identifier"]] = form
        if self.lost:
            return 500, _error("api_error", "try again")
        return 200, {"object": "billing.meter_event", "identifier": form["identifier"]}


def _error(kind: str, message: str) -> dict[str, object]:
    return {"error": {"type": kind, "message": message}}


@contextlib.asynccontextmanager
async def fake_stripe(key: str) -> AsyncIterator[FakeStripe]:
    """Serve on a free port of the loopback."""
    fake = FakeStripe(key)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()
        await asyncio.gather(*fake.tasks)
