"""Whole runs on the local backend: how they start and end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys

from processes import kill_at_once, wait_until
from running import Shell, command_of

from slurmfork.scratch import node_directory


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


def agent_on(local: Shell, run_id: str, node: str) -> int:
    """The PID of a node's agent."""
    pid: int = next(view["agent_pid"] for view in local.status(run_id)["nodes"] if view["node"] == node)
    return pid


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
    agent = agent_on(local, run_id, "local1")
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


SLOW_START = """
    name: slow
    local: {gpus-per-node: 2}
    roles:
      rollout:
        replicas: 2
        gpus: 1
        ready: {notify: true}
        command: [python3, -c, "%s"]
      reference:
        strategy: {type: colocation, target: rollout}
        command: [sleep, "1001"]
"""
READY_WHEN_TOLD = (
    "import os, socket, time; "
    "gate = os.path.join(os.environ['SLURMFORK_RUN_DIR'], 'gate'); "
    "[time.sleep(0.02) for _ in iter(lambda: os.environ['RANK'] == '0' or os.path.exists(gate), True)]; "
    "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', os.environ['NOTIFY_SOCKET']); "
    "time.sleep(1000)"
)


def half_started(local: Shell) -> str:
    """A run of which rollout/0 is ready, and reference waits for rollout/1."""
    run_id = local.submit(local.spec(SLOW_START % READY_WHEN_TOLD), "--backend", "local")
    wait_until(lambda: states(local, run_id).get("rollout/0") == "ready", "rollout/0 to be ready")
    assert states(local, run_id)["reference/1"] == "pending"
    return run_id


def states(local: Shell, run_id: str) -> dict[str, str]:
    return {view["worker"]: view["state"] for view in local.ps(run_id)}


def open_gate(local: Shell, run_id: str) -> None:
    (local.root / run_id / "gate").touch()
    assert local.call("wait", run_id, "--for", "ready").returncode == 0


def test_a_role_that_is_about_to_start_is_not_forked(local: Shell) -> None:
    run_id = half_started(local)
    done = local.call("fork", run_id, "reference", "--target", "rollout/0")
    assert done.returncode == 1
    assert "role reference is about to start" in done.stderr
    open_gate(local, run_id)
    assert set(states(local, run_id).values()) == {"ready", "running"}


def test_a_role_that_is_stopped_before_its_turn_does_not_start(local: Shell) -> None:
    run_id = half_started(local)
    local.json("stop", run_id, "reference")
    open_gate(local, run_id)
    assert {state for name, state in states(local, run_id).items() if name.startswith("reference")} == {"stopped"}


STUBBORN = """
    name: stubborn
    local: {gpus-per-node: 2}
    roles:
      rollout: {replicas: 2, gpus: 1, on_failure: ignore, command: [sleep, "1000"]}
      stubborn:
        strategy: {type: colocation, target: rollout}
        autostart: false
        stop: {grace: 1}
        command: "trap '' TERM; while :; do sleep 0.2; done"
      never:
        strategy: {type: colocation, target: rollout}
        autostart: false
        ports: 1
        ready: {tcp: true, timeout: 600}
        command: [sleep, "1002"]
"""


def test_a_cancel_cuts_a_long_stop_short(local: Shell) -> None:
    run_id = local.ready(local.spec(STUBBORN), "--backend", "local")
    local.json("fork", run_id, "stubborn")
    stop = local.start("stop", run_id, "stubborn", "--grace", "3600")
    wait_until(lambda: "stubborn/0: stopping" in local.logs(run_id), "the stop to have begun")
    assert local.json("cancel", run_id)["survivors"] == 0
    stop.communicate(timeout=60)


def test_a_fork_whose_target_ends_is_told_so_at_once(local: Shell) -> None:
    run_id = local.ready(local.spec(STUBBORN), "--backend", "local")
    fork = local.start("fork", run_id, "never")
    wait_until(lambda: states(local, run_id).get("never/1") == "starting", "the children to start")
    target = next(view for view in local.ps(run_id) if view["worker"] == "rollout/1")
    os.kill(target["pid"], signal.SIGKILL)
    _, words = fork.communicate(timeout=60)
    assert (fork.returncode, "the target ended during the fork: rollout/1" in words) == (1, True)
    assert not any(command_of(pid) == ["sleep", "1002"] for pid in local.pids(run_id))


def test_an_agent_that_does_not_come_is_told_with_its_last_words(local: Shell) -> None:
    spec = local.spec("name: absent\nnodes: 2\nroles: {w: {command: [sleep, '1000']}}\n")
    run_id = local.submit(spec, "--backend", "local")
    path = local.root / run_id / "journal" / "local1.jsonl"
    path.symlink_to("/dev/null")
    assert local.call("wait", run_id).returncode == 1
    assert "the agent of local1 ended with 1 before it joined" in local.status(run_id)["reason"]


def test_a_node_whose_agent_was_killed_keeps_no_scratch(local: Shell) -> None:
    spec = local.spec("name: killed\nroles: {w: {command: [sh, -c, 'touch $TMPDIR/file; exec sleep 1000']}}\n")
    run_id = local.ready(spec, "--backend", "local")
    node = local.status(run_id)["nodes"][0]
    place = node_directory(run_id, node["node"])
    wait_until(lambda: (place / "t" / "w-0" / "file").exists(), "the worker to write to its scratch")
    os.kill(node["agent_pid"], signal.SIGKILL)
    assert local.call("wait", run_id).returncode == 137
    assert f"the agent on {node['node']} was ended by signal 9" in local.status(run_id)["reason"]
    wait_until(lambda: not place.exists(), "the guardian to remove the scratch")


def test_a_sweep_removes_the_scratch_of_a_node_that_lost_agent_and_guardian(local: Shell) -> None:
    spec = local.spec("name: killed\nroles: {w: {command: [sh, -c, 'touch $TMPDIR/file; exec sleep 1000']}}\n")
    run_id = local.ready(spec, "--backend", "local")
    node = local.status(run_id)["nodes"][0]
    place = node_directory(run_id, node["node"])
    kill_at_once(node["guardian_pid"], node["agent_pid"])
    assert local.call("wait", run_id).returncode == 137
    wait_until(lambda: not place.exists(), "the batch script's sweep to remove the scratch")


def test_a_cancel_sweeps_the_node_of_an_agent_that_hangs(local: Shell) -> None:
    spec = local.spec("name: hang\nnodes: 2\nroles: {w: {per_node: 3, command: [sleep, '1000']}}\n")
    run_id = local.ready(spec, "--backend", "local")
    os.kill(
        next(node["agent_pid"] for node in local.status(run_id)["nodes"] if node["node"] == "local1"), signal.SIGSTOP
    )
    reply = local.json("cancel", run_id)
    assert (reply["state"], reply["survivors"], reply["unverified"]) == ("cancelled", 0, [])
    assert local.left(run_id) == []


def test_a_run_goes_on_without_a_node_where_the_spec_says_so(local: Shell) -> None:
    spec = local.spec(
        """
        name: goeson
        nodes: 2
        on_node_fail: continue
        roles:
          w: {per_node: 1, command: [sleep, "1000"]}
        """
    )
    run_id = local.ready(spec, "--backend", "local")
    os.kill(
        next(node["agent_pid"] for node in local.status(run_id)["nodes"] if node["node"] == "local1"), signal.SIGKILL
    )
    wait_until(lambda: states(local, run_id)["w/1"] == "failed", "the loss of local1 to be told")
    assert local.status(run_id)["state"] == "ready"
    assert states(local, run_id)["w/0"] == "running"
    reply = local.json("cancel", run_id)
    assert (reply["state"], reply["survivors"], reply["unverified"]) == ("cancelled", 0, [])


SAVES = "import signal, sys, time; signal.signal(signal.SIGUSR2, lambda *_: print('saved', flush=True)); "


def test_a_warning_reaches_the_workers_that_asked_for_it(local: Shell) -> None:
    spec = local.spec(
        f"""
        name: warned
        roles:
          careful:
            checkpoint: {{signal: SIGUSR2, before: 30}}
            ready: {{notify: true}}
            command: [python3, -c, "{SAVES}{READY_WHEN_TOLD}"]
          plain: {{command: [sleep, "1000"]}}
        """
    )
    run_id = local.ready(spec, "--backend", "local")
    plain = next(view for view in local.ps(run_id) if view["role"] == "plain")
    os.kill(int(local.status(run_id)["job_id"]), signal.SIGUSR1)
    log = local.root / run_id / "logs" / "careful-0.log"
    wait_until(lambda: "saved" in log.read_text(), "the worker to hear of it")
    assert [view["pid"] for view in local.ps(run_id, "plain")] == [plain["pid"]]


def test_a_run_whose_batch_script_was_killed_ends_by_itself(local: Shell) -> None:
    run_id = local.ready(local.spec(STUBBORN), "--backend", "local")
    os.kill(int(local.status(run_id)["job_id"]), signal.SIGKILL)
    assert local.call("wait", run_id).returncode == 1
    status = local.status(run_id)
    assert (status["state"], status["survivors"]) == ("cancelled", 0), status
    wait_until(lambda: local.left(run_id) == [], "all of it to be gone")


LATE = """#!/bin/sh
case "$*" in *head/__main__.py*)
    touch "$0.begun"
    while kill -0 {script} 2>/dev/null; do sleep 0.02; done
esac
exec {python} "$@"
"""


def test_a_run_whose_batch_script_was_killed_before_its_head_was_there_ends_by_itself(local: Shell) -> None:
    late = local.directory / "late"
    late.write_text(LATE.format(script="$PPID", python=shlex.quote(sys.executable)))
    late.chmod(0o700)
    spec = local.spec(json.dumps({**STEADY, "setup": f"slurmfork_python={shlex.quote(str(late))}"}))
    run_id = local.submit(spec, "--backend", "local")
    wait_until(late.with_suffix(".begun").exists, "the head to be started")
    os.kill(int(local.status(run_id)["job_id"]), signal.SIGKILL)
    end = local.root / run_id / "end.json"
    wait_until(end.exists, "the head to end the run")
    wait_until(lambda: local.left(run_id) == [], "all of it to be gone")
    assert local.status(run_id)["state"] == "cancelled"


STEADY = {"name": "steady", "roles": {"w": {"command": ["sleep", "1000"]}}}
