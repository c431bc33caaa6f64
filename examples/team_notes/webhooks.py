"""A webhook of a payment provider, with Stripe's scheme of signatures."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from typing import Any

from sqlalchemy.dialects.postgresql import insert
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .login import tenancy_of
from .models import Payment
from .requests import read_body

MAX_AGE_SECONDS = 300


async def payment(request: Request) -> Response:
    """Record a payment in the database of the team that has paid."""
    body = await read_body(request)
    # nothing of the payload is believed before this, the customer's id least of all
    event = verified(body, request.headers.get("stripe-signature", ""), request.app.state.settings.webhook_secret)
    if event["type"] != "invoice.paid":
        return Response(status_code=204)
    invoice = event["data"]["object"]
    tenancy = tenancy_of(request)
    # TenantNotFoundError, 404: the provider tries again for days, and by then the id may be stored
    tenant = await tenancy.tenants.get_by_metadata({"stripe_customer_id": invoice["customer"]})
    async with tenancy.scope(tenant), tenancy.transaction() as session:
        values = {"event": event["id"], "amount": invoice["amount_paid"]}
        await session.execute(insert(Payment).values(values).on_conflict_do_nothing())
    return Response(status_code=204)


def verified(body: bytes, header: str, secret: str) -> Any:
    """Return the event if it is signed, and recently; ``stripe.Webhook.construct_event`` does the same."""
    parts = [part.partition("=") for part in header.split(",")]
    sent_at = next((value for name, _, value in parts if name == "t"), "")
    expected = hmac.new(secret.encode(), sent_at.encode() + b"." + body, hashlib.sha256).hexdigest()
    signed = any(hmac.compare_digest(value.encode(), expected.encode()) for name, _, value in parts if name == "v1")
    if not signed or abs(time.time() - int(sent_at)) > MAX_AGE_SECONDS:
        raise HTTPException(400, "the signature is not valid")
    return json.loads(body)


routes = [Route("/webhooks/payments", payment, methods=["POST"])]
