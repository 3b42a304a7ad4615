"""The probe: what the journals of a run say, held against what /proc on its nodes shows.

Pure: it judges answers, and asks nobody (``slurmfork.probing`` does). A process is known by PID, start
time in ticks, and boot, so no clock has to be right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

from msgspec import Struct, field

from slurmfork.journal import Started
from slurmfork.messages import WorkerView
from slurmfork.names import LIVE_STATES, OVER_STATES, WORKER, WorkerState
from slurmfork.nodelook import Look, Tagged
from slurmfork.process import Identity
from slurmfork.recorded import Recorded

AGENT, GUARDIAN = "slurmfork-agent", "slurmfork-guard"  # as they call themselves
SHOWN = 5  # PIDs in a sentence


class Verdict(str, Enum):
    """What became of a worker's process. ``NOT_OURS``: its PID is another process's by now."""

    ALIVE = "alive"
    GONE = "gone"
    NOT_OURS = "not ours"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


class NodeProbe(Struct, kw_only=True):
    """How a node was asked: ``via`` here, ssh or srun, and in how many seconds; or why it could not be.

    ``agent``: whether the node's agent lives. ``notes``: what of its answer or its journal is to be doubted.
    """

    node: str
    via: str = ""
    ok: bool = False
    reason: str = ""
    took: float = 0.0
    agent: Verdict = Verdict.UNKNOWN
    notes: list[str] = field(default_factory=list)


class WorkerProbe(Struct, kw_only=True):
    """What became of the process of a worker that was started last.

    ``ended``: its agent recorded its end. ``left``: PIDs that were seen below it and are alive.
    """

    worker: str
    node: str
    pid: int | None = None
    verdict: Verdict
    ended: bool = False
    reason: str = ""
    left: list[int] = field(default_factory=list)


class Unrecorded(Struct, kw_only=True):
    """A process with the run's tag that no record names, and that is below nothing of the run that lives."""

    node: str
    pid: int
    worker: str
    command: str


class Probe(Struct, kw_only=True):
    """A run as its nodes show it. ``differences``: where the head says otherwise, a line each."""

    nodes: list[NodeProbe] = field(default_factory=list)
    workers: list[WorkerProbe] = field(default_factory=list)
    unrecorded: list[Unrecorded] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def unanswered(self) -> list[NodeProbe]:
        """The nodes that could not be asked."""
        return [node for node in self.nodes if not node.ok]


# --- one node


def judge(recorded: Recorded, look: Look | None, why: str) -> list[WorkerProbe]:
    """A verdict on each worker that the journal names; ``why`` there is no look, if there is none."""
    return [_judge(worker, recorded, look, why) for worker in recorded.starts | recorded.intents]


def _judge(worker: str, recorded: Recorded, look: Look | None, why: str) -> WorkerProbe:
    start, intent = recorded.starts.get(worker), recorded.intents.get(worker)
    if start is None or (intent and intent.start_id != start.start_id and intent.time > start.time):
        verdict, reason = _of_intent(worker, recorded, look, why)
        return WorkerProbe(worker=worker, node=recorded.node, verdict=verdict, reason=reason)
    end = recorded.ends.get((start.start_id, start.pid))
    if end is not None:
        status = "" if end.exit_status is None else f": exit status {end.exit_status}"
        verdict, reason = Verdict.GONE, f"its end is recorded{status}"
    elif look is None:
        verdict, reason = Verdict.UNKNOWN, why
    else:
        verdict, reason = _of_start(start, recorded.node, look)
    left = _left(recorded.seen.get(worker, set()), look) if look else []
    if left and verdict is not Verdict.ALIVE:
        reason += f"; {_pids(left)} of its processes {'is' if len(left) == 1 else 'are'} left"
    return WorkerProbe(
        worker=worker, node=recorded.node, pid=start.pid, verdict=verdict, ended=bool(end), reason=reason, left=left
    )


def _of_intent(worker: str, recorded: Recorded, look: Look | None, why: str) -> tuple[Verdict, str]:
    """A start that was announced; whether it came about was not written down."""
    if look is None:
        return Verdict.UNKNOWN, why
    own = [one.pid for one in look.tagged if one.node == recorded.node and one.environment.get(WORKER) == worker]
    if own:
        return Verdict.UNKNOWN, f"its start was announced and no PID recorded; {_pids(own)} may be it"
    return Verdict.GONE, "its start was announced, and nothing there carries its name"


def _of_start(start: Started, node: str, look: Look) -> tuple[Verdict, str]:
    if look.boot_id != start.boot_id:
        if is_another_machine(start, look):
            return Verdict.UNKNOWN, f"{look.host}, which answers as {node}, is not the machine that it was started on"
        return Verdict.GONE, f"{node} was restarted since"
    stat = look.stats.get(start.pid)
    if stat is None and 1 not in look.stats and look.uid not in (0, start.uid):
        return Verdict.UNKNOWN, f"{node} shows user {look.uid} no processes of user {start.uid}"
    if stat is None:
        return Verdict.GONE, f"there is no pid {start.pid}"
    if stat.start_time != start.start_time:
        return Verdict.NOT_OURS, f"pid {start.pid} is another process by now ({stat.comm})"
    if stat.over:
        return Verdict.GONE, f"pid {start.pid} has exited and nobody has reaped it"
    return Verdict.ALIVE, {"T": "stopped by a signal", "D": "waits in the kernel (state D)"}.get(stat.state, "")


def is_another_machine(start: Started, look: Look) -> bool:
    """Whether the machine that was looked at ran in another boot than it should before the start was recorded."""
    return look.boot_id != start.boot_id and look.booted <= start.time


def _left(seen: Iterable[Identity], look: Look) -> list[int]:
    return sorted(one.pid for one in seen if _is_alive(one, look))


def _is_alive(one: Identity, look: Look) -> bool:
    stat = look.stats.get(one.pid)
    return one.boot_id == look.boot_id and stat is not None and not stat.over and stat.start_time == one.start_time


def _pids(pids: Sequence[int]) -> str:
    more = f" and {len(pids) - SHOWN} more" if len(pids) > SHOWN else ""
    return "pid " + ", ".join(map(str, pids[:SHOWN])) + more


def agent_of(node: str, look: Look) -> tuple[Verdict, str]:
    """Whether the agent of a node lives, and what is odd about it; not known without a whole search for tags."""
    found = [one.stat for one in _own(node, look) if one.stat.comm == AGENT and not one.stat.over]
    if found:
        return Verdict.ALIVE, "its agent is stopped by a signal" if found[0].state == "T" else ""
    return (Verdict.GONE if look.complete else Verdict.UNKNOWN), ""


def _own(node: str, look: Look) -> list[Tagged]:
    return [one for one in look.tagged if one.node == node and one.owner == look.uid]


def unrecorded(recorded: Recorded, look: Look, job_id: str | None) -> list[Unrecorded]:
    """Workers' processes that are neither recorded nor below what is, or below the agent, and so nobody's.

    ``job_id``: leave out what belongs to another Slurm job, for a job that a worker submits inherits the tag.
    """
    known = {start.identity for start in recorded.starts.values()}.union(*recorded.seen.values())
    watched = {one.pid for one in known if _is_alive(one, look)}
    watched |= {one.pid for one in _own(recorded.node, look) if one.stat.comm in (AGENT, GUARDIAN)}
    return [
        Unrecorded(node=recorded.node, pid=one.pid, worker=one.environment[WORKER], command=one.command)
        for one in _own(recorded.node, look)
        if one.environment.get(WORKER)
        and not one.stat.over
        and not watched & one.above
        and (job_id is None or one.environment.get("SLURM_JOB_ID", job_id) == job_id)
    ]


# --- against the head's word


def without_record(
    views: Iterable[WorkerView], every: Mapping[str, tuple[Recorded, Look | None]], known: set[str]
) -> list[WorkerProbe]:
    """Workers that have a process by the head's word, and none by a journal that is there and whole, or is not."""
    found = []
    for view in views:
        if view.worker in known or view.pid is None or view.node is None:
            continue
        recorded, look = every.get(view.node, (None, None))
        why = (recorded.uncertain if recorded else "") or f"the journal of {view.node} does not name it"
        verdict, reason = Verdict.UNKNOWN, f"not verified: {why}"
        own = [one.pid for one in _own(view.node, look) if one.environment.get(WORKER) == view.worker] if look else []
        if view.pid in own:
            verdict, reason = Verdict.ALIVE, f"{why}, but pid {view.pid} carries its name"
        found.append(WorkerProbe(worker=view.worker, node=view.node, pid=view.pid, verdict=verdict, reason=reason))
    return found


def differences(before: Iterable[WorkerView], after: Iterable[WorkerView], probes: Iterable[WorkerProbe]) -> list[str]:
    """Where the head's word, the same before the nodes were asked and after, is not what they showed."""
    then = {view.worker: view for view in before}
    told = {probe.worker: probe for probe in probes}
    lines = []
    for now in after:
        view, probe = then.get(now.worker), told.get(now.worker)
        if view is None or probe is None or (view.state, view.pid, view.node) != (now.state, now.pid, now.node):
            continue
        if line := _difference(now, probe):
            lines.append(f"{now.worker}: {line}")
    return lines


def _difference(view: WorkerView, probe: WorkerProbe) -> str:
    says = f"the head says {view.state}, but "
    if probe.verdict is Verdict.ALIVE and view.state in OVER_STATES:
        return f"{says}pid {probe.pid} on {probe.node} is alive"
    if view.state not in LIVE_STATES or view.pid is None or view.state is WorkerState.RESTARTING:
        return ""
    if probe.verdict is not Verdict.UNKNOWN and (view.pid, view.node) != (probe.pid, probe.node):
        recorded = "no pid" if probe.pid is None else f"pid {probe.pid}"
        return f"the head says pid {view.pid} on {view.node}, but the journal of {probe.node} {recorded}"
    if probe.verdict is Verdict.GONE:
        return f"{says}pid {probe.pid} on {probe.node} is gone"
    if probe.verdict is Verdict.NOT_OURS:
        return f"{says}pid {probe.pid} on {probe.node} is another process"
    return ""
