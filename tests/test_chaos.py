"""Fault injection in small: a handful of seeded trials, and that its checker sees what it is there to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import end, sight, specs, stage
from chaos.faults import REGISTRY, Fault
from chaos.main import ROOMS
from chaos.result import Batch, Result, load, save
from chaos.sight import Sight
from chaos.stage import Stage
from chaos.trial import Trial
from namespaced import may_make_namespaces
from processes import wait_until

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "chaos"
QUICK = ["agent-kill", "guardian-and-agent-kill", "worker-hidden", "worker-scrubbed", "cancel-fork", "worker-kill"]


@pytest.mark.timeout(170)
def test_a_handful_of_trials(tmp_path: Path) -> None:
    results = tmp_path / "local.json"
    argv = [sys.executable, str(SCRIPT), "--trials", "6", "--seed", "42", "--fault", *QUICK]
    done = subprocess.run(
        [*argv, "--jobs", "2", "--results", str(results)], capture_output=True, text=True, timeout=160, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("6 trials on local: nothing left, nobody hit")
    (batch,) = load(results)
    assert sorted(one.fault for one in batch.results) == sorted(QUICK)
    assert sorted(one.seed for one in batch.results) == list(range(42, 48))


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
    monkeypatch.setattr(end, "SETTLE", 0.5)
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


HOW = {
    "version": "1",
    "commit": "abc",
    "options": "--trials 2",
    "kernel": "Linux 6",
    "python": "3",
    "cpus": "2",
    "slurm": "",
    "began": "today",
}


def test_batches_of_several_calls_make_one_page(tmp_path: Path) -> None:
    """Batches are added to a file, several files to one page; what is left says whether a clean was due."""
    results = [Result(1, "agent-kill", seconds=1.0), Result(2, "agent-kill + head-kill", seconds=3.0, left=["/a/b x"])]
    cleaned = Result(3, "keepers-and-tag-gone", left=["y"], due=True)
    first, second, page = tmp_path / "first.json", tmp_path / "second.json", tmp_path / "faults.md"
    save(
        first, [Batch("local", "-", HOW, results[:1]), Batch("local", "-", HOW, [Result(4, "agent-kill", missed=True)])]
    )
    save(second, [Batch("slurm", "pgid", HOW, [*results, cleaned]), Batch("slurm", "cgroup", HOW, results[:1] * 2)])
    argv = [sys.executable, str(SCRIPT), "--table", str(page), "--from", str(first), str(second), str(first)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    text = page.read_text()
    assert "| agent-kill | local | - | 1 | 0 | 0 | 0 | 1.00 | 1.00 |" in text
    assert "| came too late | local | - | 1 |" in text
    assert "| agent-kill | slurm | cgroup | 2 | 0 | 0 | 0 | 1.00 | 1.00 |" in text
    assert "| keepers-and-tag-gone | slurm | pgid | 1 | 1 | 0 | 0 | - | - |" in text
    assert "| pairs: agent-kill | slurm | pgid | 1 | 1 | 0 | 0 | 3.00 | 3.00 |" in text
    assert "- slurm with proctrack/pgid, seed 2, agent-kill + head-kill: 1 processes left" in text
    assert "- slurm with proctrack/pgid, `--trials 2`: 3 trials of slurmfork 1 (commit abc)" in text
    words = "5 trials on slurm: 1 processes left, nobody hit; 1 needed `slurmfork clean`; "
    words += "failed: 2 (agent-kill + head-kill)"
    assert "- 2 trials on local: nothing left, nobody hit" in text
    assert text.splitlines()[-1] == f"- {words}"
    assert done.stdout.splitlines()[-1] == words


def test_a_failure_that_was_mended_is_told_apart(tmp_path: Path) -> None:
    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    failed = [Result(1, "agent-kill", left=["x"]), Result(2, "agent-kill", failures=["odd"])]
    save(
        kept,
        [Batch("local", "-", HOW, failed), Batch("local", "-", {**HOW, "commit": "def"}, [Result(1, "agent-kill")])],
    )
    argv = [sys.executable, str(SCRIPT), "--table", str(page), "--from", str(kept)]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False).returncode == 1
    did_not, _, mended = page.read_text().partition("## What held only when it was tried again")
    assert "- local, seed 2, agent-kill: odd" in did_not
    assert "- local, seed 1, agent-kill: 1 processes left (commit abc)" in mended
    assert "| agent-kill | local | - | 2 | 0 | 0 | 0 | - | - |" in did_not


def test_those_in_namespaces_have_a_page_of_their_own(tmp_path: Path) -> None:
    """There all that was left counts. Files of before there were namespaces are of runs without."""
    both, page = tmp_path / "both.json", tmp_path / "page.md"
    isolated = Batch("local", "-", HOW, [Result(1, "guardian-and-agent-kill", left=["x"])], isolation="namespace")
    save(both, [isolated])
    argv = [sys.executable, str(SCRIPT), "--table", str(page), "--from", str(both)]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False).returncode == 1
    assert page.read_text().startswith("# Faults, with `isolation: namespace`")
    assert "- 1 trial on local, isolation namespace: 1 processes left" in page.read_text()
    before = json.loads(both.read_text())
    del before["batches"][0]["isolation"]
    both.write_text(json.dumps({"batches": [*json.loads(both.read_text())["batches"], *before["batches"]]}))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "do not go on one page" in done.stderr) == (2, True)


@pytest.mark.skipif(not may_make_namespaces(), reason="no PID namespaces for this user on this machine")
def test_the_checker_knows_who_announces_itself_in_a_namespace(place: Path) -> None:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    within = ["unshare", *user, "--pid", "--fork", "--kill-child", "--mount-proc"]
    parent = subprocess.Popen([*within, *specs.command("daemon", place, "w/0")], start_new_session=True)
    eyes = Sight(place)
    wait_until(lambda: len(eyes.announced()) == 2, "the daemon to announce itself")
    lines = eyes.announced()
    assert all(line.inside and sight.lives(line.who) for line in lines)
    assert sight.parent(next(line.who.pid for line in lines if line.leader)) == parent.pid
    sight.kill([line.who for line in lines])
    wait_until(lambda: not any(sight.lives(line.who) for line in lines), "them to end")
    parent.wait(stage.PATIENCE)
    late = Sight(place).announced()  # when they are gone nobody can say who they were
    assert [line.who for line in late if sight.lives(line.who)] == []
    assert all(line.who.pid < 0 for line in late)


def test_a_file_of_something_else_is_no_results(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    argv = [sys.executable, str(SCRIPT), "--from", str(tmp_path / "x.json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "holds no results" in done.stderr


def test_every_fault_is_told() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--list"], capture_output=True, text=True, check=True, timeout=60
    )
    assert ROOMS
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(REGISTRY)
