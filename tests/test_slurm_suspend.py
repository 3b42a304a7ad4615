"""A job that Slurm suspends stands still, clock and all, and is the same run when it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster import Factory, MiniCluster
from processes import wait_until
from running import Shell

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

STILL_S = 25.0  # longer than an agent may be silent (10 s) and than a lost link may be away (5 s)

SPEC = """
    name: still
    nodes: 2
    roles:
      w:
        per_node: 1
        command: [sh, -c, 'while :; do date +%s >>"$SLURMFORK_RUN_DIR/ticks-$SLURMFORK_INDEX"; sleep 0.5; done']
"""


@pytest.fixture
def cluster(minicluster: Factory) -> MiniCluster:
    return minicluster(nodes=2, gpus=4)


@pytest.fixture
def shell(tmp_path: Path, cluster: MiniCluster) -> Iterator[Shell]:
    made = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    yield made
    made.end()


def stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def test_a_run_goes_on_after_it_was_suspended(shell: Shell, cluster: MiniCluster) -> None:
    run_id = shell.ready(shell.spec(SPEC))
    job_id = shell.status(run_id)["job_id"]
    before = {view["worker"]: view["pid"] for view in shell.ps(run_id)}
    ticks = [shell.root / run_id / f"ticks-{index}" for index in range(2)]
    wait_until(lambda: all(path.exists() for path in ticks), "the workers to tick")
    cluster.run(["scontrol", "suspend", job_id])
    try:
        wait_until(lambda: all(stopped(pid) for pid in before.values()), "Slurm to stop the workers")
        frozen = [path.read_text() for path in ticks]
        time.sleep(STILL_S)  # nothing happens that could be waited for: that is the point
        written = [len(path.read_text()) - len(text) for path, text in zip(ticks, frozen, strict=True)]
        assert max(written) <= len("1234567890\n"), "one tick may have been under way"
        suspended = shell.status(run_id)
        assert suspended["state"] == "ready", suspended
        assert suspended["reason"] == "Slurm has stopped the job (SUSPENDED): it stands still until it is resumed"
    finally:
        cluster.run(["scontrol", "resume", job_id])
    lengths = [len(path.read_text()) for path in ticks]
    wait_until(lambda: all(len(p.read_text()) > n for p, n in zip(ticks, lengths, strict=True)), "the ticks to go on")
    forked = shell.json("fork", run_id, "more", "--target", "w", "--", "sleep", "1000")
    assert len(forked["workers"]) == 2
    status = shell.status(run_id)
    assert (status["state"], status["job_id"]) == ("ready", job_id)
    assert {view["worker"]: view["pid"] for view in shell.ps(run_id, "w")} == before
    assert shell.json("cancel", run_id)["survivors"] == 0
