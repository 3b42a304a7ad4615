"""The process that is the parent of all daemons of a cluster, and outlives `up`."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import subprocess
import sys
from pathlib import Path

from mini.clients import client_env, command, daemon_env
from mini.daemons import Start
from mini.processes import look
from mini.store import load, save
from mini.words import Cluster, Failed, Record

SCRIPT = Path(__file__).resolve().parent.parent / "minicluster"
PR_SET_CHILD_SUBREAPER = 36
PATIENCE_S = 300


def start(cluster: Cluster, record: Record) -> None:
    """Has the keeper start everything, and waits for its word."""
    save(cluster, record)
    argv = [sys.executable, str(SCRIPT), "keep", "--name", cluster.name]
    with (cluster.home / "keeper.err").open("ab") as err:  # the caller may wait for the end of its own stderr
        keeper = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=err,
            cwd="/",
            env=daemon_env(cluster),
            start_new_session=True,
        )
    assert keeper.stdout
    readable, _, _ = select.select([keeper.stdout], [], [], PATIENCE_S + record.shape.nodes)
    said = keeper.stdout.readline() if readable else b""
    keeper.stdout.close()
    keeper.returncode = 0  # it stays; nobody is to wait for its end here
    word = json.loads(said or '{"failed": "the keeper of the daemons has ended or hangs"}')
    if "failed" in word:
        raise Failed(word["failed"])


def keep(cluster: Cluster) -> None:
    """Starts the daemons, reports, and stays their parent until nothing is left below it.

    Whatever a job leaves behind falls to this process, even a daemon that scrubbed its environment: so `down`
    finds it.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    record = load(cluster)
    assert record
    record.keeper = look(os.getpid())
    save(cluster, record)
    try:
        Start(cluster, record).run()
        program = "sinfo" if record.shape.rooted else "slurmctld"  # the cluster's release, whatever logins have
        record.version = command(program, "-V", env=client_env(cluster)).split()[-1]
        record.ready = True
        save(cluster, record)
        said: dict[str, object] = {"ready": True}
    except (Failed, OSError) as failure:
        said = {"failed": str(failure)}
    with contextlib.suppress(BrokenPipeError):  # `up` was killed: the next verb will see to it
        os.write(1, json.dumps(said).encode() + b"\n")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
