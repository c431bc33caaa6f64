from typing import Any

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel
from sqlalchemy import select

from database import Database, tenancy
from models import Comment, Organisation, Ticket, User
from security import CurrentPerson, authenticator, hash_password, is_password, log_in
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.integrations.fastapi import CurrentCredential, TenantSession

app = FastAPI(lifespan=tenancy.lifespan)
app.add_middleware(
    TenancyMiddleware,
    tenancy=tenancy,
    authenticators=[authenticator],
    exempt=["/signup", "/login"],
    without_tenant=["/logout", "/me"],
)


class Login(BaseModel):
    email: str
    password: str


class SignUp(Login):
    slug: str
    name: str


class NewTicket(BaseModel):
    title: str


class NewComment(BaseModel):
    text: str


@app.post("/signup", status_code=201)
async def sign_up(form: SignUp, db: Database, response: Response) -> None:
    organisation = Organisation(slug=form.slug, name=form.name)
    db.add(organisation)
    await db.flush()
    user = User(org_id=organisation.id, email=form.email, password=hash_password(form.password))
    db.add(user)
    await db.flush()
    tenant = await tenancy.tenants.create(form.slug, metadata={"org_id": organisation.id})
    organisation.tenant_id = tenant.id
    await db.commit()
    log_in(response, user, organisation)


@app.post("/login")
async def login(form: Login, db: Database, response: Response) -> None:
    user = await db.scalar(select(User).where(User.email == form.email))
    if user is None or not is_password(form.password, user.password):
        raise HTTPException(401, "wrong e-mail address or password")
    log_in(response, user, await db.get_one(Organisation, user.org_id))


@app.post("/logout")
async def logout(credential: CurrentCredential, response: Response) -> None:
    await tenancy.revocations.add(token_id=credential.id, expires_at=credential.expires_at)
    response.delete_cookie("session")


@app.get("/me")
async def me(person: CurrentPerson, db: Database) -> dict[str, str]:
    user = await db.get_one(User, person.id)
    organisation = await db.get_one(Organisation, user.org_id)
    return {"email": user.email, "organisation": organisation.name}


@app.get("/tickets")
async def tickets(person: CurrentPerson, db: TenantSession) -> list[dict[str, Any]]:
    found = await db.scalars(select(Ticket).order_by(Ticket.id))
    return [{"id": ticket.id, "title": ticket.title, "is_open": ticket.is_open} for ticket in found]


@app.post("/tickets", status_code=201)
async def open_ticket(form: NewTicket, person: CurrentPerson, db: TenantSession) -> int:
    ticket = Ticket(author_id=person.id, title=form.title)
    db.add(ticket)
    await db.commit()
    return ticket.id


@app.get("/tickets/{ticket_id}")
async def ticket(ticket_id: int, person: CurrentPerson, db: TenantSession) -> dict[str, Any]:
    ticket = await db.get(Ticket, ticket_id)
    if ticket is None:
        raise HTTPException(404)
    comments = await db.scalars(select(Comment.text).where(Comment.ticket_id == ticket_id).order_by(Comment.id))
    return {"title": ticket.title, "is_open": ticket.is_open, "comments": comments.all()}


@app.post("/tickets/{ticket_id}/comments", status_code=201)
async def comment(ticket_id: int, form: NewComment, person: CurrentPerson, db: TenantSession) -> None:
    ticket = await db.get(Ticket, ticket_id)
    if ticket is None:
        raise HTTPException(404)
    db.add(Comment(ticket_id=ticket_id, author_id=person.id, text=form.text))
    await db.commit()
