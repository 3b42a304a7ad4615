"""Runs on a real Ray cluster of local nodes: devices, refusals, waiting, and what is left when parts are killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait_until
from ray_cluster import ROOT, RayCluster
from running import Shell, command_of, environ_of

from slurmfork import process

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]  # the first installs Ray

SPEC = """
    name: rayed
    backend: ray
    ray: {gpus-per-node: 2}
    roles:
      rollout: {replicas: 4, gpus: 1, command: [sleep, "1000"]}
      eval:
        strategy: {type: colocation, target: rollout}
        autostart: false
        command: "setsid sleep 1002 & exec sleep 1001"
"""
DRIVER = ROOT / "slurmfork" / "backends" / "ray_driver.py"


@pytest.fixture
def shell(ray_cluster: RayCluster, ray_python: str, tmp_path: Path) -> Iterator[Shell]:
    made = ray_cluster.shell(tmp_path, ray_python)
    yield made
    made.end()


def begun(shell: Shell) -> str:
    """A run of two nodes that is up, with something forked beside each worker."""
    run_id = shell.ready(shell.spec(SPEC))
    assert len(shell.json("fork", run_id, "eval")["workers"]) == 4
    return run_id


def driver_of(run_id: str, *, guardian: bool = False) -> int:
    """The process that speaks with Ray, or its guardian, which is its parent and has the same command."""
    pids = [one.pid for one in process.tagged(run_id) if command_of(one.pid)[2:3] == [str(DRIVER)]]
    (driver,) = [pid for pid in pids if parent_of(pid) in pids]
    return parent_of(driver) if guardian else driver


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def assert_gone(shell: Shell, run_id: str, why: str = "", *, state: str = "failed") -> None:
    """The run ends by itself, says how and why and that nothing survived, and nothing did."""
    shell.call("wait", run_id)
    status = shell.status(run_id)
    assert (status["survivors"], status["state"]) == (0, state), status
    assert why in status["reason"], status
    wait_until(lambda: shell.left(run_id) == [], "everything to be gone")


def test_workers_and_forks_share_what_ray_granted(shell: Shell) -> None:
    run_id = begun(shell)
    views = {view["worker"]: view for view in shell.ps(run_id)}
    assert {view["node"] for view in views.values()} == {"ray0", "ray1"}
    for index in range(4):
        target, child = views[f"rollout/{index}"], views[f"eval/{index}"]
        seen = environ_of(target["pid"])["CUDA_VISIBLE_DEVICES"]
        assert seen == environ_of(child["pid"])["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, target["gpus"]))
        assert command_of(target["pid"]) == ["sleep", "1000"]
    owned = [(view["node"], *view["gpus"]) for view in views.values() if view["role"] == "rollout"]
    assert len(set(owned)) == 4
    stopped = shell.json("stop", run_id, "eval")
    assert (len(stopped["stopped"]), stopped["survivors"]) == (4, 0)
    cancelled = shell.json("cancel", run_id)
    assert (cancelled["state"], cancelled["survivors"], cancelled["unverified"]) == ("cancelled", 0, [])
    assert shell.left(run_id) == []
    begun(shell)  # what it had is Ray's again


def test_a_run_ends_with_its_main_role_and_its_status(shell: Shell) -> None:
    text = "name: m\nbackend: ray\nroles: {w: {main: true, command: [sh, -c, 'echo $PWD; exit 3']}}\n"
    run_id = shell.submit(shell.spec(text))
    assert shell.call("wait", run_id).returncode == 3
    assert "w/0 failed: exited with 3" in shell.status(run_id)["reason"]
    assert (shell.root / run_id / "logs" / "w-0.log").read_text() == f"{shell.directory}\n"


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ("nodes=3", "3 nodes of 2 GPUs and 2 CPUs each on a node of its own are asked for, and 2 of Ray's 2 nodes"),
        ("ray.gpus-per-node=8", "8 GPUs"),
        ("ray.cpus-per-node=99", "99 CPUs each"),
    ],
)
def test_what_ray_does_not_have_is_told_with_what_there_is(shell: Shell, ask: str, words: str) -> None:
    run_id = shell.submit(shell.spec(SPEC.replace("replicas: 4", "per_node: 2")), "--set", "nodes=2", "--set", ask)
    assert shell.call("wait", run_id).returncode == 1
    status = shell.status(run_id)
    assert status["state"] == "failed"
    assert words in status["reason"], status
    assert "(2 GPUs, 4 CPUs)" in status["reason"]
    assert status["survivors"] == 0


def test_an_address_where_no_cluster_is(shell: Shell) -> None:
    run_id = shell.submit(shell.spec(SPEC), "--set", "ray.address=127.0.0.1:1")
    assert shell.call("wait", run_id).returncode == 1
    assert "Ray does not answer at 127.0.0.1:1" in shell.status(run_id)["reason"], shell.logs(run_id)


def test_a_run_waits_for_what_another_has(shell: Shell) -> None:
    first = shell.ready(shell.spec(SPEC))
    waiting, given_up = shell.submit(shell.spec(SPEC)), shell.submit(shell.spec(SPEC))
    for run_id in (waiting, given_up):
        log = shell.root / run_id / "batch.log"
        wait_until(lambda log=log: "waiting for Ray to give 2 nodes" in log.read_text(), "the driver to wait")
        assert shell.status(run_id)["state"] == "starting"
    cancelled = shell.json("cancel", given_up)
    assert (cancelled["state"], cancelled["survivors"], cancelled["unverified"]) == ("cancelled", 0, [])
    assert shell.json("cancel", first)["survivors"] == 0
    assert shell.call("wait", waiting, "--for", "ready").returncode == 0
    assert shell.status(waiting)["state"] == "ready"


def test_a_command_is_run_on_a_node_by_ray(shell: Shell, ray_python: str) -> None:
    """As the sweep is where the node is another machine: here it is told that it were one."""
    run_id = shell.ready(shell.spec(SPEC))
    path = shell.root / run_id / "ray.json"
    record = json.loads(path.read_text())
    argv = [ray_python, "-I", str(DRIVER), "--on", "ray1", "sh", "-c", 'echo "$@"; exit 4', "sh"]
    environment = {**shell.env, "SLURMFORK_RUN_DIR": str(shell.root / run_id)}

    def on_node() -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100, check=False)

    assert (on_node().stdout, on_node().returncode) == ("--node ray1\n", 4)
    record["nodes"]["ray1"]["machine"] = "another"
    path.write_text(json.dumps(record))
    done = on_node()
    assert (done.stdout, done.returncode) == ("--node ray1\n", 4), done.stderr
    record["nodes"]["ray1"]["address"] = "192.0.2.99"
    path.write_text(json.dumps(record))
    done = on_node()
    assert done.returncode == 1
    assert "Ray has lost ray1" in done.stderr


# --- nothing is left ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guardian", [False, True], ids=["driver", "guardian"])
def test_when_the_driver_is_killed(shell: Shell, guardian: bool) -> None:
    run_id = begun(shell)
    os.kill(driver_of(run_id, guardian=guardian), signal.SIGKILL)
    assert_gone(shell, run_id, "the agents")  # their launcher ended, or they were lost on all nodes


def test_when_the_driver_is_told_to_end(shell: Shell) -> None:
    run_id = begun(shell)
    os.kill(driver_of(run_id), signal.SIGTERM)
    assert_gone(shell, run_id, "ended from outside (SIGTERM", state="cancelled")


def test_when_an_actor_is_killed(shell: Shell) -> None:
    run_id = begun(shell)
    guardian = shell.status(run_id)["nodes"][1]["guardian_pid"]
    actor = parent_of(guardian)
    assert b"ray::" in Path(f"/proc/{actor}/cmdline").read_bytes()
    os.kill(actor, signal.SIGKILL)
    assert_gone(shell, run_id, f"the agent on node {shell.status(run_id)['nodes'][1]['node']} was lost: ")


@pytest.mark.parametrize("who", ["agent_pid", "guardian_pid"])
def test_when_those_are_killed_who_watch(shell: Shell, who: str) -> None:
    run_id = begun(shell)
    os.kill(shell.status(run_id)["nodes"][1][who], signal.SIGKILL)
    assert_gone(shell, run_id)


def test_when_the_head_is_killed(shell: Shell) -> None:
    run_id = begun(shell)
    os.kill(json.loads((shell.root / run_id / "head.json").read_text())["pid"], signal.SIGKILL)
    shell.call("wait", run_id)
    wait_until(lambda: shell.left(run_id) == [], "everything to be gone")


def test_when_an_agent_hangs(shell: Shell) -> None:
    run_id = begun(shell)
    os.kill(shell.status(run_id)["nodes"][1]["agent_pid"], signal.SIGSTOP)
    reply = shell.json("cancel", run_id)
    assert (reply["state"], reply["survivors"], reply["unverified"]) == ("cancelled", 0, [])
    wait_until(lambda: shell.left(run_id) == [], "everything to be gone")


def test_when_a_raylet_is_killed(ray_python: str, tmp_path: Path) -> None:
    cluster = RayCluster(ray_python)
    try:
        shell = cluster.shell(tmp_path, ray_python)
        run_id = begun(shell)
        nodes = json.loads((shell.root / run_id / "ray.json").read_text())["nodes"]
        head = cluster.raylets[next(iter(cluster.raylets))]
        other = next(pid for place in nodes.values() if (pid := cluster.raylets[place["node_id"]]) != head)
        os.kill(other, signal.SIGKILL)
        lost = next(name for name, place in nodes.items() if cluster.raylets[place["node_id"]] == other)
        assert_gone(shell, run_id, f"the agent on node {lost} was lost: ")
        shell.end()
    finally:
        cluster.end()


def test_when_all_of_ray_is_killed_at_once(ray_python: str, tmp_path: Path) -> None:
    cluster = RayCluster(ray_python)
    try:
        shell = cluster.shell(tmp_path, ray_python)
        run_id = begun(shell)
        tagged = set(shell.pids(run_id))
        for pid in set(cluster.pids()) - tagged:
            os.kill(pid, signal.SIGKILL)
        assert_gone(shell, run_id)
        shell.end()
    finally:
        cluster.end()


# --- without a cluster -------------------------------------------------------------------------------------


@pytest.fixture
def alone(ray_python: str, tmp_path: Path) -> Iterator[Shell]:
    """A shell for which no cluster runs."""
    made = Shell(tmp_path, {"PYTHONPATH": str(ROOT)})
    made.env.pop("RAY_ADDRESS", None)
    made.python = ray_python
    yield made
    made.end()


def test_a_cluster_is_started_for_the_run_alone_and_ends_with_it(alone: Shell) -> None:
    run_id = begun(alone)
    assert {view["node"] for view in alone.ps(run_id)} == {"ray0", "ray1"}
    assert alone.json("cancel", run_id)["survivors"] == 0
    assert alone.left(run_id) == []


@pytest.mark.parametrize("guardian", [False, True], ids=["driver", "guardian"])
def test_nothing_of_that_cluster_is_left_when_the_driver_is_killed(alone: Shell, guardian: bool) -> None:
    run_id = begun(alone)
    cluster = list(process.walk(driver_of(run_id, guardian=True)))
    assert any("raylet" in command_of(one.pid)[0] for one in cluster)
    os.kill(driver_of(run_id, guardian=guardian), signal.SIGKILL)
    assert_gone(alone, run_id)
    wait_until(lambda: not any(map(process.alive, cluster)), "all of Ray's processes to be gone")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed beside slurmfork here")
def test_without_ray_nothing_is_submitted(local: Shell) -> None:
    assert local.python == sys.executable
    done = local.call("submit", str(local.spec(SPEC)))
    assert (done.returncode, done.stderr.strip().splitlines()) == (
        1,
        ["slurmfork: Ray is not installed in this Python: pip install 'slurmfork[ray]'"],
    )
    assert not list(local.root.glob("*"))
