"""The catalogues that tenants' databases are compared with."""

from __future__ import annotations

from typing import Any

import pytest

from tenancy_orm.audit.actor import SYSTEM
from tenancy_orm.drift import Ignored
from tenancy_orm.drift.reference import KeptCatalogues, References
from tenancy_orm.migrations.connections import Connections
from tests.support.fleet import Fleet
from tests.support.projects import Project


async def test_a_templates_catalogue_is_kept_until_there_is_another_template(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone of the template is made once, and again after the template was built again, or for another revision."""
    provisioner, scratch, made = fleet.provisioner, fleet.provisioner.scratch, list[dict[str, Any]]()

    def counted(server: str, **options: Any) -> Any:
        made.append(options)
        return scratch(server, **options)

    monkeypatch.setattr(provisioner, "scratch", counted)
    environment = await fleet.migrations.environment()
    heads, kept = frozenset(environment.script.get_heads()), KeptCatalogues()

    async def read(kept: KeptCatalogues | None, at: frozenset[str] = heads) -> Any:
        references = References(fleet.services, Connections(fleet.services), environment, Ignored(), kept)
        return await references.read("default", at)

    first = await read(kept)
    assert (await read(kept)).objects == first.objects
    assert len(made) == 1
    assert (await read(None)).objects == first.objects
    assert len(made) == 2
    assert (await read(kept, frozenset())).objects != first.objects
    assert len(made) == 3
    await provisioner._unfilled.rebuild(fleet.services.servers["default"], actor=SYSTEM)
    assert (await read(kept)).objects == first.objects
    assert len(made) == 4
