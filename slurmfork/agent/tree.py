"""Whose is a process? The trees of this node's workers, orphans that fell to the agent included.

Reads /proc, remembers what it saw, signals nobody. An orphan belongs to the worker in whose tree it was seen, in
whose session it is, whose tag it carries, or whose log it writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

from slurmfork import names, process
from slurmfork.process import Identity, boot_id


class Entry(NamedTuple):
    """What /proc/PID/stat says of one process. ``over``: exited, and waiting to be reaped."""

    parent: int
    session: int
    start_time: int
    over: bool


Census = dict[int, Entry]


def take_census() -> Census:
    """Every process of this machine, at about one moment."""
    found = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 (light)
        if name.isdigit() and (entry := _entry(name)):
            found[int(name)] = entry
    return found


def _entry(pid: str) -> Entry | None:
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.read(descriptor, 2048)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    fields = data[data.rfind(b")") + 2 :].split(None, 20)
    if len(fields) < 20:
        return None
    over = fields[0] in b"ZXx" and int(fields[17]) <= 1
    return Entry(int(fields[1]), int(fields[3]), int(fields[19]), over)


class Trees:
    """The trees of one agent's workers. ``clock`` is the event loop's, ``init`` the PID of their namespace's init.
    ``keepers``: children of the agent that are nobody's, init among them.

    Orphans fall to init where there is one, else to the agent. The workers' own processes are the agent's children.

    Looks taken for many workers at the same moment share one census: see ``newer_than``.
    """

    def __init__(
        self, run_id: str, clock: Callable[[], float], init: int | None = None, keepers: frozenset[int] = frozenset()
    ) -> None:
        self._run_id = run_id
        self._init = init
        self.keepers = keepers
        self._clock = clock
        self._leaders: dict[int, str] = {}
        self._sessions: dict[int, str] = {}
        self._logs: dict[str, str] = {}
        self._owners: dict[tuple[int, int], str] = {}
        self._census: Census = {}
        self._below: dict[int, list[int]] = {}
        self._taken = float("-inf")

    # --- workers come and go

    def enter(self, worker: str, leader: Identity, log: str) -> None:
        """A worker's process has begun."""
        self._leaders[leader.pid] = worker
        self._sessions[leader.pid] = worker
        self._logs[log] = worker

    @property
    def leaders(self) -> list[int]:
        """PIDs of the workers' own processes that have not been reaped."""
        return list(self._leaders)

    def reaped(self, pid: int) -> str | None:
        """A leader's PID is free again; whose it was. Its session's number is not, while anybody is in it."""
        return self._leaders.pop(pid, None)

    def leave(self, worker: str) -> None:
        """Nothing of this worker is left."""
        self._sessions = {pid: name for pid, name in self._sessions.items() if name != worker}
        self._logs = {log: name for log, name in self._logs.items() if name != worker}

    # --- looks

    def of(self, worker: str, newer_than: float) -> list[Identity]:
        """All that runs of a worker now, by a look that is not older than ``newer_than``."""
        if not self._may_have(worker):
            return []
        self._see(newer_than)
        return self._running(self._roots(worker), worker) or self._newborn(worker)

    def everything(self, newer_than: float) -> list[Identity]:
        """All that runs below the agent, nobody's orphans included."""
        self._see(newer_than)
        return self._running(self._orphans_and_leaders(), None) or self._newborn(None)

    def survey(self) -> dict[str, list[Identity]]:
        """All that runs of each worker but its own process, to be remembered."""
        self._see(self._clock())
        self._owners = {key: name for key, name in self._owners.items() if self._is_there(*key)}
        found: dict[str, list[Identity]] = {}
        for pid in self._orphans_and_leaders():
            if (worker := self._owner(pid)) is not None:
                tree = self._running([pid], worker)
                found.setdefault(worker, []).extend(one for one in tree if one.pid not in self._leaders)
        return found

    def owner_of(self, pid: int) -> str | None:
        """The worker that a process belongs to, going up from it; None where that is nobody's."""
        chain = process.ancestors(pid) | {pid}
        if leader := next((leader for leader in self._leaders if leader in chain), None):
            return self._leaders[leader]
        return self._by_tag(pid) if os.getpid() in chain else None

    def _may_have(self, worker: str) -> bool:
        """A quick no: the worker's own process is gone, and no orphan has come to the agent."""
        if worker in self._leaders.values():
            return True
        return any(pid not in self._leaders for pid in self._now_below())

    def _see(self, newer_than: float) -> None:
        """Have a census that was begun after ``newer_than``."""
        if self._taken > newer_than:
            return
        now = self._clock()
        self._census, self._below, self._taken = take_census(), {}, now
        for pid, entry in self._census.items():
            self._below.setdefault(entry.parent, []).append(pid)

    def _orphans_and_leaders(self) -> list[int]:
        found = self._below.get(os.getpid(), [])
        if self._init is None:
            return found
        return [pid for pid in found if pid not in self.keepers] + self._below.get(self._init, [])

    def _now_below(self) -> list[int]:
        """As ``_orphans_and_leaders``, at this moment."""
        found = process.children(os.getpid())
        if self._init is None:
            return found
        return [pid for pid in found if pid not in self.keepers] + process.children(self._init)

    def _roots(self, worker: str) -> list[int]:
        return [pid for pid in self._orphans_and_leaders() if self._owner(pid) == worker]

    def _running(self, roots: Iterable[int], owner: str | None) -> list[Identity]:
        """The roots and all below them that runs; remembered as their owner's."""
        found = []
        queue = list(roots)
        for pid in queue:  # grows while it is walked
            entry = self._census[pid]
            queue.extend(self._below.get(pid, ()))
            if owner is not None:
                self._owners[pid, entry.start_time] = owner
            if not entry.over:
                found.append(Identity(pid, entry.start_time, boot_id()))
        return found

    def _newborn(self, worker: str | None) -> list[Identity]:
        """Orphans and leaders that are younger than the census, and the worker's (None: anybody's).

        The list of /proc is not of one moment: who forks and leaves all the time is never in it. One that is gone
        again when it is looked at is listed too: who it was is not known, so this look has not found nothing.
        """
        found = []
        for pid in self._now_below():
            if pid in self._census or pid in self._leaders or (one := process.identify(pid)) is None:
                continue
            owner = self._by_session(pid) or self._by_tag(pid) or self._by_log(pid)
            if worker in (None, owner) or (owner is None and not process.alive(one)):
                found.append(one)
        return found

    def _is_there(self, pid: int, start_time: int) -> bool:
        entry = self._census.get(pid)
        return entry is not None and entry.start_time == start_time

    def _owner(self, pid: int) -> str | None:
        """The worker of an orphan or a leader."""
        entry = self._census[pid]
        if worker := self._leaders.get(pid) or self._owners.get((pid, entry.start_time)):
            return worker
        return self._sessions.get(entry.session) or self._by_tag(pid) or self._by_log(pid)

    def _by_session(self, pid: int) -> str | None:
        try:
            return self._sessions.get(os.getsid(pid))
        except OSError:
            return None

    def _by_tag(self, pid: int) -> str | None:
        found = process.environ(pid) or {}
        return found.get(names.WORKER) if found.get(names.RUN_ID) == self._run_id else None

    def _by_log(self, pid: int) -> str | None:
        for number in (1, 2):
            try:
                worker = self._logs.get(os.readlink(f"/proc/{pid}/fd/{number}"))  # noqa: PTH115 (light)
            except OSError:
                continue
            if worker:
                return worker
        return None
