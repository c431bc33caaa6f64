"""Checks between the waves of a run: commands, functions, and the seal without which none of them runs."""

from __future__ import annotations

import asyncio
import base64
import os
import sys
import types
from pathlib import Path

import pytest

from tenancy_orm.errors import ConfigurationError
from tenancy_orm.runs.checks import WaveReport, is_sealed, over_budget, require_checks, run_checks, seal_checks
from tenancy_orm.runs.wave_texts import parse_waves
from tenancy_orm.runs.waves import Wave, Waves
from tenancy_orm.secrets.keyring import Keyring
from tests.support.shell import processes_in
from tests.support.waiting import until

REPORT = WaveReport(
    run=17, command="upgrade", target="head", wave=1, name="canary", tenants=("acme", "globex"), failed=("globex",)
)


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of an application's with checks."""
    module = types.ModuleType("wave_checks")
    monkeypatch.setitem(sys.modules, "wave_checks", module)

    async def asynchronous(report: WaveReport) -> bool:
        return report.failed_share == 0.5

    async def slow(report: WaveReport) -> None:
        await asyncio.Event().wait()

    def raises(report: WaveReport) -> None:
        raise LookupError("no metrics")

    module.asynchronous = asynchronous  # type: ignore[attr-defined]
    module.slow = slow  # type: ignore[attr-defined]
    module.raises = raises  # type: ignore[attr-defined]
    module.passes = lambda report: None  # type: ignore[attr-defined]
    module.refuses = lambda report: False  # type: ignore[attr-defined]
    module.explains = lambda report: "too many errors"  # type: ignore[attr-defined]
    module.number = 5  # type: ignore[attr-defined]
    return module


async def reason(**check: object) -> str | None:
    return await run_checks(Wave(rest=True, **check), REPORT)  # type: ignore[arg-type]


async def test_commands_decide_by_their_exit_status(tmp_path: Path) -> None:
    """They get the report as JSON and as variables; the first that fails is the reason, and the others do not run."""
    script = f"cat > {tmp_path}/report; echo $MIGRATION_RUN $MIGRATION_WAVE_NAME > {tmp_path}/variables"
    assert await reason(commands=[f"sh -c '{script}'", "true"]) is None
    assert '"failed": ["globex"]' in (tmp_path / "report").read_text()
    assert (tmp_path / "variables").read_text() == "17 canary\n"
    assert await reason(commands=["sh -c 'exit 3'", f"touch {tmp_path}/no"]) == (
        "command \"sh -c 'exit 3'\" exited with status 3"
    )
    assert not (tmp_path / "no").exists()
    assert await reason(commands=["sh -c 'kill -9 $$'"]) == "command \"sh -c 'kill -9 $$'\" was ended by signal 9"
    assert "No such file" in (await reason(commands=["/nowhere/check"]) or "")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"commands": ["true", "/nowhere/check --all"]}, "'/nowhere/check' is not a program that can be executed here"),
        ({"commands": [str(Path(__file__))]}, "is not a program that can be executed here"),
        ({"commands": ["  "]}, "a command is empty"),
        ({"commands": ["sh 'a"]}, "cannot be read: No closing quotation"),
        ({"functions": ["wave_checks:missing"]}, "'wave_checks:missing' cannot be loaded"),
        ({"functions": ["wave_checks:number"]}, "'wave_checks:number' is not a function"),
    ],
)
def test_a_check_that_cannot_be_found_is_refused_before_the_run(
    functions: types.ModuleType, check: dict[str, list[str]], message: str
) -> None:
    """After the canary it would pause the run; what is there passes, without running."""
    passing = Wave(name="first", percent=5, commands="false", functions="wave_checks:raises")
    require_checks(Waves((passing,)))
    with pytest.raises(ConfigurationError, match=f"wave 'second': .*{message}"):
        require_checks(Waves((passing, Wave(name="second", percent=5, **check))))  # type: ignore[arg-type]


async def test_a_command_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """With everything that it has started, in time; also where the run itself is interrupted."""
    command = f"sh -c 'sleep 600 & cat {tmp_path}/fifo; sleep 600'"
    os.mkfifo(tmp_path / "fifo")
    assert await reason(commands=[command], check_timeout=0.5) == f"command {command!r} took longer than 0.5 s"
    task = asyncio.create_task(reason(commands=[command]))
    await until(lambda: bool(processes_in(tmp_path)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # what a signal has ended is there until the kernel has done it
    await until(lambda: processes_in(tmp_path) == [])


async def test_functions_decide_by_what_they_return(functions: types.ModuleType) -> None:
    """Plain or async; False, a text or an error is a reason."""
    assert await reason(functions=["wave_checks:passes", "wave_checks:asynchronous"]) is None
    assert await reason(functions=["wave_checks:refuses"]) == "function wave_checks:refuses returned False"
    assert await reason(functions=["wave_checks:explains"]) == "function wave_checks:explains says: too many errors"
    assert (
        await reason(functions=["wave_checks:raises"]) == "function wave_checks:raises failed: LookupError: no metrics"
    )
    assert await reason(functions=["wave_checks:slow"], check_timeout=0.1) == (
        "function wave_checks:slow took longer than 0.1 s"
    )
    assert "is not a function" in (await reason(functions=["wave_checks:number"]) or "")
    assert "cannot be loaded" in (await reason(functions=["wave_checks:missing"]) or "")


async def test_a_function_that_does_not_end_does_not_keep_the_process() -> None:
    """It cannot be ended; nor can it end the process, as by sys.exit."""
    code = """
import asyncio, sys, time, types
from tenancy_orm.runs.checks import WaveReport, run_checks
from tenancy_orm.runs.waves import Wave, Waves
module = sys.modules["wave_checks"] = types.ModuleType("wave_checks")
module.hangs = lambda report: time.sleep(600)
module.exits = lambda report: sys.exit(7)
report = WaveReport(run=1, command="upgrade", target="head", wave=1, name="all", tenants=(), failed=())
for name in ("exits", "hangs"):
    print(asyncio.run(run_checks(Wave(rest=True, functions=f"wave_checks:{name}", check_timeout=0.2), report)))
"""
    async with asyncio.timeout(60):
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
        try:
            output, _ = await child.communicate()
        finally:
            if child.returncode is None:
                child.kill()
    assert output.decode().splitlines() == [
        "function wave_checks:exits failed: it raised SystemExit(7)",
        "function wave_checks:hangs took longer than 0.2 s",
    ]


def test_the_error_budget_is_a_share_of_the_wave() -> None:
    """None may fail where there is none."""
    assert over_budget(Wave(rest=True), REPORT) == "1 of 2 tenants failed in wave 'canary', none may: globex"
    assert "10 % may" in (over_budget(Wave(rest=True, error_budget=0.1), REPORT) or "")
    assert over_budget(Wave(rest=True, error_budget=0.5), REPORT) is None


def test_checks_are_sealed() -> None:
    """What somebody without the installation's key has written is not run."""
    keyring = Keyring({"1": b"1" * 32})
    waves = parse_waves(["5% command=true function=os.path:exists"])
    seal = seal_checks(keyring, waves, 7)
    assert is_sealed(keyring, waves, 7, seal)
    assert not is_sealed(keyring, waves, 8, seal), "of another run"
    changed = parse_waves(["5% command='rm -r /' function=os.path:exists"])
    other = Keyring({"1": b"2" * 32})
    for forged in (None, "", "no base64!", base64.b64encode(b"short").decode(), seal_checks(other, changed, 7), seal):
        assert not is_sealed(keyring, changed, 7, forged)
    assert seal_checks(keyring, parse_waves(["5%"]), 7) is None
    assert is_sealed(keyring, parse_waves(["5%"]), 7, None)
