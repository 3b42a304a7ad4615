"""How Slurm can be asked here: what it keeps of jobs that are over, how often it answers, and what it hides."""

from __future__ import annotations

from slurmfork.backends.base import Check
from slurmfork.doctor.site import Site, release_of

SHORT_S = 60
_LIMITS_SINCE = (23, 2)


def accounting(site: Site) -> Check | None:
    """Optional: without it the end of a job that Slurm has dropped is known from the run directory only."""
    if site.accounting is None:
        return None
    if site.accounting.ok:
        return Check(name="accounting", ok=True, detail="sacct answers")
    age = site.seconds("MinJobAge")
    shown = "" if age is None else f"; a job is forgotten {age} s after its end (MinJobAge)"
    detail = f"none ({site.accounting.words}){shown}"
    means = "run directories keep how runs ended; of a job that ended before its script began, Slurm alone knows"
    todo = f"ask for such a job's `status` within {age} s" if age is not None and age < SHORT_S else ""
    return Check(name="accounting", ok=True, detail=detail, means=means, todo=todo)


def rate_limit(site: Site) -> Check | None:
    """A controller that answers each user so often only."""
    words = site.words("SlurmctldParameters")
    if "rl_enable" not in words:
        return None
    bucket, refill = words.get("rl_bucket_size") or "30", words.get("rl_refill_rate") or "2"
    detail = f"rl_enable: {bucket} questions at once, {refill} more a second"
    if (0, 0) < release_of(site.client) < _LIMITS_SINCE:
        means = "commands here, older than 23.02, fail where newer ones wait"
        return Check(name="rate limit", ok=True, detail=detail, means=means, todo="load a newer Slurm module")
    means = "past that, commands wait without a word; slurmfork asks squeue every 10 s at most, and waits for long"
    todo = "leave loops of squeue out of your scripts: they share the limit with your runs"
    return Check(name="rate limit", ok=True, detail=detail, means=means, todo=todo)


def private_data(site: Site) -> Check | None:
    """What is shown to its owner alone."""
    hidden = set(site.words("PrivateData")) - {"none"}
    if not hidden:
        return None
    meant = ["others' jobs, so why yours wait may not be seen"] if "jobs" in hidden else []
    if "nodes" in hidden:
        meant.append("nodes, so the head is found by the name of its host, and not by Slurm's NodeAddr")
    if "partitions" in hidden:
        meant.append("partitions, so `doctor` shows few or none")
    means = f"hidden are {'; '.join(meant)}" if meant else "nothing that slurmfork asks for is hidden"
    return Check(name="private data", ok=True, detail=f"PrivateData={','.join(sorted(hidden))}", means=means)
