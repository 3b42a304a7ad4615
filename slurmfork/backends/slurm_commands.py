"""How Slurm's commands are asked: in time, and in an environment that does not change what they answer.

Nothing here knows what the answers mean.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from slurmfork import devices, names
from slurmfork.backends.base import PATIENCE_S

# What a shell inside of a job, or of a worker of ours, would hand on to the commands or to the new job.
_PROGRAMS = "SLURM SLURMD SBATCH SRUN SALLOC SQUEUE SACCT SCANCEL SINFO SCONTROL SLURMFORK"
_SCRUBBED = tuple(f"{program}_" for program in _PROGRAMS.split())
_KEPT = ("SLURM_CONF", "SLURM_JWT")


class Answer(NamedTuple):
    """What a command printed. ``words`` is its standard error, or why there is no answer, in one line."""

    ok: bool
    output: str
    words: str
    missing: bool = False


def environment(own: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment to ask a command of Slurm in.

    In UTC and in C: times are printed without a zone, and words are compared.
    """
    return {**_outside(os.environ if own is None else own), "TZ": "UTC0", "LC_ALL": "C"}


def environment_of_job(secrets: Sequence[str], own: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment to submit in, which the job gets too, and Slurm stores: nothing secret is in it."""
    given = os.environ if own is None else own
    dropped = {
        *secrets,
        *given.get(names.DRESSED, "").split(),
        *((*names.WORKERS_OWN, *devices.VARIABLES) if names.WORKER in given else ()),
    }
    clusters = {name: value for name, value in given.items() if name == "SLURM_CLUSTERS"}
    return {name: value for name, value in {**_outside(given), **clusters}.items() if name not in dropped}


def _outside(given: Mapping[str, str]) -> dict[str, str]:
    kept = (*_KEPT, names.ROOT, names.DEVICE_FILES)
    return {name: value for name, value in given.items() if name in kept or not name.startswith(_SCRUBBED)}


def ask(argv: Sequence[str], *, timeout: float = PATIENCE_S, env: Mapping[str, str] | None = None) -> Answer:
    """Run a command of Slurm to its end; an answer that is not ``ok`` says why in ``words``."""
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment() if env is None else env,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        return Answer(False, "", f"{argv[0]} was not found on PATH", missing=True)
    except OSError as error:
        return Answer(False, "", f"{argv[0]} cannot be run: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Answer(False, "", f"{argv[0]} did not answer within {timeout:.0f} s")
    words = one_line(done.stderr.decode(errors="replace"))
    if done.returncode and not words:
        words = f"{argv[0]} failed with status {done.returncode}"
    return Answer(done.returncode == 0, done.stdout.decode(errors="replace"), words)


def one_line(text: str) -> str:
    """Several lines of a message as one."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def of_cluster(command: str, cluster: str | None) -> list[str]:
    """The beginning of a command line: the command, and the cluster that it is about."""
    return [command, "-M", cluster] if cluster else [command]
