"""The directory that every sshd of the machine locks its unprivileged half into; the package makes it at boot only."""

from __future__ import annotations

import contextlib
from pathlib import Path

from mini.processes import executable
from mini.store import locked, registry
from mini.words import Cluster

PRIVSEP = Path("/run/sshd")
PREFIX = ".slurmfork-minicluster-"


def need_privsep(cluster: Cluster) -> None:
    """Makes the directory; each cluster that needs one of our making leaves a mark in it."""
    with locked(registry() / ".lock"):
        if not PRIVSEP.exists():
            PRIVSEP.mkdir(mode=0o755)
        elif not list(PRIVSEP.glob(f"{PREFIX}*")):
            return  # the machine's own
        mark_of(cluster).symlink_to(cluster.home)


def leave_privsep(cluster: Cluster) -> None:
    """The last cluster takes the directory with it, unless the machine has begun to use it."""
    with locked(registry() / ".lock"):
        if not mark_of(cluster).is_symlink():
            return
        mark_of(cluster).unlink()
        if not any(executable(int(e.name)).startswith("sshd") for e in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(OSError):
                PRIVSEP.rmdir()


def mark_of(cluster: Cluster) -> Path:
    return PRIVSEP / f"{PREFIX}{str(cluster.home).strip('/').replace('/', '-')}"
