"""Which variables reach a command of Slurm's, and which a new job: none that are of a job, or change an answer.

A shell in an allocation, a worker of a run and many a login profile hold dozens that sbatch, srun, squeue and sacct
obey. A job is to be the same wherever it is submitted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from slurmfork import devices, names

_PROGRAMS = "SLURM SLURMD SBATCH SRUN SALLOC SQUEUE SACCT SCANCEL SINFO SCONTROL SPANK _SLURM_SPANK SLURMFORK"
_SCRUBBED = tuple(f"{program}_" for program in _PROGRAMS.split())
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", names.ROOT, names.DEVICE_FILES})  # how it is found


def environment(own: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment to ask a command of Slurm in.

    In UTC and in C: times are printed without a zone, and words are compared.
    """
    return {**_outside(os.environ if own is None else own), "TZ": "UTC0", "LC_ALL": "C"}


def environment_of_job(secrets: Sequence[str], own: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment to submit in, which the job gets too, and Slurm stores: nothing secret is in it."""
    given = os.environ if own is None else own
    dropped = {*secrets, *given.get(names.DRESSED, "").split()}
    if names.WORKER in given:
        dropped.update(names.WORKERS_OWN)
    if names.WORKER in given or "SLURM_JOB_ID" in given:
        dropped.update(devices.GRANTS, filter(names.LAUNCHED_PATTERN.fullmatch, given))
    if _is_jobs_own(given.get("TMPDIR", ""), given.get("SLURM_JOB_ID", "")):
        dropped.add("TMPDIR")
    clusters = {name: value for name, value in given.items() if name == "SLURM_CLUSTERS"}
    return {name: value for name, value in {**_outside(given), **clusters}.items() if name not in dropped}


def is_scrubbed(name: str) -> bool:
    """Whether a variable is one that Slurm, or a run of ours, has made for a job or a command, and is not handed on."""
    return name.startswith(_SCRUBBED) and name not in _KEPT


def _outside(given: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in given.items() if not is_scrubbed(name)}


def _is_jobs_own(place: str, job_id: str) -> bool:
    """Whether a directory is named after a job, as sites make one for each, which goes with it."""
    return bool(job_id) and re.search(rf"(?<!\d){re.escape(job_id)}(?!\d)", place) is not None
