"""How jobs end here: who tracks their processes, how long they have, and what else may end or stop them."""

from __future__ import annotations

from slurmfork.backends.base import Check
from slurmfork.doctor.site import Site, several

LEAST_KILL_WAIT_S = 5  # less is not to be had
DEFAULT_KILL_WAIT_S = 30
RESERVED_S = 2.0  # of it, for the agents to tell and to sweep
_AT_ONCE = ("0", "00:00:00", "")


def tracker(site: Site) -> Check:
    """Who knows which processes are a job's."""
    word = site.settings.get("ProctrackType", "?")
    kind = site.plugin("ProctrackType")
    if kind == "cgroup":
        means = "Slurm itself ends what a job leaves behind"
        if site.text("SignalChildrenProcesses").lower() == "yes":
            means += "; its SIGTERM reaches workers too, at once with the agents'"
        return Check(name="process tracking", ok=True, detail=word, means=means)
    escape = {"linuxproc": "daemons escape Slurm here", "pgid": "sessions escape Slurm here"}
    means = f"{escape.get(kind, 'slurmfork does not know this one')}; slurmfork's own rings end them"
    todo = "put `isolation: auto` into the spec; the site can install `slurmfork epilog`"
    return Check(name="process tracking", ok=True, detail=word, means=means, todo=todo)


def grace(site: Site) -> Check:
    """KillWait against the grace of a role."""
    given = site.seconds("KillWait")
    wait = max(LEAST_KILL_WAIT_S, DEFAULT_KILL_WAIT_S if given is None else given)
    detail = f"KillWait is {DEFAULT_KILL_WAIT_S if given is None else given} s"
    if given is not None and given < LEAST_KILL_WAIT_S:
        detail += f", and Slurm gives {LEAST_KILL_WAIT_S}"
    means = f"after scancel or at the time limit workers have {wait - RESERVED_S:g} s, whatever `stop: {{grace}}` says"
    todo = "`slurmfork cancel` gives the whole grace; for the time limit, give roles a `checkpoint`"
    return Check(name="grace", ok=True, detail=detail, means=means, todo=todo)


def preemption(site: Site) -> Check | None:
    """Whether others' jobs may end or stop a run."""
    kind = site.text("PreemptType")
    if not kind or site.plugin("PreemptType") == "none":
        return None
    modes = {word for one in site.partitions for word in _words(one.get("PreemptMode", ""))}
    modes = (modes or _words(site.text("PreemptMode"))) - {"OFF", "NONE", "WITHIN"}
    if not modes:
        return None
    graces = {one["PartitionName"]: one.get("GraceTime", "0") for one in site.partitions if "PartitionName" in one}
    some = {name: span for name, span in graces.items() if span not in _AT_ONCE}
    shown = several(f"{span} s on {name}" for name, span in some.items())
    detail = f"{kind}, mode {several(modes)}" + (f", GraceTime {shown}" if shown else ", no GraceTime")
    meant = []
    if modes & {"CANCEL", "REQUEUE"}:
        meant.append("a preempted run is told as at scancel" + (", GraceTime before its end" if some else ""))
    if "REQUEUE" in modes:
        meant.append("and is requeued only with `requeue: true`")
    if modes & {"SUSPEND", "GANG"}:
        meant.append("a suspended run stands still, for hours perhaps, and goes on")
    todo = "give roles a `checkpoint`, and with `requeue: true` the run comes back" if "SUSPEND" not in modes else ""
    if "send_user_signal" in site.words("PreemptParameters"):
        meant.append("the warning comes first (send_user_signal)")
    return Check(name="preemption", ok=True, detail=detail, means="; ".join(meant), todo=todo)


def _words(text: str) -> set[str]:
    return {word.strip().upper() for word in text.split(",") if word.strip()}
