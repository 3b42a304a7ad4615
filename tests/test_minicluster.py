"""scripts/minicluster for real: what comes up, what it gives to jobs, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import SCRIPT, UNAVAILABLE, Factory, MiniCluster, minicluster, outside_of_slurm, words_of
from processes import wait_until

__all__ = ["minicluster"]

pytestmark = pytest.mark.slurm


@pytest.fixture
def fresh() -> Iterator[Callable[[], MiniCluster]]:
    """Clusters of a test's own, for what cannot be done to a shared one."""
    made: list[MiniCluster] = []

    def get() -> MiniCluster:
        made.append(MiniCluster())
        return made[-1]

    yield get
    for cluster in made:
        cluster.down()


def control_groups(cluster: MiniCluster) -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"*/slurm_{cluster.name}-n*"))


def sleeping(seconds: int) -> list[str]:
    """The pids of our sleepers, which are told apart by how long they sleep."""
    wanted = f"sleep\0{seconds}\0".encode()
    return [entry.name for entry in Path("/proc").glob("[0-9]*") if command_line(entry) == wanted]


def command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def test_each_node_gives_a_job_its_own_gpus(minicluster: Factory) -> None:
    cluster = minicluster(nodes=2)
    line = 'echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"'
    out = cluster.run(["srun", "--nodes=2", "--gpus-per-node=3", "bash", "-c", line]).stdout
    assert sorted(out.splitlines()) == [f"{node} 0,1,2" for node in cluster.nodes]


def test_up_again_keeps_the_same_shape_and_refuses_another(minicluster: Factory) -> None:
    cluster = minicluster(nodes=2)
    before = cluster.status()["daemons"]
    same, other = cluster.script("up", "--nodes", "2"), cluster.script("up", "--nodes", "3")
    assert (same.returncode, other.returncode) == (0, 1)
    assert same.stdout.startswith("already up: 2 nodes of 8 GPUs")
    assert "down --name" in other.stderr
    assert cluster.status()["daemons"] == before


def test_two_clusters_share_no_port_node_or_job(minicluster: Factory, fresh: Callable[[], MiniCluster]) -> None:
    one, two = minicluster(nodes=2), fresh().up(nodes=1, gpus=0, min_job_age=7)
    job = one.run(["sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 600"]).stdout.strip()
    assert one.run(["squeue", "-h", "-o", "%A"]).stdout.split() == [job]
    assert two.run(["squeue", "-h", "-o", "%A"]).stdout.split() == []
    assert not set(one.nodes) & set(two.nodes)
    addresses = [node["address"] for each in (one, two) for node in each.status()["nodes"]]
    assert len(set(addresses)) == 3
    assert "MinJobAge               = 7 sec" in two.run(["scontrol", "show", "config"]).stdout
    one.run(["scancel", job])


def test_two_ups_at_the_same_moment(fresh: Callable[[], MiniCluster]) -> None:
    clusters = [fresh(), fresh()]
    argv = [sys.executable, str(SCRIPT), "up", "--no-install", "--nodes", "1", "--name"]
    starts = [subprocess.Popen([*argv, cluster.name], env=outside_of_slurm()) for cluster in clusters]
    codes = {start.wait(timeout=60) for start in starts}
    if codes == {UNAVAILABLE}:
        clusters[0].up(nodes=1)  # skips or fails, and says why
    assert codes == {0}
    for cluster in clusters:
        assert cluster.up(nodes=1).run(["srun", "hostname"]).stdout


@pytest.mark.parametrize("proctrack", ["linuxproc", "pgid", "cgroup"])
def test_down_leaves_nothing_of_a_busy_cluster(proctrack: str, fresh: Callable[[], MiniCluster]) -> None:
    if proctrack == "cgroup" and not os.access("/sys/fs/cgroup", os.W_OK):
        pytest.skip("this machine lets nobody make control groups")
    cluster = fresh().up(nodes=2, proctrack=proctrack)
    home, seconds = cluster.home, 50000 + os.getpid() % 10000
    # A plain child, a daemon, and a daemon that has scrubbed its environment, on each node.
    tasks = f"setsid sleep {seconds} & env -i setsid -f sleep {seconds} & sleep {seconds}"
    cluster.run(["sbatch", "--nodes=2", "--output=/dev/null", "--wrap", f"srun bash -c '{tasks}'"])
    wait_until(lambda: len(sleeping(seconds)) == 6, "six sleepers")
    cluster.down()
    assert sleeping(seconds) == []
    assert words_of(home) == []
    assert control_groups(cluster) == []
    assert not home.exists()
    assert not list(home.parent.glob(f".{cluster.name}*"))


def test_down_spares_a_shell_that_uses_the_cluster(fresh: Callable[[], MiniCluster]) -> None:
    cluster = fresh().up(nodes=1, gpus=1)
    with subprocess.Popen(["sleep", "600"], env=cluster.env) as shell:
        try:
            cluster.down()
            assert shell.poll() is None
        finally:
            shell.kill()


def test_down_after_up_was_killed_midway(fresh: Callable[[], MiniCluster]) -> None:
    cluster = fresh()
    home = cluster.home
    argv = [sys.executable, str(SCRIPT), "up", "--no-install", "--nodes", "16", "--name", cluster.name]
    with subprocess.Popen(argv, env=outside_of_slurm(), stdout=subprocess.DEVNULL) as start:
        wait_until(lambda: (home / "slurm.conf").exists() or start.poll() is not None, "the configuration")
        start.send_signal(signal.SIGKILL)
    if start.returncode == UNAVAILABLE:
        cluster.up(nodes=16)  # skips or fails, and says why
    cluster.down()
    assert words_of(home) == []
    assert not home.exists()


def test_a_failing_up_says_why_and_takes_itself_down(fresh: Callable[[], MiniCluster]) -> None:
    cluster = fresh()
    home = cluster.home
    done = cluster.script("up", "--no-install", "--nodes", "1", "--set", "NoSuchKey=1")
    if done.returncode == UNAVAILABLE:
        cluster.up(nodes=1)  # skips or fails, and says why
    assert done.returncode == 1
    assert done.stderr.startswith("minicluster: slurmctld ended with status 1\n")
    assert "NoSuchKey" in done.stderr
    assert words_of(home) == []
    assert not home.exists()


def test_sacct_answers_with_accounting(minicluster: Factory) -> None:
    cluster = minicluster(nodes=1, accounting=True)
    job = cluster.run(["sbatch", "--parsable", "--output=/dev/null", "--wrap", "exit 7"]).stdout.strip()
    query = ["sacct", "-n", "-X", "-P", "-j", job, "-o", "state,exitcode"]
    wait_until(lambda: cluster.run(query).stdout == "FAILED|7:0\n", f"{' '.join(query)} to say FAILED|7:0")


def test_without_accounting_sacct_says_so(minicluster: Factory) -> None:
    done = minicluster(nodes=2).run(["sacct"], check=False)
    assert done.returncode != 0
    assert "accounting storage is disabled" in done.stderr


def test_a_mistaken_option_is_refused() -> None:
    for words in (["--nodes", "0"], ["--name", "Bad Name"], ["--set", "novalue"]):
        done = subprocess.run([sys.executable, SCRIPT, "up", *words], capture_output=True, text=True, timeout=30)
        assert done.returncode == 2
        assert words[1] in done.stderr
