"""The epilog that a site may install: what it ends when everything that could have done so was killed at one blow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster import MiniCluster
from processes import wait_until
from running import ISOLATED, Shell

from slurmfork import process

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

DAEMON = """
    name: daemon
    slurm: {time: 5}
    roles:
      w: {command: [sh, -c, "setsid sleep 3333 & exec sleep 3334"]}
"""


@contextmanager
def shell_on(cluster: MiniCluster, directory: Path, **shape: Any) -> Iterator[Shell]:
    """A shell on a cluster with linuxproc, where a session of its own escapes Slurm."""
    cluster.up(nodes=1, proctrack="linuxproc", **shape)
    made = Shell(directory, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    try:
        yield made
        made.end()
    finally:
        cluster.down()


def kill_all_that_watches(shell: Shell) -> str:
    """Batch script, head, guardian and agent of a run with a daemon, at one blow; returns the run's id."""
    run_id = shell.ready(shell.spec(DAEMON))
    wait_until(lambda: daemons(shell, run_id), "the daemon")
    node = shell.status(run_id)["nodes"][0]
    head = json.loads((shell.root / run_id / "head.json").read_text())["pid"]
    batch = next(pid for pid in process.ancestors(head) if b"slurm_script" in command(pid))
    for pid in (batch, head, node["guardian_pid"], node["agent_pid"]):
        os.kill(pid, signal.SIGKILL)
    return run_id


def daemons(shell: Shell, run_id: str) -> list[int]:
    return [pid for pid in shell.pids(run_id) if b"3333" in command(pid)]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_it_ends_what_nobody_else_is_left_to_end(tmp_path: Path) -> None:
    epilog = tmp_path / "epilog.sh"
    argv = [sys.executable, "-m", "slurmfork", "epilog"]
    epilog.write_text(subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout)
    epilog.chmod(0o755)
    with shell_on(MiniCluster(), tmp_path, set=[f"Epilog={epilog}"]) as shell:
        innocent = subprocess.Popen(["sleep", "3333"], start_new_session=True)
        run_id = kill_all_that_watches(shell)
        wait_until(lambda: shell.left(run_id) == [], "the epilog to end what is left", timeout=90)
        assert innocent.poll() is None
        innocent.kill()
        innocent.wait()


def test_without_it_clean_does(tmp_path: Path) -> None:
    cluster = MiniCluster()
    with shell_on(cluster, tmp_path) as shell:
        run_id = kill_all_that_watches(shell)
        job_id = shell.status(run_id)["job_id"]
        over = lambda: "COMPLETING" not in (words := job(cluster, job_id)) and "RUNNING" not in words  # noqa: E731
        wait_until(over, "the job to be over", timeout=90)
        if ISOLATED:
            wait_until(lambda: shell.left(run_id) == [], "the namespace to be gone: then there is nothing to clean")
        else:
            assert daemons(shell, run_id), "Slurm alone left it"
        cleaned = shell.json("clean", run_id)
        assert (cleaned["survivors"], cleaned["unverified"]) == (0, [])
        assert shell.left(run_id) == []


def job(cluster: MiniCluster, job_id: str) -> str:
    return cluster.run(["scontrol", "-o", "show", "job", job_id]).stdout
