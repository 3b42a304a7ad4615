"""Whole runs on the local backend: how they start and end."""

from __future__ import annotations

import os
import signal

from processes import wait_until
from running import Shell, command_of


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
