"""Ends all that is of a cluster, and removes its files."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from pathlib import Path

from mini.accounts import made_for
from mini.clients import client_env, command
from mini.kernels import LINUX
from mini.privsep import leave_privsep
from mini.processes import belongs, control_groups, end, executable, is_up, scan
from mini.store import give_back, load, lock_of, locked
from mini.users import remove_users, settled_users
from mini.words import KILL_WAIT_S, Cluster, Failed, Process, Record

DAEMONS = ("slurmctld", "slurmd", "munged", "mariadbd", "sshd", LINUX)  # how the names of their executables begin


def down(cluster: Cluster) -> None:
    with locked(lock_of(cluster)):
        found = take_down(cluster)
    print(f"{cluster.name}: down" if found else f"{cluster.name}: was not up")


def take_down(cluster: Cluster) -> bool:
    """Jobs, then daemons, then whatever else is of this cluster, then its files. False: nothing was there."""
    record = load(cluster)
    shape = record.shape if record else None
    if not cluster.home.exists() and not made_for(cluster) and not scan(cluster, shape):
        return False
    if record and is_up(record) and not record.shape.kernels:  # a kernel takes its jobs with it
        end_jobs(cluster)
    with settled_users(shape):
        if record:
            end_daemons(cluster, record)
        end_the_rest(cluster, record)
    for group in control_groups(cluster, shape) if shape else []:
        remove_group(group)
    remove_users(cluster)
    leave_privsep(cluster)
    shutil.rmtree(cluster.home, ignore_errors=True)
    give_back(cluster)
    if cluster.home.exists():
        raise Failed(f"cannot remove {cluster.home}")
    return True


def end_jobs(cluster: Cluster) -> None:
    """Lets jobs end as in any scancel; what will not is killed afterwards."""
    deadline, env = time.monotonic() + KILL_WAIT_S + 2, client_env(cluster)
    with contextlib.suppress(Failed):
        jobs = command("squeue", "-h", "-a", "-o", "%A", env=env, limit_s=15).split()
        if jobs:
            command("scancel", *sorted(set(jobs)), env=env, limit_s=15)
        while jobs and time.monotonic() < deadline:
            time.sleep(0.1)
            jobs = command("squeue", "-h", "-a", "-o", "%A", env=env, limit_s=15).split()


def end_daemons(cluster: Cluster, record: Record) -> None:
    """What jobs have left goes first, so that no daemon waits for it; then Slurm, then what it writes to."""
    found = [process for process in scan(cluster, record.shape) if process != record.keeper]
    end([process for process in found if is_of_a_job(process)], signal.SIGKILL, 5)
    stages = {"slurmdbd": 1, "mariadbd": 2, "munged": 2}
    for stage in range(3):
        chosen = [process for title, process in record.daemons.items() if stages.get(title, 0) == stage]
        how = signal.SIGKILL if record.shape.kernels else signal.SIGTERM  # a shutdown would take its time
        end([process for process in chosen if belongs(cluster, process.pid)], how, 3)


def is_of_a_job(process: Process) -> bool:
    """Everything of a cluster but its daemons and their helpers (slurmctld has one, which ends with it)."""
    return not executable(process.pid).startswith(DAEMONS)


def end_the_rest(cluster: Cluster, record: Record | None) -> None:
    """Until a scan finds nothing. The keeper goes last, as it holds on to what else there is."""
    deadline = time.monotonic() + 30
    keeper, shape = (record.keeper, record.shape) if record else (None, None)
    tries = 0  # on a machine that has much else to do the look alone may take so long
    while left := scan(cluster, shape):
        tries += 1
        if time.monotonic() > deadline and tries > 3:
            raise Failed(f"cannot end {', '.join(str(process.pid) for process in left)} of {cluster.name}")
        end([process for process in left if process != keeper] or left, signal.SIGKILL, 5)


def remove_group(group: Path) -> None:
    """Control groups go by rmdir, the inner ones first; the kernel may take a moment after the last exit."""
    deadline = time.monotonic() + 5
    while group.exists() and time.monotonic() < deadline:
        for path in sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)
