"""Processes as the kernel shows them: identities that a reused PID cannot fake, trees, tags and signals.

Standard library only and light, because the guardian lives on it (so no pathlib either). Nothing here signals
a bare PID where the kernel has pidfds, and nothing here starts a process.
"""

# ruff: noqa: PTH110, PTH115, PTH116, PTH208

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from slurmfork import names

_GONE = (FileNotFoundError, ProcessLookupError)
_HIDDEN = (*_GONE, PermissionError)
_LISTINGS = 50  # of /proc in one scan; each looks at what the one before did not have
_SHOWN = 120  # characters of a command line in a message


class Identity(NamedTuple):
    """One process of one boot; ``start_time`` is field 22 of /proc/PID/stat, in clock ticks since boot."""

    pid: int
    start_time: int
    boot_id: str


class Stat(NamedTuple):
    """What /proc/PID/stat says of a process, as far as it is of use here."""

    comm: str
    state: str
    parent: int
    threads: int
    start_time: int

    @property
    def over(self) -> bool:
        """Exited, and at most waiting to be reaped. A leader in state Z may still have living threads."""
        return self.state in "ZXx" and self.threads <= 1


def _read(path: str, within: int | None = None) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=within)
    try:
        parts = []
        while part := os.read(descriptor, 65536):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def _stat(pid: int, proc: int | None = None) -> Stat | None:
    try:
        return parse_stat(_read(f"/proc/{pid}/stat" if proc is None else f"{pid}/stat", proc))
    except _HIDDEN:
        return None


def parse_stat(data: bytes) -> Stat | None:
    """Read what a /proc/PID/stat holds, of this machine or another; None for what is cut short."""
    opening, closing = data.find(b"("), data.rfind(b")")  # the name may hold anything, parentheses too
    fields = data[closing + 2 :].split()
    if len(fields) < 20:
        return None
    comm = data[opening + 1 : closing].decode(errors="replace")
    return Stat(comm, fields[0].decode(), int(fields[1]), int(fields[17]), int(fields[19]))


@functools.cache
def boot_id() -> str:
    """The kernel's name for this boot of this machine."""
    return _read("/proc/sys/kernel/random/boot_id").decode().strip()


def identify(pid: int, proc: int | None = None) -> Identity | None:
    """Who has this PID now; None where nobody does. A zombie still has its own.

    ``proc``: a descriptor of the /proc to look in, for a thread whose own shows other processes.
    """
    stat = _stat(pid, proc)
    return Identity(pid, stat.start_time, boot_id()) if stat else None


def is_zombie(pid: int) -> bool:
    """Whether the process has exited and only waits to be reaped."""
    stat = _stat(pid)
    return stat is not None and stat.over


def alive(identity: Identity) -> bool:
    """Whether that very process still runs; a zombie does not."""
    stat = _stat(identity.pid)
    return stat is not None and not stat.over and _matches(identity, stat)


def _matches(identity: Identity, stat: Stat) -> bool:
    return stat.start_time == identity.start_time and identity.boot_id == boot_id()


def name(pid: int) -> str:
    """What the kernel calls a process, 15 characters at most; empty: gone."""
    stat = _stat(pid)
    return stat.comm if stat else ""


def begun(identity: Identity) -> float:
    """When a process of this boot was started, in seconds since the epoch."""
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - uptime + identity.start_time / os.sysconf("SC_CLK_TCK")


def owner(pid: int) -> int | None:
    """The real uid of a process, read where a process that hides its memory still shows it; None: gone."""
    try:
        data = _read(f"/proc/{pid}/status")
    except _HIDDEN:
        return None
    line = next((line for line in data.splitlines() if line.startswith(b"Uid:")), b"")
    fields = line.split()
    return int(fields[1]) if len(fields) > 1 else None


class OpenFile(NamedTuple):
    """A file that a process has open; ``link`` leads to it even where its ``path`` is another's."""

    path: str
    link: str

    @property
    def writable(self) -> bool:
        """Whether it is open to be written to."""
        try:
            return bool(os.lstat(self.link).st_mode & 0o200)
        except _HIDDEN:
            return False


def open_files(pid: int) -> Iterator[OpenFile]:
    """What a process has open, as far as it may be looked at; the files themselves, which may hang, are not asked."""
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except _HIDDEN:
        return
    for number in numbers:
        with suppress(*_HIDDEN):
            link = f"/proc/{pid}/fd/{number}"
            yield OpenFile(os.readlink(link), link)


def maps(pid: int) -> bytes:
    """What a process has mapped, as /proc/PID/maps has it; empty where it may not be looked at."""
    try:
        return _read(f"/proc/{pid}/maps")
    except _HIDDEN:
        return b""


# --- trees -------------------------------------------------------------------------------------------------


@functools.cache
def _kernel_lists_children() -> bool:
    return os.path.exists("/proc/thread-self/children")


def pids() -> Iterator[int]:
    """The PIDs of all processes that can be seen from here."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _scan() -> dict[int, list[int]]:
    """Children of every process, for kernels without CONFIG_PROC_CHILDREN."""
    tree: dict[int, list[int]] = {}
    for pid in pids():
        if stat := _stat(pid):
            tree.setdefault(stat.parent, []).append(pid)
    return tree


def children(pid: int) -> list[int]:
    """PIDs of the direct children, zombies too. What is born or dies meanwhile may be missed: look twice."""
    if not _kernel_lists_children():
        return _scan().get(pid, [])
    found: dict[int, None] = {}
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found.update(dict.fromkeys(_thread_children(pid, thread)))
    except _HIDDEN:
        pass
    return list(found)


def _thread_children(pid: int, thread: str) -> list[int]:
    try:
        return [int(child) for child in _read(f"/proc/{pid}/task/{thread}/children").split()]
    except _HIDDEN:
        return []


def descendants(pid: int) -> list[Identity]:
    """Everything that runs below a process, breadth first; zombies are left out."""
    return list(walk(pid))


def walk(pid: int) -> Iterator[Identity]:
    """As ``descendants``, one by one: the children of each are looked up when the next one is asked for."""
    below = children if _kernel_lists_children() else functools.partial(_look_up, _scan())
    found = {pid}
    queue = [pid]
    for parent in queue:  # grows while it is walked
        for child in below(parent):
            stat = _stat(child)
            # Another parent: adopted meanwhile, or a reused PID. The next look finds it where it belongs.
            if stat is None or stat.over or stat.parent != parent or child in found:
                continue
            found.add(child)
            queue.append(child)
            yield Identity(child, stat.start_time, boot_id())


def _look_up(tree: dict[int, list[int]], pid: int) -> list[int]:
    return tree.get(pid, [])


def parent(pid: int) -> int:
    """PID of the parent, which is another's once that has ended; 0: the process is gone."""
    stat = _stat(pid)
    return stat.parent if stat else 0


def ancestors(pid: int) -> frozenset[int]:
    """PIDs of the parent, its parent, and so on, as far as they can be seen."""
    found: list[int] = []
    stat = _stat(pid)
    while stat and stat.parent > 0 and stat.parent not in found:
        found.append(stat.parent)
        stat = _stat(stat.parent)
    return frozenset(found)


# --- tags --------------------------------------------------------------------------------------------------


def environ(pid: int, having: str = "") -> dict[str, str] | None:
    """The environment that a process was started with; None: gone, not ours to read, or without ``having``."""
    try:
        data = _environment(pid)
    except _HIDDEN:
        return None
    if having and having.encode() + b"=" not in data:
        return None
    pairs = (os.fsdecode(entry).partition("=") for entry in data.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def _environment(pid: int) -> bytes:
    hidden: OSError | None = None
    try:
        if data := _read(f"/proc/{pid}/environ"):
            return data
    except (ProcessLookupError, PermissionError) as error:
        hidden = error
    for thread in os.listdir(f"/proc/{pid}/task"):  # where the first thread has ended, another one knows
        with suppress(*_HIDDEN):
            if data := _read(f"/proc/{pid}/task/{thread}/environ"):
                return data
    if hidden:
        raise hidden
    return b""


def tagged(run_id: str, node: str | None = None, *, job_id: str | None = None) -> list[Identity]:
    """This user's processes that carry both halves of a run's tag: its id, and a node (or just this node).

    ``job_id``: leave out what belongs to another Slurm job, for a job that a worker submits inherits the tag.
    The caller itself is left out. Its ancestors are not: who calls knows whom to spare.
    """
    return list(walk_tagged(run_id, node, job_id=job_id))


def walk_tagged(run_id: str, node: str | None = None, *, job_id: str | None = None) -> Iterator[Identity]:
    """As ``tagged``, one by one."""
    marks = _Marks(
        b"\0" + os.fsencode(f"{names.RUN_ID}={run_id}") + b"\0",
        b"\0" + os.fsencode(f"{names.NODE}={node}") + b"\0" if node else b"\0" + names.NODE.encode() + b"=",
        b"\0" + os.fsencode(f"SLURM_JOB_ID={job_id}") + b"\0" if job_id else b"",
    )
    uid, looked_at = os.geteuid(), {os.getpid()}
    for _ in range(_LISTINGS):
        new = [pid for pid in pids() if pid not in looked_at]
        if not new:  # so nothing slipped away by forking while we looked
            return
        looked_at.update(new)
        for pid in reversed(new):  # the latest may not be there for long
            # A program that is set-uid looks like its owner's there; who started it takes longer to read.
            if not owned(pid, uid) or not _carries(pid, marks) or owner(pid) != uid:
                continue
            identity = identify(pid)
            # Looked at again: had the PID changed hands, the first look would be about another process.
            if identity and _carries(pid, marks):
                yield identity


class _Marks(NamedTuple):
    run: bytes
    node: bytes
    job: bytes


def owned(pid: int, uid: int) -> bool:
    """Whether a process runs as this user, and lets itself be looked at."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == uid
    except _HIDDEN:
        return False


def _carries(pid: int, marks: _Marks) -> bool:
    try:
        data = b"\0" + _environment(pid) + b"\0"
    except _HIDDEN:
        return False
    if marks.run not in data or marks.node not in data:
        return False
    return not marks.job or marks.job in data or b"\0SLURM_JOB_ID=" not in data


# --- signals -----------------------------------------------------------------------------------------------


@functools.cache
def has_pidfd() -> bool:
    """Whether this kernel has pidfds (5.3 and later); without, a signal may go astray within microseconds."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError):
        return False
    return True


def send(identity: Identity, signum: int) -> bool:
    """Signal that very process and no other; False: gone, its PID is another's, or not ours to signal."""
    if identity.pid <= 0:
        return False
    try:
        if not has_pidfd():
            return _send_unpinned(identity, signum)
        descriptor = os.pidfd_open(identity.pid)
        try:
            if not alive(identity):
                return False
            signal.pidfd_send_signal(descriptor, signum)
        finally:
            os.close(descriptor)
    except _HIDDEN:
        return False
    return True


def _send_unpinned(identity: Identity, signum: int) -> bool:
    if not alive(identity):
        return False
    os.kill(identity.pid, signum)
    return True


def describe(identity: Identity) -> str:
    """One process in words: ``pid 123 (python train.py), state D in nfs_wait_bit_killable``."""
    stat = _stat(identity.pid)
    if stat is None or not _matches(identity, stat):
        return f"pid {identity.pid} (gone)"
    place = _wchan(identity.pid) if stat.state == "D" else ""
    return f"pid {identity.pid} ({command(identity.pid)}), state {stat.state}{place}"


def command(pid: int) -> str:
    """A process's command line in one line, cut if it is long; its name where it shows none."""
    try:
        words = _read(f"/proc/{pid}/cmdline").rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except _HIDDEN:
        words = ""
    words = words or name(pid)
    shown = words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "..."
    return "".join(char if char.isprintable() else "?" for char in shown)


def _wchan(pid: int) -> str:
    try:
        place = _read(f"/proc/{pid}/wchan").decode()
    except _HIDDEN:
        return ""
    return f" in {place}" if place not in ("", "0") else ""
