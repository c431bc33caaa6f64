"""The page on architecture defines each word once, and names each part of the machinery."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

from tenancy_orm.internals import Internals

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "architecture.md").read_text("utf-8")

# What the other pages are about, and words that they use without an explanation. A new page's word belongs here too.
WORDS = """
    administrator, adoption, binding, blocker, breaker, budget, cap, catch-up, certificate, chore, claim, clone,
    compatible revision, control database, credential, data key, data migration, deadline, deletion, directory, drain,
    drift, drill, encryption key, engine, erasure, export, fleet, former slug, grace time, guard, hold, home loop,
    housekeeping, incident, invitation, job, lease, lock-out, maintenance, mapping, marker, member, move, notice,
    operation, operator, pause, pepper, placement, point in time, pooler, preflight, purge, quota, recovered server,
    reconcile, redirect, rehearsal, replica, restore of a database, restore of a tenant, revocation, run, sampler,
    schedule, scope, scratch database, seed, server, step, stray, subject, swap, switch, task, template,
    temporary login, tenant, tier, tombstone, trial, viewer role, visitor, warm pool, watchdog, wave, worker
"""


def defined() -> list[str]:
    """The words of the glossary; several of them may share a line."""
    glossary = PAGE.partition("## Words\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", glossary, re.MULTILINE)
    return [word for row in rows if row != "word" for word in row.split(", ")]


def test_each_word_is_defined_once() -> None:
    """Two meanings of one word are two words, or one line that says both."""
    assert [word for word, times in Counter(defined()).items() if times > 1] == []


def test_the_words_of_the_pages_are_defined() -> None:
    """A reader who meets one finds it in the glossary."""
    assert {word.strip() for word in WORDS.split(",")} - set(defined()) == set()


def test_the_table_of_the_machinery_is_complete() -> None:
    """Each field of ``Internals`` has its line, and no line is of one that is gone."""
    table = PAGE.partition("| `tenancy.internals.` | ")[2].partition("\n\n")[0]
    named = [name for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(field.name.lstrip("_") for field in dataclasses.fields(Internals))
