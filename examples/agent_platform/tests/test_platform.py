"""The platform's own tests. Each has an empty tenant: what another one wrote was rolled back."""

import asyncio

import pytest
from sqlalchemy import func, select

from examples.agent_platform.models import User

ADA = {"email": "ada@example.test", "name": "Ada"}


@pytest.fixture
async def ada(tenant_client):
    answer = await tenant_client.post("/users", json=ADA)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def test_a_user_is_in_the_tenants_database(ada, tenant_session):
    user = (await tenant_session.scalars(select(User))).one()
    assert (str(user.id), user.email) == (ada["id"], ADA["email"])


async def test_an_address_is_taken_once(ada, tenant_client, tenant_session):
    assert (await tenant_client.post("/users", json=ADA)).status_code == 409
    assert await tenant_session.scalar(select(func.count()).select_from(User)) == 1


async def test_another_tenant_finds_no_user(ada, tenant_client, tenant_factory):
    other = await tenant_factory()
    key = {"X-API-Key": other.api_key}
    assert (await tenant_client.get(f"/users/{ada['id']}", headers=key)).status_code == 404
    assert (await tenant_client.get("/users", headers=key)).json()["items"] == []


@pytest.mark.tenancy(mode="clone")
async def test_of_two_at_once_one_gets_the_address(tenant_client):
    answers = await asyncio.gather(*(tenant_client.post("/users", json=ADA) for _ in range(2)))
    assert sorted(answer.status_code for answer in answers) == [201, 409]


def test_health_needs_no_key(tenant_client):
    assert tenant_client.get("/healthz", headers={"X-API-Key": ""}).json() == {"status": "ok"}
