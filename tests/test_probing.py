"""`ps --probe` and `status --probe` of real runs whose head, agents or nodes are dead, deaf, or say otherwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until
from running import Shell
from sshd import Sshd, free_port, silent_server

from slurmfork import names, process
from slurmfork.backends.local import LocalBackend
from slurmfork.errors import UsageError
from slurmfork.journal import Journal, Started
from slurmfork.observe import RunStatus
from slurmfork.probing import Prober
from slurmfork.process import Identity
from slurmfork.run import Run
from slurmfork.rundir import RunDir

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
HOST = os.uname().nodename

SPEC = """
    name: probed
    backend: local
    nodes: 3
    roles:
      rollout: {per_node: 2, command: [sleep, "1000"]}
"""


class Nodes:
    """The processes of a local run: freeze(), and kill() what a test wants dead."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.run_id = shell.ready(shell.spec(SPEC))
        self.directory = RunDir(shell.root / self.run_id)
        views = {view["worker"]: view for view in shell.ps(self.run_id)}
        self.workers = {name: self._identify(view["pid"]) for name, view in views.items()}
        self.node_of = {name: view["node"] for name, view in views.items()}
        status = shell.status(self.run_id)
        self.batch = self._identify(int(status["job_id"]))
        self.head = self._identify(json.loads(self.directory.head.read_text())["pid"])
        self.agents = {node["node"]: self._identify(node["agent_pid"]) for node in status["nodes"]}
        self.guardians = {node["node"]: self._identify(node["guardian_pid"]) for node in status["nodes"]}

    @staticmethod
    def _identify(pid: int) -> Identity:
        found = process.identify(pid)
        assert found is not None
        return found

    @contextmanager
    def frozen(self, *those: Identity) -> Iterator[None]:
        """Stopped until the end of the block, so that nobody reacts to what is done meanwhile."""
        try:
            for one in those:
                process.send(one, signal.SIGSTOP)
            yield
        finally:
            for one in reversed(those):
                process.send(one, signal.SIGCONT)

    def kill(self, *those: Identity) -> None:
        for one in those:
            process.send(one, signal.SIGKILL)
        wait_until(lambda: not any(process.alive(one) for one in those), "what was killed to be gone")

    def probe(self, *options: str, verb: str = "ps", status: int = 0) -> dict[str, Any]:
        done = self.shell.call(verb, self.run_id, "--probe", "--json", *options)
        assert done.returncode == status, f"{done.stdout}{done.stderr}"
        found: dict[str, Any] = json.loads(done.stdout)["probe"]
        return found


@pytest.fixture
def nodes(local: Shell) -> Nodes:
    return Nodes(local)


def verdicts(found: Mapping[str, Any]) -> dict[str, str]:
    return {one["worker"]: one["verdict"] for one in found["workers"]}


def reason(found: Mapping[str, Any], worker: str) -> str:
    return next(one["reason"] for one in found["workers"] if one["worker"] == worker)


def all_alive(nodes: Nodes, **but: str) -> dict[str, str]:
    return {
        **dict.fromkeys(nodes.workers, "alive"),
        **{f"rollout/{name[1:]}": verdict for name, verdict in but.items()},
    }


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
        found = nodes.probe()
        assert verdicts(found) == all_alive(nodes)
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
        assert shown.splitlines()[-1] == found["differences"][0]
        assert nodes.probe("--role", "rollout")["differences"] == found["differences"]


@pytest.mark.skipif(not (os.access(LAST_PID, os.W_OK) and os.geteuid() == 0), reason="nobody may choose PIDs here")
def test_a_pid_that_was_reused(nodes: Nodes) -> None:
    doomed = nodes.workers["rollout/2"]
    with nodes.frozen(nodes.batch, nodes.head, nodes.guardians["local1"], nodes.agents["local1"]):
        nodes.kill(nodes.agents["local1"], nodes.guardians["local1"], doomed)  # nobody is left to record its end
        decoy = occupy(doomed.pid)
        try:
            found = nodes.probe()
            assert verdicts(found) == all_alive(nodes, _2="not ours")
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
    assert found["nodes"][0]["notes"] == ["local0 has no journal"]
    assert found["unrecorded"] == [], "they are below their agents"
    first.with_suffix(".away").rename(first)
    third.write_bytes(kept)


# --- ssh


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    with Sshd(
        tmp_path / "sshd", "ForceCommand echo 'Welcome! stat 1 (x) R 0'; echo noise >&2; exec sh"
    ).running() as it:
        yield it


def test_by_ssh_through_a_noisy_login(nodes: Nodes, sshd: Sshd) -> None:
    nodes.shell.env[names.SSH_CONFIG] = str(sshd.config())
    found = nodes.probe("--via", "ssh")
    assert verdicts(found) == all_alive(nodes)
    assert {(node["via"], node["agent"]) for node in found["nodes"]} == {("ssh", "alive")}
    assert "3 nodes (by ssh) answered" in nodes.shell.call("ps", nodes.run_id, "--probe", "--via", "ssh").stdout


def test_nodes_that_do_not_answer(nodes: Nodes, sshd: Sshd, tmp_path: Path) -> None:
    """Each is told with why, within its time; nothing is said of its workers, and the exit status is 1."""
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    with silent_server() as silent:
        for own, words in (
            (f"Port {free_port()}", "Connection refused"),
            (f"Port {silent}", "ssh: "),
            ("UserKnownHostsFile /dev/null\n  StrictHostKeyChecking ask", "Host key verification failed"),
            (f"IdentityFile {other}\n  IdentitiesOnly yes", "Permission denied"),
        ):
            without_the_key = own.startswith("Identity")
            config = sshd.config(hosts={HOST: own})
            if without_the_key:  # ssh tries all that it finds
                config.write_text(config.read_text().replace(f"IdentityFile {sshd.directory}/user\n", ""))
            unanswered(nodes, config, words)
    nodes.shell.env["PATH"] = str(tmp_path)
    unanswered(nodes, sshd.config(), "ssh was not found on PATH")
    nodes.shell.env["PATH"] = os.environ["PATH"]


def unanswered(nodes: Nodes, config: Path, words: str) -> None:
    nodes.shell.env[names.SSH_CONFIG] = str(config)
    done = nodes.shell.call("ps", nodes.run_id, "--probe", "--json", "--via", "ssh", "--timeout", "3")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "could not ask 3 of 3 nodes: local0 (ssh: " in done.stderr
    found = json.loads(done.stdout)["probe"]
    assert verdicts(found) == dict.fromkeys(nodes.workers, "unknown")
    assert words in reason(found, "rollout/0"), reason(found, "rollout/0")
    assert not any(node["ok"] for node in found["nodes"])
    assert found["differences"] == []


def test_ctrl_c_waits_for_nobody(nodes: Nodes, sshd: Sshd) -> None:
    with silent_server() as silent:
        nodes.shell.env[names.SSH_CONFIG] = str(sshd.config(hosts={HOST: f"Port {silent}"}))
        asking = nodes.shell.start("ps", nodes.run_id, "--probe", "--via", "ssh", "--timeout", "10m")

        def children() -> list[Identity]:
            return [one for one in process.descendants(asking.pid) if process.name(one.pid) == "ssh"]

        wait_until(lambda: len(children()) == 3, "three ssh to ask")
        below = children()
        asking.send_signal(signal.SIGINT)
        asking.communicate(timeout=60)
        assert asking.returncode == 130
        wait_until(lambda: not any(process.alive(one) for one in below), "the ssh to be gone")


def test_many_silent_nodes_take_the_time_of_few(tmp_path: Path, sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDir(tmp_path / "demo-abc234")
    directory.make()
    for index in range(150):
        journal = Journal(directory.journal(f"n{index}"))
        journal.append(
            Started(start_id="s", worker=f"a/{index}", pid=7, start_time=7, boot_id="x", uid=os.geteuid(), argv=["x"])
        )
        journal.close()
    status = RunStatus(run_id="demo-abc234", name="demo", backend="slurm", job_id=None, state=names.RunState.READY)

    class Elsewhere(LocalBackend):
        def host(self, rundir: RunDir, node: str) -> str:
            return node

    with silent_server() as port:
        monkeypatch.setenv(names.SSH_CONFIG, str(sshd.config(hosts={"n*": f"Port {port}", "n149": "Port 1"})))
        begin = time.monotonic()
        prober = Prober(directory, Elsewhere(), None, lambda: (status, []), via="auto", timeout=2.0)
        found, _, _ = prober.run()
        took = time.monotonic() - begin
    assert len(found.unanswered) == 150
    assert {str(one.verdict) for one in found.workers} == {"unknown"}
    assert took < 150, "they were asked one after the other"
