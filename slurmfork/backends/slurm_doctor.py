"""What `doctor` says of Slurm here: whether it answers, and how this site's settings bear on a run."""

from __future__ import annotations

import re

from slurmfork.backends.base import Check
from slurmfork.backends.slurm_commands import ask

_TRACKERS = {
    "proctrack/cgroup": "Slurm itself ends what a job leaves behind",
    "proctrack/linuxproc": "daemons escape Slurm here; slurmfork's own rings end them",
    "proctrack/pgid": "sessions escape Slurm here; slurmfork's own rings end them",
}
_SETTING = re.compile(r"^(\w+)\s*=\s*(.*?)\s*$", re.MULTILINE)
LEAST_KILL_WAIT_S = 5


def checks() -> list[Check]:
    """One after the other; without an answering controller the rest would say nothing."""
    version = ask(["sbatch", "--version"])
    if not version.ok:
        detail = f"{version.words}; this is no Slurm login node, and `--backend local` is what works here"
        return [Check(name="slurm", ok=False, detail=detail)]
    answer = ask(["scontrol", "show", "config"])
    if not answer.ok:
        detail = f"{answer.words}; ask whether slurmctld is up (`scontrol ping`)"
        return [Check(name="slurm", ok=False, detail=detail)]
    settings = dict(_SETTING.findall(answer.output))
    server = settings.get("SLURM_VERSION", "?")
    here = Check(name="slurm", ok=True, detail=f"{version.output.strip()} here, slurmctld {server} answers")
    return [here, _partitions(), _tracker(settings), _kill_wait(settings), _accounting()]


def _partitions() -> Check:
    answer = ask(["sinfo", "-h", "-o", "%R: %D nodes, %c CPUs, %G, limit %l"])
    lines = [line.strip() for line in answer.output.splitlines() if line.strip()]
    if not lines:
        detail = answer.words or "sinfo shows no partition; the site may hide them, or you may use none"
        return Check(name="partitions", ok=False, detail=detail)
    return Check(name="partitions", ok=True, detail="; ".join(lines[:20]))


def _tracker(settings: dict[str, str]) -> Check:
    word = settings.get("ProctrackType", "?")
    detail = f"{word}: {_TRACKERS.get(word, 'unknown to slurmfork, which relies on its own rings')}"
    return Check(name="process tracking", ok=True, detail=detail)


def _kill_wait(settings: dict[str, str]) -> Check:
    found = re.match(r"\d+", settings.get("KillWait", ""))
    seconds = int(found[0]) if found else 0
    detail = f"KillWait is {seconds} s: so long workers have to end after scancel"
    if seconds < LEAST_KILL_WAIT_S:
        detail += "; Slurm gives 5 at least"
    return Check(name="grace", ok=True, detail=detail)


def _accounting() -> Check:
    """Optional: without it the end of a job that squeue has dropped is known from the run directory only."""
    answer = ask(["sacct", "-X", "-n", "-P", "-o", "JobIDRaw", "-S", "now"])
    detail = "sacct answers" if answer.ok else f"none ({answer.words}); run directories keep how runs ended"
    return Check(name="accounting", ok=True, detail=detail)
