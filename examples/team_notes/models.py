"""The tables of one team. They have no column for the team: each has a database of its own."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    author: Mapped[str]  # a person's id, or a key's
    published: Mapped[bool] = mapped_column(default=False)


class Payment(Base):
    __tablename__ = "payments"
    event: Mapped[str] = mapped_column(primary_key=True)  # the provider may send an event more than once
    amount: Mapped[int]
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())
