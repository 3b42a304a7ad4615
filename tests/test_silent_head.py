"""A head that has gone silent, or has a fault: nobody waits for it, and cancel goes on without it."""

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
from running import Shell

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
