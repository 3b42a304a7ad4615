"""Fault injection in small: a handful of seeded trials, and that its checker sees what it is there to see."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import sight, specs, stage, table
from chaos import trial as trials
from chaos.faults import REGISTRY, Fault
from chaos.main import ROOMS
from chaos.sight import Sight
from chaos.stage import Stage
from chaos.trial import Result, Trial
from processes import wait_until

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "chaos"
QUICK = ["agent-kill", "guardian-and-agent-kill", "worker-hidden", "worker-scrubbed", "cancel-fork", "worker-kill"]


@pytest.mark.timeout(170)
def test_a_handful_of_trials(tmp_path: Path) -> None:
    page = tmp_path / "faults.md"
    argv = [sys.executable, str(SCRIPT), "--trials", "6", "--seed", "42", "--fault", *QUICK, "--table", str(page)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=160, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "6 trials on local: nothing left, nobody hit"
    assert all(f"| {name} | local | - | 1 | 0 | 0 |" in page.read_text() for name in QUICK)


# --- the checker


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A trial's directory; whatever bears its mark is ended."""
    found = tmp_path / "mark"
    found.mkdir()
    (found / "mark").write_bytes(bytes(4096))
    yield found
    while left := Sight(found).workers():
        sight.kill(left)


@pytest.mark.parametrize("kind", ["daemon", "hidden", "scrubbed"])
def test_the_checker_sees_a_daemon_that_hides(place: Path, kind: str) -> None:
    leader = subprocess.Popen(specs.command(kind, place, "w/0"), env={}, start_new_session=True)
    eyes = Sight(place)
    wait_until(lambda: len(eyes.announced()) == 2, "the daemon to announce itself")
    leader.kill()
    leader.wait()
    (place / "announced").unlink()  # by its marks alone
    assert len(Sight(place).workers()) == 1


def test_the_checker_tells_what_was_left_and_who_was_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that leaves a process of the trial, and harms a decoy."""
    monkeypatch.setattr(trials, "SETTLE", 0.5)
    stray: list[subprocess.Popen[bytes]] = []

    def strike(trial: Trial) -> None:
        trial.struck()
        stray.append(subprocess.Popen(specs.command("plain", trial.place, "first/99"), start_new_session=True))
        decoy = next(one for one, words in trial.stage.innocents.those.items() if "command line" in words)
        sight.kill([decoy])

    fault = Fault(name="test", about="", strike=strike, moments=("ready",), ends=False)
    with Stage(tmp_path, "local", "").up() as on:
        result = Trial(on, tmp_path / "trial", 1, [fault]).run()
    stray[0].wait(stage.PATIENCE)  # ended by the trial, when it had told
    assert len(result.survivors) == 1
    assert "first/99" in result.survivors[0]
    assert [line for line in result.innocents if line.startswith("a process with a worker's command line")]
    assert any("is not in the journal" in line for line in result.failures)
    assert not result.ok


def test_rows_of_several_calls_make_one_page(tmp_path: Path) -> None:
    page = tmp_path / "faults.md"
    results = [Result(1, "agent-kill", seconds=1.0), Result(2, "agent-kill + head-kill", seconds=3.0, survivors=["x"])]
    table.merge(page, table.rows(results[:1], "local", "-"))
    table.merge(page, table.rows(results, "slurm", "pgid"))
    table.merge(page, table.rows(results[:1] * 2, "local", "-"))
    text = page.read_text()
    assert text.count("| agent-kill | local |") == 1
    assert "| agent-kill | local | - | 2 | 0 | 0 | 0 | 1.00 | 1.00 |" in text
    assert "| pairs: agent-kill | slurm | pgid | 1 | 1 | 0 | 0 | 3.00 | 3.00 |" in text
    assert "- 2 trials on local: nothing left, nobody hit" in text
    assert "- 2 trials on slurm: 1 processes left, nobody hit" in text


def test_every_fault_is_told() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--list"], capture_output=True, text=True, check=True, timeout=60
    )
    assert ROOMS
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(REGISTRY)
