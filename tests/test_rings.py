"""The five rings that see to it that nothing is left, each by a fault that it alone catches, on real runs.

A test here fails when its ring is taken out, and no other ring's does but where the design says so: what journal
and tag know of is ended by the sweep. `scripts/rings` takes each out and shows it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Yard, argv, freeze, kill_at_once, wait_until
from running import Shell

from slurmfork import journal, names, process
from slurmfork.process import Identity
from slurmfork.rundir import RunDir

SHED = "</dev/null >/dev/null 2>&1"  # what holds a log open would be known by that


@pytest.fixture
def yard(tmp_path: Path, local: Shell) -> Iterator[Yard]:
    """Where the processes of these runs announce themselves; ends, and tells of, what of them was left."""
    with Yard(tmp_path) as yard:
        os.mkfifo(yard.directory / "go")
        yield yard


def awkward(yard: Yard, kind: str, name: str) -> str:
    """A piece of shell that becomes an awkward process."""
    return shlex.join(argv(kind, yard.directory, name))


def waits(yard: Yard) -> str:
    """A piece of shell that waits for ``go``, and starts nothing for that."""
    return f"read _ <{shlex.quote(str(yard.directory / 'go'))}"


def go(yard: Yard) -> None:
    (yard.directory / "go").write_text("now\n")


def begin(local: Shell, yard: Yard, script: str) -> str:
    """A run with a worker ``w`` that is this piece of shell, and a plain one, ``other``."""
    scripts = {"w": script, "other": f"exec {awkward(yard, 'plain', 'other')}"}
    role = {"on_failure": "ignore", "stop": {"grace": 1}}
    roles = {name: {**role, "command": ["sh", "-c", script]} for name, script in scripts.items()}
    run_id = local.ready(local.spec(json.dumps({"name": "ring", "roles": roles})), "--backend", "local")
    yard.await_one("other")
    return run_id


def keepers(local: Shell, run_id: str) -> tuple[int, int]:
    """PIDs of guardian and agent."""
    node = local.status(run_id)["nodes"][0]
    return node["guardian_pid"], node["agent_pid"]


def recorded(local: Shell, run_id: str) -> set[Identity]:
    """Whom the journal of the run's node has as not ended."""
    return {one.identity for one in journal.living(journal.read(RunDir(local.root / run_id).journal("local0")))}


def carries_tag(one: Identity) -> bool:
    return names.RUN_ID in (process.environ(one.pid) or {})


def assert_ends_with_nothing_left(local: Shell, yard: Yard, run_id: str) -> None:
    local.call("wait", run_id)
    assert (yard.living(), local.left(run_id)) == ([], [])


def test_the_agent_stops_a_daemon_that_shed_everything_while_the_run_goes_on(local: Shell, yard: Yard) -> None:
    """Its parent is dead, it has no environment and no log, is in a session of its own: it fell to the agent."""
    daemon = f"env -i setsid {awkward(yard, 'plain', 'daemon')} {SHED}"
    run_id = begin(local, yard, f"({daemon} & {waits(yard)}) & exec {awkward(yard, 'plain', 'leader')}")
    one = yard.await_one("daemon")
    wait_until(lambda: one in recorded(local, run_id), "the agent to have seen it below its worker")
    between = process.ancestors(one.pid)
    go(yard)
    wait_until(lambda: process.ancestors(one.pid) < between, "its parent to end")
    assert not carries_tag(one)
    assert local.json("stop", run_id, "w")["survivors"] == 0
    assert yard.living() == ["other"]
    assert [view["state"] for view in local.ps(run_id, "other")] == ["running"]
    local.json("cancel", run_id)


def test_the_journal_knows_a_worker_that_carries_no_tag(local: Shell, yard: Yard) -> None:
    """Guardian and agent are killed at one blow, and it has no log, so nothing leads to it but its record."""
    run_id = begin(local, yard, f"exec env -i {awkward(yard, 'plain', 'bare')} {SHED}")
    one = yard.await_one("bare")
    assert not carries_tag(one)
    kill_at_once(*keepers(local, run_id))
    assert_ends_with_nothing_left(local, yard, run_id)


def test_the_tag_finds_what_nobody_has_seen(local: Shell, yard: Yard) -> None:
    """A daemon that was born when the agent could not look any more, of a worker that is dead itself."""
    run_id = begin(local, yard, f"{waits(yard)}; exec {awkward(yard, 'daemon', 'late')} {SHED}")
    guardian, agent = keepers(local, run_id)
    freeze(guardian, agent)
    go(yard)
    one = yard.await_one("late")
    kill_at_once(guardian, agent)
    assert one not in recorded(local, run_id)
    assert_ends_with_nothing_left(local, yard, run_id)


def test_the_guardian_ends_what_only_its_place_in_the_tree_gives_away(local: Shell, yard: Yard) -> None:
    """A daemon with no tag, born when the agent could not look any more, which is then killed."""
    run_id = begin(
        local,
        yard,
        f"{waits(yard)}; {awkward(yard, 'scrubbed', 'hidden')} {SHED}; exec {awkward(yard, 'plain', 'leader')}",
    )
    _, agent = keepers(local, run_id)
    freeze(agent)
    go(yard)
    one = yard.await_one("hidden")
    assert not carries_tag(one)
    os.kill(agent, signal.SIGKILL)
    assert one not in recorded(local, run_id)
    assert_ends_with_nothing_left(local, yard, run_id)


def test_the_sweep_ends_what_lost_its_agent_and_its_guardian(local: Shell, yard: Yard) -> None:
    """It is recorded and carries the tag, so that either would do; nobody is left on the node to look."""
    run_id = begin(local, yard, f"exec {awkward(yard, 'plain', 'worker')}")
    yard.await_one("worker")
    kill_at_once(*keepers(local, run_id))
    assert_ends_with_nothing_left(local, yard, run_id)


def test_each_ring_can_still_be_taken_out() -> None:
    script = Path(__file__).resolve().parent.parent / "scripts" / "rings"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
