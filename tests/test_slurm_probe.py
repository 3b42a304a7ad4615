"""`ps --probe` on a real Slurm: by steps of the job, and by ssh where that goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster import Factory, MiniCluster
from node_sshd import Sshd, free_port
from processes import wait_until
from running import Shell

from slurmfork import names, process

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SPEC = """
    name: probed
    nodes: 3
    slurm: {gpus-per-node: 1, time: "00:30:00"}
    roles:
      rollout: {per_node: 1, gpus: 1, command: [sleep, "1000"]}
"""


@pytest.fixture
def cluster(minicluster: Factory) -> MiniCluster:
    return minicluster(nodes=4, gpus=8)


@pytest.fixture
def shell(tmp_path: Path, cluster: MiniCluster) -> Iterator[Shell]:
    made = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    yield made
    made.end()


def probe(shell: Shell, run_id: str, *options: str, status: int = 0, elsewhere: bool = False) -> dict[str, Any]:
    """``elsewhere``: from a machine of another boot, as a login node is one."""
    arguments = ["ps", run_id, "--probe", "--json", *options]
    if elsewhere:
        boot = shell.directory / "boot_id"
        boot.write_text(f"{uuid.uuid4()}\n")
        lines = 'mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@"'
        argv = ["unshare", "-m", "sh", "-c", lines, "sh", str(boot), sys.executable, "-m", "slurmfork", *arguments]
        done = subprocess.run(argv, env=shell.env, capture_output=True, text=True, timeout=120, check=False)
    else:
        done = shell.call(*arguments)
    assert done.returncode == status, f"{done.stdout}{done.stderr}\n{shell.logs(run_id)}"
    found: dict[str, Any] = json.loads(done.stdout)["probe"]
    return found


def ways(found: dict[str, Any]) -> list[str]:
    return [node["via"] for node in found["nodes"]]


def test_by_steps_of_the_job(shell: Shell, cluster: MiniCluster) -> None:
    run_id = shell.ready(shell.spec(SPEC))
    views = {view["worker"]: view for view in shell.ps(run_id)}
    found = probe(shell, run_id, "--via", "srun")
    assert ways(found) == ["srun"] * 3
    assert [(one["worker"], one["node"], one["pid"], one["verdict"]) for one in found["workers"]] == [
        (name, view["node"], view["pid"], "alive") for name, view in sorted(views.items())
    ]
    assert [node["agent"] for node in found["nodes"]] == ["alive"] * 3
    assert (found["unrecorded"], found["differences"]) == ([], [])
    assert ways(probe(shell, run_id)) == ["here"] * 3, "the nodes of this cluster are this machine"

    node = views["rollout/1"]["node"]
    agent = next(one for one in shell.status(run_id)["nodes"] if one["node"] == node)
    frozen = [process.identify(agent[name]) for name in ("guardian_pid", "agent_pid")]
    doomed = process.identify(views["rollout/1"]["pid"])
    assert doomed is not None
    try:
        for one in frozen:
            assert one is not None
            process.send(one, signal.SIGSTOP)
        process.send(doomed, signal.SIGKILL)
        wait_until(lambda: not process.alive(doomed), "the worker to be gone")
        found = probe(shell, run_id, "--via", "srun")
        told = f"rollout/1: the head says running, but pid {doomed.pid} on {node} is gone"
        assert found["differences"] == [told]
    finally:
        for one in frozen:
            assert one is not None
            process.send(one, signal.SIGCONT)

    shell.json("cancel", run_id)
    by_srun = ("ps", run_id, "--probe", "--via", "srun")
    wait_until(lambda: shell.call(*by_srun).returncode == 1, "Slurm to take no more steps of the job")
    found = probe(shell, run_id, "--via", "srun", status=1)
    assert not any(node["ok"] for node in found["nodes"])
    assert all(node["reason"].startswith("srun: ") for node in found["nodes"])
    assert {(one["verdict"], one["ended"]) for one in found["workers"]} == {("gone", True)}, "their ends are recorded"


@contextmanager
def stopped(cluster: MiniCluster, node: str) -> Iterator[None]:
    """A node whose slurmd answers nobody."""
    [pid] = [one["pid"] for one in cluster.status()["daemons"] if one["name"] == node]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_node_whose_slurmd_hangs_is_unknown_in_time(shell: Shell, cluster: MiniCluster) -> None:
    run_id = shell.ready(shell.spec(SPEC))
    deaf = next(view["node"] for view in shell.ps(run_id) if view["worker"] == "rollout/2")
    with stopped(cluster, deaf):
        found = probe(shell, run_id, "--via", "srun", "--timeout", "20", status=1)
    assert [one["verdict"] for one in found["workers"]] == ["alive", "alive", "unknown"]
    assert found["workers"][2]["reason"].startswith("srun: no answer within 20 s")


@pytest.mark.skipif(os.geteuid() != 0, reason="another boot needs a mount, and that root")
def test_ssh_first_and_srun_where_it_is_refused(shell: Shell, tmp_path: Path) -> None:
    """One node by its name, one by Slurm's address as its name is nobody's, one refuses ssh."""
    run_id = shell.ready(shell.spec(SPEC))
    views = {node["node"]: node["address"] for node in shell.status(run_id)["nodes"]}
    by_name, by_address, refusing = views
    with Sshd(tmp_path / "sshd", address=views[by_address]).running() as sshd:
        hosts = {
            by_name: f"HostName 127.0.0.1\n  Port {sshd.port}",
            by_address: f"HostName {by_address}.invalid\n  Port {sshd.port}",
            refusing: f"HostName 127.0.0.1\n  Port {free_port()}",
        }
        shell.env[names.SSH_CONFIG] = str(sshd.config(hosts=hosts))
        found = probe(shell, run_id, elsewhere=True)
        assert ways(found) == ["ssh", "ssh", "srun"], found
        assert [one["verdict"] for one in found["workers"]] == ["alive"] * 3
        assert found["differences"] == []
        shown = shell.call("ps", run_id, "--probe", "--via", "ssh")
        assert shown.returncode == 1
        assert f"could not ask 1 of 3 nodes: {refusing} (ssh: connect to host" in shown.stderr
