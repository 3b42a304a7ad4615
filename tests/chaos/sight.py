"""What the checker sees, by eyes of its own: every process of a trial, by marks that slurmfork knows nothing of.

Workers' processes map a file of the trial, or have its place among their arguments, or have announced themselves; in a
PID namespace they announce other PIDs than ours, which are translated.
What slurmfork itself runs for the trial is known by the run id, and by its Slurm job.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LOOK_S = 0.03


class Who(NamedTuple):
    """One process, told from a later one of the same PID by its start time."""

    pid: int
    start: int


class Line(NamedTuple):
    """One announcement. ``inside``: it was made in a PID namespace other than ours.

    ``who`` is by the PIDs that we see. One that had ended before we looked for it has none of these: its is negative.
    """

    who: Who
    leader: bool
    name: str
    inside: bool = False


def who(pid: int) -> Who | None:
    """The process that has this PID; None for nobody, and for what only waits to be reaped."""
    fields = _stat(pid)
    if not fields or (fields[0] in b"ZX" and int(fields[17]) <= 1):
        return None
    return Who(pid, int(fields[19]))


def parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def state(pid: int) -> str:
    """R, S, T, D ...; empty where there is nobody."""
    fields = _stat(pid)
    return fields[0].decode() if fields else ""


def _stat(pid: int) -> list[bytes]:
    return read(pid, "stat").rpartition(b")")[2].split()


def read(pid: int, what: str) -> bytes:
    """A file of /proc/PID; empty where it is not there, or not ours."""
    try:
        with open(f"/proc/{pid}/{what}", "rb") as file:
            return file.read()
    except (OSError, ValueError):
        return b""


def space(pid: int | str) -> int:
    """The PID namespace that a process is in, as its own announcement names it; 0 where it cannot be seen."""
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return 0


def translated(those: set[tuple[int, Who]]) -> dict[tuple[int, Who], Who]:
    """Who they are out here, of processes by their namespaces and their PIDs in there; gone ones are left out."""
    starts = {one.start for _, one in those}
    found = {}
    for pid in pids() if those else ():
        one = who(pid)
        if one is None or one.start not in starts:
            continue
        lines = read(pid, "status").decode(errors="replace").splitlines()
        inner = next((int(line.split()[-1]) for line in lines if line.startswith("NSpid:")), 0)
        found[space(pid), Who(inner, one.start)] = one
    return {key: one for key, one in found.items() if key in those}


def lives(one: Who) -> bool:
    return who(one.pid) == one


def pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def command(pid: int) -> str:
    """Its command line, or its name where it has none."""
    words = read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    return words or read(pid, "comm").decode(errors="replace").strip()


def describe(one: Who) -> str:
    """One process in words, for whoever looks into a failure."""
    tag = "tagged" if b"SLURMFORK_RUN_ID=" in read(one.pid, "environ") else "untagged"
    return f"pid {one.pid}, state {state(one.pid)}, child of {parent(one.pid)}, {tag}: {command(one.pid)[-160:]}"


def carries(pid: int, run_id: str) -> bool:
    """Whether it has the run id in its environment."""
    return f"SLURMFORK_RUN_ID={run_id}\0".encode() in read(pid, "environ") + b"\0"


def _parsed(text: str) -> tuple[int, Line]:
    pid, start, where, role, name = text.split(" ", 4)
    return int(where), Line(Who(int(pid), int(start)), role == "leader", name)


@dataclass
class Sight:
    """The processes of one trial. ``spared``: who bears its marks by our own doing."""

    place: Path
    run_id: str = ""
    job: tuple[str, str] = ("", "")  # id, and the configuration of its cluster
    spared: set[Who] = field(default_factory=set)
    known: set[Who] = field(default_factory=set)
    _held: set[Who] = field(default_factory=set)
    _read_to: int = 0
    _lines: list[Line] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def announced(self) -> list[Line]:
        """All announcements so far, in order."""
        with self._lock:
            try:
                with open(self.place / "announced", "rb") as file:
                    file.seek(self._read_to)
                    data = file.read()
            except OSError:
                return list(self._lines)
            whole = data[: data.rfind(b"\n") + 1]
            self._read_to += len(whole)
            said = [_parsed(text) for text in whole.decode().splitlines()]
            ours = space("self")
            known = translated({(where, line.who) for where, line in said if where != ours})
            for where, line in said:
                if where != ours:
                    one = known.get((where, line.who), Who(-line.who.pid, line.who.start))
                    line = line._replace(who=one, inside=True)
                self._lines.append(line)
            return list(self._lines)

    def leaders(self) -> list[Line]:
        """Announced workers that live."""
        return [line for line in self.announced() if line.leader and lives(line.who)]

    def workers(self) -> set[Who]:
        """Everything alive that the trial's workers are or have started, by mark and by announcement."""
        with self._lock:
            self.known.update(line.who for line in self.announced())
            self.known.update(self._marked())
            self.known = {one for one in self.known if lives(one)} - self.spared
            return set(self.known)

    def _marked(self) -> Iterator[Who]:
        mark = f"{self.place}/".encode()
        for pid in _all_pids():
            one = who(pid)
            if one and one not in self.known and (mark in read(pid, "cmdline") or mark in read(pid, "maps")):
                yield one

    def hold(self, those: Iterable[Who]) -> None:
        """These are the run's as well, though nothing that they bear says so."""
        self._held.update(those)

    def own(self) -> set[Who]:
        """Everything alive that slurmfork runs for the trial, and what Slurm or Ray runs for it; workers left out."""
        with self._lock:
            found = {one for pid in _all_pids() if (one := who(pid)) and self._is_own(pid)}
            found |= {one for one in self._held if lives(one)}
            return {one for one in found - self.spared - self.known if parent(one.pid) != os.getpid()}

    def _is_own(self, pid: int) -> bool:
        if not self.run_id:
            return False
        job, conf = self.job
        environment = read(pid, "environ") + b"\0"
        if f"SLURMFORK_RUN_ID={self.run_id}\0".encode() in environment:
            return True
        if job and all(f"{word}\0".encode() in environment for word in (f"SLURM_JOB_ID={job}", f"SLURM_CONF={conf}")):
            return True
        return f"/{self.run_id}".encode() in read(pid, "cmdline")

    def none_left(self, patience: float) -> set[Who]:
        """Wait until nothing of the trial is left; returns what is, after ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while left := self.workers() | self.own():
            if time.monotonic() > deadline:
                return left
            time.sleep(LOOK_S)
        return self.workers() | self.own()  # a second look, for what forks


def _all_pids() -> Iterator[int]:
    """Every PID, and those that were born while we looked."""
    seen: set[int] = set()
    for _ in range(20):
        new = [pid for pid in pids() if pid not in seen]
        if not new:
            return
        seen.update(new)
        yield from new


class Watch:
    """Sees, in a thread of its own, when (``gone``) none of a trial's workers was left, if that came."""

    def __init__(self, sight: Sight) -> None:
        self._sight = sight
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.gone: float | None = None

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        seen = False
        while not self._over.wait(LOOK_S):
            began = time.monotonic()
            # While one that is known lives there is no need to look for others.
            there = any(lives(one) for one in list(self._sight.known)) or bool(self._sight.workers())
            if there:
                self.gone = None
            elif seen:
                self.gone = began
            seen = there


def kill(those: Iterable[Who]) -> None:
    """SIGKILL to these very processes."""
    for one in those:
        signal_one(one, 9)


def signal_one(one: Who, number: int) -> bool:
    """A signal to this very process; False if it is gone."""
    import signal

    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(one.pid)
        try:
            if lives(one):
                signal.pidfd_send_signal(descriptor, number)
                return True
        finally:
            os.close(descriptor)
    return False
