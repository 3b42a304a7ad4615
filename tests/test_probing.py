"""`ps --probe` and `status --probe` of real runs whose head or agents are dead, deaf, or say otherwise."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from probed import Nodes, all_alive, reason, verdicts
from processes import wait_until
from running import Shell

from slurmfork import names, process
from slurmfork.errors import UsageError
from slurmfork.run import Run

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


@pytest.fixture
def nodes(local: Shell) -> Nodes:
    return Nodes(local)


def test_a_healthy_run(nodes: Nodes) -> None:
    found = nodes.probe()
    assert verdicts(found) == all_alive(nodes)
    assert [one["pid"] for one in found["workers"]] == [nodes.workers[one["worker"]].pid for one in found["workers"]]
    assert {(node["via"], node["ok"], node["agent"], node["reason"]) for node in found["nodes"]} == {
        ("here", True, "alive", "")
    }
    assert (found["unrecorded"], found["differences"]) == ([], [])
    assert nodes.probe(verb="status")["nodes"][0]["node"] == "local0"
    shown = nodes.shell.call("ps", nodes.run_id, "--probe").stdout.splitlines()
    assert shown[0].split()[:5] == ["WORKER", "NODE", "PID", "STATE", "PROBE"]
    assert shown[1].split()[:5] == ["rollout/0", "local0", str(nodes.workers["rollout/0"].pid), "running", "alive"]
    assert shown[-1].startswith("3 nodes (here) answered within")
    assert shown[-1].endswith("6 alive")
    nodes.shell.json("cancel", nodes.run_id)
    found = nodes.probe()
    assert {one["verdict"] for one in found["workers"]} == {"gone"}
    assert all(one["ended"] for one in found["workers"])
    assert {node["agent"] for node in found["nodes"]} == {"gone"}


def test_the_python_api(nodes: Nodes) -> None:
    run = Run.load(nodes.run_id, nodes.shell.root)
    assert {str(one.verdict) for one in run.probe().workers} == {"alive"}
    with pytest.raises(UsageError, match="via is auto, ssh or srun, not 'telnet'"):
        run.probe(via="telnet")
    with pytest.raises(UsageError, match="there is no srun"):
        run.probe(via="srun")


def test_options_that_need_one_another(nodes: Nodes) -> None:
    for arguments in (["ps", nodes.run_id, "--via", "ssh"], ["status", "--timeout", "3"], ["status", "--probe"]):
        done = nodes.shell.call(*arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert "--probe" in done.stderr


def test_an_agent_that_was_killed(nodes: Nodes) -> None:
    """Its guardian cannot clean up behind it yet: workers live, and nobody watches them."""
    with nodes.frozen(nodes.batch, nodes.head, *nodes.guardians.values()):
        nodes.kill(nodes.agents["local1"])
        gone = nodes.gone_with_the_agent("local1")
        found = nodes.probe()
        assert verdicts(found) == all_alive(nodes, **gone)
        assert [node["agent"] for node in found["nodes"]] == ["alive", "gone", "alive"]
        assert found["differences"] == [], "no head answers: nothing to compare with"


def test_a_head_that_was_killed(nodes: Nodes) -> None:
    everybody = [*nodes.guardians.values(), *nodes.agents.values()]
    with nodes.frozen(nodes.batch, *everybody):
        nodes.kill(nodes.head, nodes.workers["rollout/4"])
        found = nodes.probe()
        assert verdicts(found) == all_alive(nodes, _4="gone")
        assert nodes.probe(verb="status")["workers"] == found["workers"]
        shown = nodes.shell.call("ps", nodes.run_id, "--probe").stdout
        assert "the head does not answer: states are as it saw them" in shown


def test_a_head_that_says_otherwise(nodes: Nodes) -> None:
    """The agent hears nothing, so the head believes that its worker runs."""
    with nodes.frozen(nodes.guardians["local2"], nodes.agents["local2"]):
        nodes.kill(nodes.workers["rollout/5"])
        found = nodes.probe()
        assert verdicts(found) == all_alive(nodes, _5="gone")
        pid = nodes.workers["rollout/5"].pid
        assert found["differences"] == [f"rollout/5: the head says running, but pid {pid} on local2 is gone"]
        shown = nodes.shell.call("status", nodes.run_id, "--probe").stdout
        assert shown.splitlines()[-2:] == [found["differences"][0], "local2: its agent is stopped by a signal"]
        assert nodes.probe("--role", "rollout")["differences"] == found["differences"]


@pytest.mark.skipif(not (os.access(LAST_PID, os.W_OK) and os.geteuid() == 0), reason="nobody may choose PIDs here")
def test_a_pid_that_was_reused(nodes: Nodes) -> None:
    doomed = nodes.workers["rollout/2"]
    with nodes.frozen(nodes.batch, nodes.head, nodes.guardians["local1"], nodes.agents["local1"]):
        nodes.kill(nodes.agents["local1"], nodes.guardians["local1"], doomed)  # nobody is left to record its end
        gone = nodes.gone_with_the_agent("local1")
        decoy = occupy(doomed.pid)
        try:
            found = nodes.probe()
            expected = all_alive(nodes, **{**gone, "_2": "not ours"})
            if expected["rollout/3"] == "gone" and verdicts(found)["rollout/3"] == "not ours":
                expected["rollout/3"] = "not ours"  # its PID is the next, which somebody may have been given since
            assert verdicts(found) == expected
            assert reason(found, "rollout/2") == f"pid {doomed.pid} is another process by now (sleep)"
        finally:
            decoy.kill()
            decoy.wait()


def occupy(pid: int) -> subprocess.Popen[bytes]:
    """An innocent process with this PID."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.identify(pid) is None:
            LAST_PID.write_text(str(pid - 1))
        child = subprocess.Popen(["sleep", "1000"])
        if child.pid == pid:
            return child
        child.kill()
        child.wait()
    raise AssertionError(f"pid {pid} could not be had")


def test_what_no_record_names(nodes: Nodes) -> None:
    tag = {names.RUN_ID: nodes.run_id, names.NODE: "local1", names.WORKER: "rollout/9"}
    stray = subprocess.Popen(["sleep", "999"], env={**os.environ, **tag})
    wait_until(lambda: process.environ(stray.pid, names.WORKER), "the stray to be there")
    try:
        found = nodes.probe()
        told = {"node": "local1", "pid": stray.pid, "worker": "rollout/9", "command": "sleep 999"}
        assert found["unrecorded"] == [told]
        shown = nodes.shell.call("ps", nodes.run_id, "--probe").stdout
        assert f"rollout/9: no record names pid {stray.pid} on local1 (sleep 999)" in shown
    finally:
        stray.kill()
        stray.wait()


def test_journals_that_are_damaged_or_gone(nodes: Nodes) -> None:
    first, second, third = (nodes.directory.journal(f"local{index}") for index in range(3))
    kept = third.read_bytes()
    first.rename(first.with_suffix(".away"))
    lines = second.read_bytes().splitlines(keepends=True)
    second.write_bytes(b"".join(b"?" + line if b'"rollout/3"' in line else line for line in lines))
    third.write_bytes(kept.replace(process.boot_id().encode(), b"of-another-boot"))
    pid = nodes.workers["rollout/0"].pid
    with nodes.frozen(nodes.guardians["local0"], nodes.agents["local0"]):
        nodes.kill(nodes.workers["rollout/1"])
        found = nodes.probe(status=1)
    assert verdicts(found) == all_alive(nodes, _1="unknown", _4="unknown", _5="unknown")
    assert reason(found, "rollout/0") == f"local0 has no journal, but pid {pid} carries its name"
    assert reason(found, "rollout/1") == "not verified: local0 has no journal"
    assert "damaged line" in reason(found, "rollout/3")
    assert "is not the machine on which its workers were started" in reason(found, "rollout/4")
    assert found["nodes"][0]["notes"] == ["local0 has no journal", "its agent is stopped by a signal"]
    assert found["unrecorded"] == [], "they are below their agents"
    first.with_suffix(".away").rename(first)
    third.write_bytes(kept)
