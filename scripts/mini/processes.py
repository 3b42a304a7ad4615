"""Which processes are a cluster's, and how processes are ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from mini.accounts import made_for
from mini.words import Cluster, Process, Record, Shape

TAG = "SLURMFORK_MINICLUSTER_OF"  # in the environment of each daemon: the directory of its cluster
CGROUPS = Path("/sys/fs/cgroup")


def look(pid: int) -> Process | None:
    """None: gone, or a zombie, which waits for its parent only."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else Process(pid, int(fields[19]))


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def environ(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    words = (os.fsdecode(word).partition("=") for word in raw.split(b"\0"))
    return {name: value for name, _, value in words}


def belongs(cluster: Cluster, pid: int) -> bool:
    """A daemon of ours carries the tag; what a job of ours started carries our conf and a node's name.

    A shell that merely uses the cluster has the conf too, and must live. sshd writes its title over its environment,
    and is known by where its errors go; an ssh that keeps a connection to a node, by the title itself.
    """
    found = environ(pid)
    if found.get(TAG) == str(cluster.home):
        return True
    if found.get("SLURM_CONF") == str(cluster.conf) and "SLURMD_NODENAME" in found:
        return True
    if executable(pid).startswith("linux") and f"bed={cluster.home}" in command_line(pid):
        return True  # a node's kernel, and each address space in it
    if executable(pid) == "ssh" and "".join(command_line(pid)[:1]).startswith(f"ssh: {cluster.home}/"):
        return True
    return executable(pid).startswith("sshd") and errors(pid).startswith(f"{cluster.home}/log/")


def command_line(pid: int) -> list[str]:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return []


def mark_namespace(cluster: Cluster) -> None:
    """Writes down that this process's mounts are those of the cluster, and of nobody else."""
    (cluster.home / "namespace").write_text(os.readlink("/proc/self/ns/mnt"))


def namespace_of(cluster: Cluster) -> str:
    """Empty: a cluster in this machine's own."""
    with contextlib.suppress(OSError):
        return (cluster.home / "namespace").read_text()
    return ""


def in_namespace(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/mnt") == name
    return False


def errors(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/2")
    except OSError:
        return ""


def owner(pid: int) -> int | None:
    """The real uid; the owner of /proc/PID is root for whatever cannot be traced."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("Uid:"):
                return int(line.split()[1])
    return None


def executable(pid: int) -> str:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name.removesuffix(" (deleted)")
    except OSError:
        return ""


def control_groups(cluster: Cluster, shape: Shape) -> list[Path]:
    """Slurm's control groups of these nodes: one per controller in version 1, a scope in version 2."""
    names = cluster.nodes(shape)
    version_1 = [root / f"slurm_{name}" for root in CGROUPS.glob("*") for name in names]
    version_2 = [CGROUPS / "system.slice" / f"{name}_slurmstepd.scope" for name in names]
    return [path for path in version_1 + version_2 if path.is_dir()]


def contained(groups: Iterable[Path]) -> set[int]:
    found: set[int] = set()
    for listing in (listing for group in groups for listing in group.rglob("cgroup.procs")):
        with contextlib.suppress(OSError):
            found |= {int(word) for word in listing.read_text().split()}
    return found


def scan(cluster: Cluster, shape: Shape | None) -> list[Process]:
    """Every process of this cluster and all below it, but never this command or what called it."""
    pids = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    parents = {pid: parent(pid) for pid in pids}
    spared = {1, *ancestry(os.getpid(), parents)}
    members = {pid for pid in pids if belongs(cluster, pid)}
    if namespace := namespace_of(cluster):
        members |= {pid for pid in pids if in_namespace(pid, namespace)}
    members |= contained(control_groups(cluster, shape)) if shape else set()
    if uids := set(made_for(cluster).values()):
        members |= {pid for pid in pids if owner(pid) in uids}
    below = {pid for pid in pids if not members.isdisjoint(ancestry(pid, parents))}
    return [process for pid in sorted((members | below) - spared) if (process := look(pid))]


def ancestry(pid: int, parents: dict[int, int]) -> set[int]:
    found: set[int] = set()
    while pid and pid not in found:
        found.add(pid)
        pid = parents.get(pid, 0)
    return found


def end(processes: Iterable[Process], signum: int, limit_s: float) -> list[Process]:
    """Signals each through a pidfd, waits for their exits, and returns those that are still there."""
    waiting: dict[int, Process] = {}
    poll = select.poll()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(process.pid)
            waiting[fd] = process
            if look(process.pid) == process:  # after pidfd_open: from here on it cannot be another one
                signal.pidfd_send_signal(fd, signum)
                poll.register(fd, select.POLLIN)
    exited = wait_for_exits(poll, {fd for fd in waiting if look(waiting[fd].pid) == waiting[fd]}, limit_s)
    left = [process for fd, process in waiting.items() if fd not in exited and look(process.pid) == process]
    for fd in waiting:
        os.close(fd)
    return left


def wait_for_exits(poll: select.poll, pending: set[int], limit_s: float) -> set[int]:
    deadline, exited = time.monotonic() + limit_s, set[int]()
    while pending - exited and (rest := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(rest * 1000):
            exited.add(fd)
            poll.unregister(fd)
    return exited


def living(record: Record) -> dict[str, bool]:
    return {title: look(process.pid) == process for title, process in record.daemons.items()}


def is_up(record: Record | None) -> bool:
    return record is not None and record.ready and all(living(record).values())
