"""Runs on a real Slurm whose controller stops answering: nothing waits for long, is claimed falsely, or is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import MiniCluster
from processes import wait_until
from running import Shell

from slurmfork.backends.queue import Queue, shared_directory

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SPEC = """
    name: outage
    nodes: 1
    roles:
      only: {command: [sleep, "1000"]}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[MiniCluster]:
    made = MiniCluster().up(nodes=1, gpus=0, set=["MessageTimeout=12"])
    yield made
    made.down()


@pytest.fixture
def shell(tmp_path: Path, cluster: MiniCluster) -> Iterator[Shell]:
    made = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    yield made
    made.end()


@contextmanager
def outage(cluster: MiniCluster) -> Iterator[None]:
    """The controller takes connections, and answers none."""
    pid = next(daemon["pid"] for daemon in cluster.status()["daemons"] if daemon["name"] == "slurmctld")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def age_the_answer(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have what squeue said be so much older, so that it is asked again."""
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    file = Queue(None, directory=shared_directory())._file
    assert file is not None
    cache = json.loads(file.read_text())
    file.write_text(json.dumps({**cache, "tried": cache["tried"] - seconds, "asked": cache["asked"] - seconds}))


def test_status_does_not_wait_and_tells_how_old_its_word_is(
    shell: Shell, cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = shell.submit(shell.spec(SPEC), "--set", "slurm.hold=true")
    wait_until(lambda: shell.status(run_id)["scheduler"] == "PENDING", "squeue to know the job")
    age_the_answer(cluster, monkeypatch, 600)
    with outage(cluster):
        began = time.monotonic()
        done = shell.call("status")
        assert time.monotonic() - began < 10
        seen = shell.status(run_id)
    assert "JobHeldUser: it starts after `scontrol release` (as of 10m ago)" in done.stdout
    assert (seen["state"], seen["source"]) == ("pending", "scheduler")
    assert 600 <= seen["age"] < 700


def test_a_job_that_slurm_took_without_a_word_has_its_run(shell: Shell, cluster: MiniCluster) -> None:
    with outage(cluster):
        done = shell.call("submit", str(shell.spec(SPEC)))
        [kept] = shell.root.iterdir()
        shell.runs.append(kept.name)
        assert done.returncode == 1
        assert f"may have taken the job all the same, so run {kept.name} is kept" in done.stderr
        assert shell.status(kept.name)["state"] == "pending"
    assert shell.call("wait", kept.name, "--for", "ready").returncode == 0
    assert shell.json("cancel", kept.name)["survivors"] == 0


def test_a_job_that_slurm_took_without_a_word_can_be_given_up(shell: Shell, cluster: MiniCluster) -> None:
    with outage(cluster):
        shell.call("submit", str(shell.spec(SPEC)))
        [kept] = shell.root.iterdir()
        assert shell.json("cancel", kept.name)["state"] == "cancelled"
    shown = ["squeue", "-h", "-t", "all", "-n", "outage", "-S", "-i", "-o", "%T"]
    wait_until(lambda: cluster.run(shown).stdout.split()[0] == "FAILED", "the late job to end")
    assert shell.status(kept.name)["state"] == "cancelled"
    assert not (kept / "head.json").exists()


def test_a_cancel_tells_what_its_head_has_verified_though_slurm_is_silent(shell: Shell, cluster: MiniCluster) -> None:
    run_id = shell.ready(shell.spec(SPEC))
    with outage(cluster):
        began = time.monotonic()
        done = shell.call("cancel", run_id)
        assert time.monotonic() - began < 40
    assert (done.returncode, done.stdout) == (1, f"{run_id}: cancelled, 0 survivors\n")
    assert f"{run_id}: the job could not be cancelled, and ends by itself: scancel" in done.stderr
