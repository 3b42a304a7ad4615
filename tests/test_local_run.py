"""Whole runs on the local backend: how they start and end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from processes import wait_until
from running import Shell, command_of

PAIR = """
    name: pair
    local: {gpus-per-node: 1}
    roles:
      rollout: {gpus: 1, command: [sleep, "1000"]}
      probe:
        strategy: {type: colocation, target: rollout}
        autostart: false
        ready: {notify: true, timeout: 100}
        command: [sleep, "1001"]
"""


@contextmanager
def stopped_head(shell: Shell, run_id: str) -> Iterator[None]:
    """The head of a run says nothing meanwhile."""
    pid = json.loads((shell.root / run_id / "head.json").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_failure_that_is_ignored_holds_up_nothing(local: Shell) -> None:
    spec = local.spec(
        """
        name: ignored
        roles:
          flaky: {on_failure: ignore, command: [sh, -c, "exit 3"], ready: {notify: true}}
          steady: {command: [sleep, "1000"]}
        """
    )
    run_id = local.ready(spec, "--backend", "local")
    states = {view["worker"]: (view["state"], view["exit_status"]) for view in local.ps(run_id)}
    assert states == {"flaky/0": ("failed", 3), "steady/0": ("running", None)}


def test_a_fork_on_an_agent_that_hangs_is_refused_in_its_time_and_leaves_nothing(local: Shell) -> None:
    spec = local.spec(
        """
        name: hang
        local: {gpus-per-node: 1}
        nodes: 2
        roles:
          rollout: {replicas: 2, gpus: 1, command: [sleep, "1000"]}
          eval:
            strategy: {type: colocation, target: rollout}
            autostart: false
            command: [sleep, "1001"]
        """
    )
    run_id = local.ready(spec, "--backend", "local")
    agent = next(node["agent_pid"] for node in local.status(run_id)["nodes"] if node["node"] == "local1")
    os.kill(agent, signal.SIGSTOP)
    try:
        done = local.call("fork", run_id, "eval", "--timeout", "1")
        assert done.returncode == 1
        assert "the agent on node local1 did not answer within 1 s" in done.stderr
        wait_until(lambda: local.status(run_id)["nodes"][1]["silent"], "the agent to be told silent")
    finally:
        os.kill(agent, signal.SIGCONT)
    wait_until(lambda: not local.status(run_id)["nodes"][1]["silent"], "the agent to answer again")
    # What it was told while it hung it has heard in order: to start, and to stop.
    assert len(local.json("fork", run_id, "eval")["workers"]) == 2
    children = [one for one in map(command_of, local.pids(run_id)) if one == ["sleep", "1001"]]
    assert len(children) == 2


def test_a_fork_does_not_wait_for_a_head_that_has_gone_silent(local: Shell) -> None:
    run_id = local.ready(local.spec(PAIR), "--backend", "local")
    forking = local.start("fork", run_id, "probe")
    wait_until(lambda: local.ps(run_id, "probe"), "the fork to be under way")
    with stopped_head(local, run_id):
        asking = [forking, local.start("stop", run_id, "rollout")]  # one has its connection, one does not get any
        said = [one.communicate(timeout=60)[1] for one in asking]
    assert said == [f"slurmfork: the head of run {run_id} does not answer\n"] * 2
    assert [one.returncode for one in asking] == [1, 1]
    assert local.status(run_id)["state"] == "ready"
