"""Whole runs on the local backend: how they start and end."""

from __future__ import annotations

import http.server
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from processes import wait_until
from running import Shell, command_of, environ_of

from slurmfork import credentials, process
from slurmfork import run as runs
from slurmfork.run import Run

PAIR = """
    name: pair
    local: {gpus-per-node: 1}
    roles:
      rollout: {gpus: 1, stop: {grace: 1}, command: [sleep, "1000"]}
      probe:
        strategy: {type: colocation, target: rollout}
        autostart: false
        ready: {notify: true, timeout: 100}
        stop: {grace: 1}
        command: [sleep, "1001"]
"""


def head_pid(shell: Shell, run_id: str) -> int:
    pid: int = json.loads((shell.root / run_id / "head.json").read_text())["pid"]
    return pid


@contextmanager
def stopped_head(shell: Shell, run_id: str) -> Iterator[None]:
    """The head of a run says nothing meanwhile."""
    pid = head_pid(shell, run_id)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
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


def test_what_was_not_asked_is_not_said_to_have_refused_to_die(local: Shell) -> None:
    run_id = local.ready(local.spec(PAIR), "--backend", "local")
    agent = local.status(run_id)["nodes"][0]["agent_pid"]
    os.kill(agent, signal.SIGSTOP)
    try:
        wait_until(lambda: local.status(run_id)["nodes"][0]["silent"], "the agent to be told silent")
        done = local.call("stop", run_id, "rollout")
    finally:
        os.kill(agent, signal.SIGCONT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("  rollout/0: not verified: the agent on node local0 did not answer")
    assert done.stderr.endswith("slurmfork: 1 worker of rollout may still run; try again\n")


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


def test_a_cancel_has_a_stopped_head_go_on_and_end_in_order(local: Shell) -> None:
    run_id = local.ready(local.spec(PAIR), "--backend", "local")
    with stopped_head(local, run_id):
        done = local.call("cancel", run_id)
    assert (done.returncode, done.stdout) == (0, f"{run_id}: cancelled, 0 survivors\n"), done.stderr
    assert "ended from outside" in local.status(run_id)["reason"]


def test_a_head_that_nothing_moves_is_killed_and_its_agents_are_swept(
    local: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = local.ready(local.spec(PAIR), "--backend", "local")
    script, head = process.identify(int(local.status(run_id)["job_id"])), process.identify(head_pid(local, run_id))
    assert script
    assert head
    over = threading.Event()

    def keep_it_stopped() -> None:
        while not over.wait(0.002):
            process.send(head, signal.SIGSTOP)

    keeper = threading.Thread(target=keep_it_stopped)
    keeper.start()
    monkeypatch.setattr(runs, "END_MARGIN", 1.0)
    try:
        reply = Run.load(run_id, local.root).cancel()
    finally:
        over.set()
        keeper.join()
    assert (reply.state, reply.survivors, reply.unverified) == ("cancelled", 0, [])
    assert (process.alive(script), process.alive(head), local.left(run_id)) == (False, False, [])
    assert local.status(run_id)["state"] == "cancelled"


def test_a_secret_and_what_a_worker_is_told_of_itself_stay_out_of_the_batch_script(local: Shell) -> None:
    local.env |= {"MYSECRET": "x", "SLURMFORK_WORKER": "outer/3", "RANK": "3", "TMPDIR": str(local.directory)}
    run_id = local.ready(local.spec(PAIR + "    secrets: [MYSECRET]\n"), "--backend", "local")
    [node] = local.status(run_id)["nodes"]
    for pid in (int(local.status(run_id)["job_id"]), head_pid(local, run_id), node["agent_pid"]):
        assert not {"MYSECRET", "SLURMFORK_WORKER", "RANK", "TMPDIR"} & environ_of(pid).keys()
    seen = environ_of(local.ps(run_id)[0]["pid"])
    assert (seen["MYSECRET"], seen["RANK"]) == ("x", "0")


class Faulty(http.server.BaseHTTPRequestHandler):
    """A head with a fault, whatever it is asked."""

    def do_POST(self) -> None:
        answer = b'{"error": "fault in the head: ValueError: x", "kind": "internal"}'
        self.send_response(500)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def test_a_head_with_a_fault_does_not_keep_the_job_from_being_cancelled(local: Shell) -> None:
    run_id = local.ready(local.spec(PAIR), "--backend", "local")
    record = local.root / run_id / "head.json"
    with http.server.HTTPServer(("127.0.0.1", 0), Faulty) as faulty:
        faulty.socket = credentials.server_context(record.parent / "credentials").wrap_socket(
            faulty.socket, server_side=True
        )
        threading.Thread(target=faulty.serve_forever, daemon=True).start()
        place = {"addresses": ["127.0.0.1"], "port": faulty.server_port}
        record.write_text(json.dumps({**json.loads(record.read_text()), **place}))
        done = local.call("cancel", run_id)
        faulty.shutdown()
    assert (done.returncode, done.stdout) == (0, f"{run_id}: cancelled, 0 survivors\n"), done.stderr


def test_setup_lines_that_ignore_sigterm_are_killed(local: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = local.spec(
        """
        name: deaf
        setup: trap "" TERM; touch "$SLURMFORK_RUN_DIR/begun"; sleep 1000
        roles:
          a: {stop: {grace: 0}, command: [sleep, "1000"]}
        """
    )
    run_id = local.submit(spec, "--backend", "local")
    wait_until((local.root / run_id / "begun").exists, "the setup lines")
    monkeypatch.setattr(runs, "END_MARGIN", 1.0)
    assert Run.load(run_id, local.root).cancel().survivors == 0
    assert local.left(run_id) == []
