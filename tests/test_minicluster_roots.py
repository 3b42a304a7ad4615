"""scripts/minicluster with another release of Slurm: what runs in its root, and that nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import SCRIPT, MiniCluster, words_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]

RELEASE = "24.11"  # as in test_kernels.py: one root serves both


@pytest.fixture
def cluster() -> Iterator[MiniCluster]:
    made = MiniCluster()
    try:
        yield made.up(slurm=RELEASE, nodes=2, gpus=2, cpus=4)
    finally:
        made.down()


def test_another_release_serves_and_leaves_nothing(cluster: MiniCluster) -> None:
    home = cluster.home
    assert cluster.status()["version"].startswith(f"{RELEASE}.")
    said = cluster.script(
        "exec", "--", "srun", "--nodes=2", "--gpus-per-node=2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES"
    )
    assert said.stdout.split() == ["0,1", "0,1"], said.stderr
    assert cluster.script("exec", "--", "slurmfork", "--version").stdout.startswith("slurmfork ")
    assert cluster.script("exec", "--", "sh", "-c", "exit 7").returncode == 7
    # By its own commands, as `minicluster env` has them found: from here, where another release may be installed.
    env = {**cluster.env, "PATH": f"{home}/bin:{os.environ['PATH']}"}
    done = subprocess.run(["sinfo", "-V"], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"slurm {RELEASE}.") or RELEASE in done.stdout, done.stderr
    quiet = "setsid -f sleep 600 >/dev/null 2>&1"  # nobody's job, in the cluster's own mounts
    cluster.script("exec", "--", "sh", "-c", quiet)
    cluster.down()
    assert words_of(home) == []
    assert str(home) not in Path("/proc/self/mountinfo").read_text()
    assert not home.exists()


def test_what_cannot_be_is_told_in_a_line() -> None:
    for words, reason in (
        (["--slurm", "19.05"], "invalid choice"),
        (["--slurm", "20.11", "--kernels", "--proctrack", "cgroup"], "knows no control groups of version 2"),
        (["--kernels", "--nodes", "5"], "4 nodes at most"),
        (["--slurm", "24.11", "--accounting"], "this machine's own release"),
    ):
        argv = [sys.executable, str(SCRIPT), "up", "--name", "refused", *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert reason in done.stderr.splitlines()[-1]
