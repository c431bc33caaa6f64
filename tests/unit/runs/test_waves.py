"""Which tenants a run migrates first: waves as values, as words of an option and as a TOML file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from tenancy_orm.config.values import load_object
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.runs.wave_texts import parse_wave, parse_waves, read_plan
from tenancy_orm.runs.waves import Wave, Waves
from tenancy_orm.tenant import Placement, Status, Tenant


def a_tenant(number: int, *, server: str = "eu-1", tier: str = "free", **more: object) -> Tenant:
    """A tenant with its number in slug and id."""
    return Tenant(
        UUID(int=number),
        f"t{number}",
        more.pop("status", Status.ACTIVE),  # type: ignore[arg-type]
        tier,
        placement=Placement(server, f"db{number}", f"role{number}", b""),
        **more,  # type: ignore[arg-type]
    )


TENANTS = [
    a_tenant(1, tier="pro", metadata={"cohort": "beta", "size": 5, "trusted": True}),
    a_tenant(2, metadata={"cohort": ["beta", "other"]}, region="eu"),
    a_tenant(3, server="us-1", status=Status.TRIAL),
    *(a_tenant(number) for number in range(4, 101)),
]


def assigned(*texts: str, seed: str = "") -> list[list[str]]:
    """The slugs of each wave."""
    waves = parse_waves(texts, seed=seed)
    numbers = waves.assign(TENANTS)
    return [
        [tenant.slug for tenant, found in zip(TENANTS, numbers, strict=True) if found == number]
        for number in range(len(waves))
    ]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("canary: tenant=t7,t9", ["t7", "t9"]),
        (f"tenant={UUID(int=8)}", ["t8"]),
        ("tier=pro", ["t1"]),
        ("status=trial", ["t3"]),
        ("region=eu", ["t2"]),
        ("server=us-1,us-2", ["t3"]),
        ("label=cohort=beta", ["t1", "t2"]),
        ("label=cohort", ["t1", "t2"]),
        ("label=cohort=other,more", ["t2"]),
        ("label=size=5 label=trusted=true", ["t1"]),
        ("label=cohort=beta tier=free", ["t2"]),
    ],
)
def test_a_wave_chooses_by_every_kind_of_condition(text: str, first: list[str]) -> None:
    """All its conditions hold, of several values of one any; everybody else comes after it."""
    found, rest = assigned(text)
    assert found == first
    assert len(rest) == len(TENANTS) - len(first)


def test_a_part_is_taken_by_a_hash_of_the_id() -> None:
    """The same tenants each time, others with another seed; per cent of all, rounded up; each tenant in one wave."""
    small, more, rest = assigned("5%", "10%")
    assert (len(small), len(more), len(rest)) == (5, 10, 85)
    assert assigned("5%", "10%") == [small, more, rest]
    assert assigned("5%", "10%", "rest") == [small, more, rest]
    assert assigned("5%", seed="another")[0] != small
    # the first five of those that 10 % take: a growing fleet keeps its canaries
    assert set(small) < set(assigned("10%")[0])
    assert len(assigned("0.1%")[0]) == 1
    assert [len(wave) for wave in assigned("tier=pro", "7", "server=us-1 50%", "100%")] == [1, 7, 1, 91, 0]
    everybody = [slug for wave in assigned("5%", "tier=free 20%", "3") for slug in wave]
    assert sorted(everybody) == sorted(tenant.slug for tenant in TENANTS)
    assert Waves().assign(TENANTS) == [0] * len(TENANTS)
    assert Waves((Wave(percent=50),)).assign([]) == []


def test_what_is_between_waves() -> None:
    """Read from the words of an option, and kept in a record without loss."""
    wave = parse_wave(
        "canary: tier=free,pro 7 wait=1.5m command='./smoke.sh --fast' command=true function=os.path:exists "
        "error_budget=2.5% check_timeout=5s pause"
    )
    assert (wave.name, wave.count, wave.wait, wave.error_budget, wave.check_timeout) == ("canary", 7, 90, 0.025, 5)
    assert (wave.commands, wave.functions, wave.pause) == (("./smoke.sh --fast", "true"), ("os.path:exists",), True)
    assert wave.gate() == (
        "at most 2.5 % failed, wait 90 s, command ./smoke.sh --fast, command true, function os.path:exists, pause"
    )
    assert parse_wave("label=a label=b=1,2 5%").name == "5% label=a label=b=1,2"
    waves = Waves((wave, parse_wave("label=a label=b=1,2 5%")), "seed")
    assert Waves.from_json(waves.as_json()) == waves
    assert [(one.name, one.has_checks) for one in waves.waves] == [
        ("canary", True),
        ("5% label=a label=b=1,2", False),
        ("rest", False),
    ]
    assert Waves.from_json({}) == Waves()
    assert Wave(tenants=TENANTS[0], functions=load_object).as_json() == {  # type: ignore[arg-type]
        "name": f"tenant={UUID(int=1)}",
        "tenants": [str(UUID(int=1))],
        "functions": ["tenancy_orm.config.values:load_object"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "^the wave '': chooses no tenants"),
        ("canary:", "chooses no tenants"),
        ("pause wait=5m", "chooses no tenants"),
        ("everyone", "'everyone' is not understood; write 5%, a number, rest, pause, or one of"),
        ("0%", "above 0 and at most 100"),
        ("101%", "^the wave '101%': 101 % is not above 0 and at most 100$"),
        ("canary tenant=t1", "'canary' is not understood; .* a name comes first, with a colon: 'canary: tenant=acme'$"),
        ("0", "a count is at least 1"),
        ("5% 3", "one of percent, count and rest"),
        ("rest tier=free", "rest takes all the others"),
        ("tier=free wait=soon", "wait is a time with its unit, such as 90s, 10m or 2h, not 'soon'"),
        ("tier=free wait=10", "wait is a time with its unit, such as 90s, 10m or 2h, not '10'"),
        ("tier=free check_timeout=5", "check_timeout is a time"),
        ("tier=free wait=nan", "wait is a time"),
        ("tier=free error_budget=200%", "error_budget is a share"),
        ("tier=free error_budget=few", "error_budget is a share"),
        ("status=sleeping", "no status 'sleeping'"),
        ("tiers=free", "unknown 'tiers'; there are name, tenant, tier"),
        ("tier=free command='a", "No closing quotation"),
        ("tenant=@nowhere.txt", "nowhere.txt"),
        ("tenant=t1,t1000", "names 't1000', which is not a tenant of this run"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    """With an error that says what can be written."""
    with pytest.raises(ConfigurationError, match=message):
        assigned(text)


def test_waves_that_cannot_be_kept_are_refused() -> None:
    """A wave after the rest, a function that other machines cannot find, a tier or a server that does not exist."""
    with pytest.raises(ConfigurationError, match="must be the last one"):
        parse_waves(["rest", "5%"])
    with pytest.raises(ConfigurationError, match="let the one before it pause"):
        parse_waves(["5%", "rest pause"])

    def local() -> None: ...

    with pytest.raises(ConfigurationError, match="other machines could not call it"):
        Wave(rest=True, functions=[local])
    waves = parse_waves(["tier=free,fre", "server=eu-1"])
    waves.check(tiers=["free", "fre"], servers=["eu-1"])
    with pytest.raises(ConfigurationError, match="no tier 'fre'; there are free, pro"):
        waves.check(tiers=["free", "pro"], servers=["eu-1"])
    with pytest.raises(ConfigurationError, match="no server 'eu-1'"):
        waves.check(tiers=["free", "fre"], servers=["us-1"])


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "waves.toml").write_text(text)
        return tmp_path / "waves.toml"

    return write


def test_a_file_says_the_same(written: Callable[[str], Path]) -> None:
    """Its words are those of the option; lists of tenants are looked for beside it."""
    path = written("""
        seed = "2026"
        max_failures = 10
        concurrency = 4

        [[wave]]
        name = "canary"
        tenant = ["acme", "@canaries.txt"]
        label = { cohort = ["beta", "other"], trusted = true }
        wait = "10m"
        command = "./smoke.sh"
        function = ["app.checks:errors"]
        error_budget = "2%"
        pause = true

        [[wave]]
        percent = 5
        tier = "free"

        [[wave]]
        rest = true
    """)
    (path.parent / "canaries.txt").write_text("globex  # the first customer\n\n# initech\n")
    plan = read_plan(path)
    assert (plan.max_failures, plan.concurrency) == (10, 4)
    assert plan.waves == Waves(
        (
            Wave(
                name="canary",
                tenants=("acme", "globex"),
                labels={"cohort": ("beta", "other"), "trusted": None},
                wait=600,
                commands="./smoke.sh",
                functions="app.checks:errors",
                error_budget=0.02,
                pause=True,
            ),
            Wave(percent=5, tiers="free"),
            Wave(rest=True),
        ),
        "2026",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one table"),
        ("[wave]\npercent = 5", "at least one table"),
        ("[[waves]]\npercent = 5", "unknown 'waves'; there are wave, seed"),
        ("wave = [", "is not TOML"),
        ("max_failures = 0\n[[wave]]\nrest = true", "max_failures is a number of at least 1"),
        ("[[wave]]\nrest = true\n[[wave]]\npercent = 5", "must be the last one"),
        ("[[wave]]\npercent = true", "wave 1: percent is a number of per cent"),
        ("[[wave]]\ntier = 5", "wave 1: tier is a text, or a list of texts, not 5"),
        ("[[wave]]\nrest = 'yes'", "wave 1: rest is true or false"),
        ("[[wave]]\nlabel = { a = 1 }", "wave 1: label.a is a text"),
        ("[[wave]]\ntier = 'free'\ncount = 1.5", "wave 1: count is a number"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(written: Callable[[str], Path], text: str, message: str) -> None:
    """The error says where."""
    with pytest.raises(ConfigurationError, match=message):
        read_plan(written(text))
    with pytest.raises(ConfigurationError, match="No such file"):
        read_plan("/nowhere/waves.toml")
