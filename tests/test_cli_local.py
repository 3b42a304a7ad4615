"""The command line against living runs on this machine, as users have them: each verb in its own process."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from processes import wait_until
from running import GUARANTEE, Shell

from slurmfork import process

SPEC = """
    name: demo
    backend: local
    local: {gpus-per-node: 2}
    roles:
      rollout:
        replicas: 2
        gpus: 1
        command: [sh, -c, 'echo up $SLURMFORK_WORKER; exec sleep 1000']
      eval:
        strategy: {type: colocation, target: rollout}
        autostart: false
        command: [sh, -c, 'echo evaluating with $X; exec sleep 1001']
      probe:
        strategy: {type: colocation, target: rollout}
        autostart: false
        ready: {notify: true, timeout: 100}
        command: [sh, -c, 'echo out of memory; exit 4']
"""
MAIN = """
    name: main
    backend: local
    roles:
      side: {command: [sleep, "1000"]}
      main:
        main: true
        command: [sh, -c, 'echo first; echo second >&2; exit %d']
"""
FAILS = """
    name: fails
    backend: local
    roles:
      good: {command: [sleep, "1000"]}
      bad:
        ready: {notify: true, timeout: 100}
        command: [sh, -c, 'echo no license; exit 9']
"""
STUBBORN = """
    name: stubborn
    backend: local
    roles:
      a:
        stop: {grace: %s}
        command: [sh, -c, 'trap "echo not yet" TERM; echo up; while :; do sleep 0.1; done']
"""


@pytest.fixture
def run_id(local: Shell) -> str:
    return local.ready(local.spec(SPEC))


def only_run(shell: Shell) -> str:
    """The id of the one run that there is; remembered, so that the shell ends it."""
    wait_until(lambda: shell.root.is_dir() and list(shell.root.glob("*/run.json")), "a run directory")
    [record] = shell.root.glob("*/run.json")
    if record.parent.name not in shell.runs:
        shell.runs.append(record.parent.name)
    return record.parent.name


def nothing_left(shell: Shell, run_id: str) -> None:
    wait_until(lambda: not shell.left(run_id), "the run's processes to end")


def read_until(stream: IO[str], words: str) -> str:
    """Lines of a stream until one has the words."""
    read = ""
    for line in stream:
        read += line
        if words in line:
            return read
    raise AssertionError(f"no {words!r} in:\n{read}")


# --- starting, waiting


def test_submit_says_what_was_submitted(local: Shell) -> None:
    spec = local.spec(SPEC)
    done = local.call("submit", str(spec))
    run_id = only_run(local)
    first, second = done.stdout.splitlines()
    job = json.loads((local.root / run_id / "run.json").read_text())["job_id"]
    assert first == f"{run_id}  local job {job}  {local.root / run_id}"
    assert second.startswith("next: ")
    assert (done.returncode, done.stderr) == (0, "")


def test_submit_json(local: Shell) -> None:
    document = local.json("submit", str(local.spec(SPEC)), "--wait")
    local.runs.append(document["run_id"])
    assert document["state"] == "ready"
    assert document["backend"] == "local"
    assert Path(document["run_dir"]) == local.root / document["run_id"]
    assert document["workers"] == {"ready": 0, "running": 2, "failed": 0, "total": 2}


def test_a_machine_without_gpus_is_told_so(local: Shell) -> None:
    local.env["CUDA_VISIBLE_DEVICES"] = ""
    spec = local.spec(SPEC.replace("local: {gpus-per-node: 2}", ""))
    done = local.call("submit", str(spec))
    only_run(local)
    assert "no GPU" in done.stderr
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_submit_wait_explains_a_run_that_does_not_come_up(local: Shell, options: list[str]) -> None:
    done = local.call("submit", str(local.spec(FAILS)), "--wait", *options)
    run_id = only_run(local)
    assert done.returncode == 9
    assert f"{run_id} failed: " in done.stderr
    assert "bad/0 on local0: failed, exited with 9\n  | no license\n" in done.stderr
    if options:
        assert json.loads(done.stdout)["state"] == "failed"
    nothing_left(local, run_id)


def test_wait(local: Shell, run_id: str) -> None:
    done = local.call("wait", run_id, "--timeout", "0.3")
    assert done.returncode == 124
    assert local.json("wait", run_id, "--for", "ready")["state"] == "ready"
    waiting = local.start("wait", run_id, "--json")
    assert local.call("cancel", run_id).returncode == 0
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 1
    assert json.loads(out)["state"] == "cancelled"
    assert "was cancelled" in err


def test_the_starter_runs(local: Shell) -> None:
    assert local.call("init").returncode == 0
    quick = "roles.trainer.command=[sh, -c, 'echo step 1; sleep 1']"
    done = local.call("run", "slurmfork.yaml", "-b", "local", "--set", quick)
    run_id = only_run(local)
    assert done.returncode == 0, done.stderr
    assert "trainer/0 | step 1\n" in done.stdout
    assert f"{run_id} is completed" in done.stderr
    nothing_left(local, run_id)


# --- run


@pytest.mark.parametrize("status", [0, 5])
def test_run_prints_the_logs_and_exits_with_the_run_s_status(local: Shell, status: int) -> None:
    done = local.call("run", str(local.spec(MAIN % status)))
    run_id = only_run(local)
    assert done.returncode == status
    assert done.stdout == "main/0 | first\nmain/0 | second\n"
    assert ("is completed" in done.stderr) == (status == 0)
    assert ("main/0" in done.stderr) == (status != 0)
    assert "  | " not in done.stderr  # the log was on stdout already
    nothing_left(local, run_id)


def test_run_without_prefix(local: Shell) -> None:
    done = local.call("run", str(local.spec(MAIN % 0)), "--no-prefix")
    only_run(local)
    assert done.stdout == "first\nsecond\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_run_cancels_it_and_shows_its_last_words(local: Shell, number: signal.Signals) -> None:
    running = local.start("run", str(local.spec(STUBBORN % "1")))
    assert running.stdout is not None
    read_until(running.stdout, "up")
    run_id = only_run(local)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert "not yet" in out
    assert f"{run_id}: cancelled, 0 survivors" in err
    assert local.left(run_id) == []
    assert local.status(run_id)["state"] == "cancelled"


def test_a_second_ctrl_c_does_not_wait(local: Shell) -> None:
    running = local.start("run", str(local.spec(STUBBORN % "8")))
    assert running.stdout is not None
    read_until(running.stdout, "up")
    run_id = only_run(local)
    running.send_signal(signal.SIGINT)
    read_until(running.stdout, "not yet")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "the cancel goes on" in err
    assert local.status(run_id)["state"] == "stopping"
    assert local.left(run_id)
    nothing_left(local, run_id)
    wait_until(lambda: local.status(run_id)["state"] == "cancelled", "the cancel to be done")


@pytest.mark.parametrize("lost", ["stdout", "stderr"])
def test_run_ends_when_nobody_reads_it_any_more(local: Shell, lost: str) -> None:
    """As with `slurmfork run SPEC | head -1`, though the run says nothing more."""
    running = local.start("run", str(local.spec(STUBBORN % "1")))
    assert running.stdout is not None
    read_until(running.stdout, "up")
    run_id = only_run(local)
    getattr(running, lost).close()
    assert running.wait(60) == 128 + signal.SIGHUP
    for stream in (running.stdout, running.stderr):
        assert stream is not None
        stream.close()
    assert local.left(run_id) == []
    assert local.status(run_id)["state"] == "cancelled"


# --- looking


def test_status_and_ps_of_a_living_run(local: Shell, run_id: str) -> None:
    status = local.status(run_id)
    assert status["workers"] == {"ready": 0, "running": 2, "failed": 0, "total": 2}
    assert [node["guarantee"] for node in status["nodes"]] == [GUARANTEE]
    assert status["source"] == "head"
    text = local.call("status", run_id).stdout
    assert "2 of 2 up" in text
    assert GUARANTEE in text
    workers = local.ps(run_id)
    assert [w["worker"] for w in workers] == ["rollout/0", "rollout/1"]
    assert all(process.identify(w["pid"]) for w in workers)
    assert len({json.dumps(w["gpus"]) for w in workers}) == 2
    assert local.call("ps", run_id).stdout.splitlines()[1].split()[0] == "rollout/0"


def test_following_logs_takes_in_a_role_that_is_forked_later(local: Shell, run_id: str) -> None:
    following = local.start("logs", run_id, "-f")
    assert following.stdout is not None
    read_until(following.stdout, "rollout/1 | up rollout/1")
    local.json("fork", run_id, "eval", "--env", "X=42")
    read_until(following.stdout, "eval/1    | evaluating with 42")
    local.call("cancel", run_id)
    following.communicate(timeout=60)
    assert following.returncode == 0  # the run is over, so is its log


def test_following_a_log_that_is_not_there_yet(local: Shell, run_id: str) -> None:
    following = local.start("logs", run_id, "eval/0", "-f")
    local.json("fork", run_id, "eval", "--env", "X=1")
    assert following.stdout is not None
    assert following.stdout.readline() == "evaluating with 1\n"
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=60)
    assert following.returncode == 130
    assert err == "slurmfork: interrupted\n"


# --- acting


def test_fork_and_stop(local: Shell, run_id: str) -> None:
    children = local.json("fork", run_id, "eval", "--request-id", "r1")["workers"]
    assert [(c["worker"], c["target"], c["state"]) for c in children] == [
        ("eval/0", "rollout/0", "running"),
        ("eval/1", "rollout/1", "running"),
    ]
    assert [c["gpus"] for c in children] == [w["gpus"] for w in local.ps(run_id, "rollout")]
    again = local.json("fork", run_id, "eval", "--request-id", "r1")["workers"]
    assert [c["pid"] for c in again] == [c["pid"] for c in children]  # asked twice, done once
    assert "runs already" in local.call("fork", run_id, "eval").stderr
    done = local.call("stop", run_id, "eval/1")
    assert done.stdout.startswith("eval/1: stopped in ")
    reply = local.json("stop", run_id, "eval")
    assert "eval/0" in reply["stopped"]
    assert reply["survivors"] == 0
    assert process.identify(children[0]["pid"]) is None


def test_ctrl_c_of_a_fork_says_that_it_goes_on(local: Shell, run_id: str) -> None:
    waits = ["--target", "rollout/0", "--env", "X=1", "--", "sh", "-c", "sleep 1000"]
    forking = local.start("fork", run_id, "probe", *waits)
    wait_until(lambda: local.ps(run_id, "probe"), "the fork to be under way")
    forking.send_signal(signal.SIGINT)
    _, err = forking.communicate(timeout=60)
    assert err == f"slurmfork: interrupted; the fork goes on: `slurmfork ps {run_id}` shows how\n"
    assert forking.returncode == 130
    assert local.ps(run_id, "probe")[0]["state"] == "starting"


def test_what_is_not_a_name_is_said_without_a_pattern(local: Shell, run_id: str) -> None:
    done = local.call("fork", run_id, "eval/0")
    assert (done.returncode, done.stderr) == (2, "slurmfork: 'eval/0' is not a role's name\n")
    done = local.call("stop", run_id, "a/b/c")
    assert done.stderr == "slurmfork: 'a/b/c' is neither a role nor a worker (role/index)\n"


def test_a_fork_of_a_command_of_one_s_own(local: Shell, run_id: str) -> None:
    done = local.call("fork", run_id, "mine", "-T", "rollout/1", "--count", "2", "--", "sleep", "--", "77")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["WORKER", "mine/0", "mine/1"]
    assert {w["target"] for w in local.ps(run_id, "mine")} == {"rollout/1"}


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_fork_that_fails_says_who_and_why(local: Shell, run_id: str, options: list[str]) -> None:
    done = local.call("fork", run_id, "probe", "--target", "rollout/0", *options)
    assert done.returncode == 1
    assert done.stderr.startswith("slurmfork: probe/0: ")
    assert "probe/0 on local0: failed, exited with 4\n  | out of memory\n" in done.stderr
    if options:
        document: Any = json.loads(done.stdout)
        assert document["workers"][0]["exit_status"] == 4
    else:
        assert done.stdout == ""


def test_what_is_asked_of_a_run_that_is_over(local: Shell, run_id: str) -> None:
    assert local.json("cancel", run_id) == {
        "run_id": run_id, "state": "cancelled", "survivors": 0, "unverified": [], "details": [], "notes": []
    }  # fmt: skip
    assert local.call("cancel", run_id).stdout == f"{run_id}: cancelled, 0 survivors\n"
    done = local.call("fork", run_id, "eval")
    assert done.returncode == 1
    assert "is over" in done.stderr
    assert local.json("clean", run_id)["survivors"] == 0


def test_clean_and_prune_leave_the_living_alone(local: Shell, run_id: str) -> None:
    done = local.call("clean", run_id)
    assert done.returncode == 1
    assert "is ready; cancel it first" in done.stderr
    assert local.json("prune", "--older-than", "0s", "--yes")["removed"] == []
    assert local.status(run_id)["state"] == "ready"
    local.call("cancel", run_id)
    assert local.json("prune", "--older-than", "0s", "--yes")["removed"] == [run_id]


def test_a_cancel_right_after_the_submission_leaves_nothing(local: Shell) -> None:
    run_id = local.submit(local.spec(SPEC))
    assert local.json("cancel", run_id)["survivors"] == 0
    assert local.left(run_id) == []
    assert local.status(run_id)["state"] == "cancelled"


def test_cancel_of_many(local: Shell) -> None:
    spec = local.spec(SPEC)
    runs = [local.ready(spec), local.ready(spec)]
    document = local.json("cancel", *runs)
    assert [(run["run_id"], run["state"], run["survivors"]) for run in document["runs"]] == [
        (run, "cancelled", 0) for run in runs
    ]


# --- on a terminal


class Terminal:
    """A `slurmfork` command on a terminal of its own; ``controlling``: it hears from the kernel when that closes."""

    def __init__(self, shell: Shell, *arguments: str, controlling: bool = False) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "slurmfork", *arguments],
            env={**shell.env, "TERM": "xterm"},
            cwd=shell.directory,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if controlling else None,
        )
        os.close(theirs)
        self.shown = b""

    def read(self, until: bytes | None = None) -> bytes:
        """Read to the end, or until something is shown."""
        try:
            while until is None or until not in self.shown:
                piece = os.read(self._ours, 4096)
                if not piece:
                    break
                self.shown += piece
        except OSError:
            pass  # the other side is gone
        assert until is None or until in self.shown, self.shown
        return self.shown

    def close(self) -> None:
        """As by closing its window."""
        os.close(self._ours)
        self._ours = -1

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._ours >= 0:
            self.close()


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    made: list[Terminal] = []
    yield made
    for terminal in made:
        terminal.end()


def test_submit_on_a_terminal_shows_progress_until_ready(local: Shell, terminals: list[Terminal]) -> None:
    terminals.append(Terminal(local, "submit", str(local.spec(SPEC))))
    shown = terminals[0].read()
    run_id = only_run(local)
    assert terminals[0].process.wait(60) == 0
    assert f"{run_id} is ready: 1 of 1 node, 2 of 2 workers up".encode() in shown
    assert local.status(run_id)["state"] == "ready"


def test_ctrl_c_lets_go_of_a_submitted_run(local: Shell, terminals: list[Terminal]) -> None:
    slow = SPEC.replace("local: {", "setup: sleep 3\n    local: {")
    terminals.append(Terminal(local, "submit", str(local.spec(slow))))
    terminals[0].read(b" is \x1b")
    run_id = only_run(local)
    os.killpg(terminals[0].process.pid, signal.SIGINT)
    shown = terminals[0].read()
    assert terminals[0].process.wait(60) == 0
    assert b"let go of" in shown
    assert b"Traceback" not in shown
    assert local.call("wait", run_id, "--for", "ready").returncode == 0
    assert local.status(run_id)["state"] == "ready"


@pytest.mark.parametrize("controlling", [True, False])
def test_run_ends_with_its_terminal(local: Shell, terminals: list[Terminal], controlling: bool) -> None:
    terminals.append(Terminal(local, "run", str(local.spec(STUBBORN % "1")), controlling=controlling))
    terminals[0].read(b" is ready")
    run_id = only_run(local)
    terminals[0].close()
    assert terminals[0].process.wait(60) == 128 + signal.SIGHUP
    assert local.left(run_id) == []
    assert local.status(run_id)["state"] == "cancelled"
