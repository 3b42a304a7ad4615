"""Probes by ssh, to a real sshd: through a noisy login, and to nodes that refuse, are strangers, or never answer."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_sshd import Sshd, free_port, silent_server
from probed import Nodes, all_alive, reason, verdicts
from processes import wait_until
from running import Shell

from slurmfork import names, process
from slurmfork.backends.local import LocalBackend
from slurmfork.journal import Journal, Started
from slurmfork.observe import RunStatus
from slurmfork.probing import Prober
from slurmfork.process import Identity
from slurmfork.rundir import RunDir

HOST = os.uname().nodename


@pytest.fixture
def nodes(local: Shell) -> Nodes:
    return Nodes(local)


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    with Sshd(tmp_path / "sshd").running() as it:
        yield it


def test_by_ssh_through_a_noisy_login(nodes: Nodes, sshd: Sshd) -> None:
    noise = "echo 'Welcome! stat 1 (x) R 0'; echo noise >&2; touch ~/was-read\n"
    (sshd.home / ".bashrc").write_text(noise)
    nodes.shell.env[names.SSH_CONFIG] = str(sshd.config())
    found = nodes.probe("--via", "ssh")
    if Path(pwd.getpwuid(os.geteuid()).pw_shell).name == "bash":
        assert (sshd.home / "was-read").exists(), "the login was not noisy"
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
            (f"Port {silent}", "timed out"),
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
    shown = nodes.shell.call("ps", nodes.run_id, "--probe", "--via", "ssh", "--timeout", "3").stdout
    assert shown.splitlines()[-1] == "0 of 3 nodes answered: 6 unknown"
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
