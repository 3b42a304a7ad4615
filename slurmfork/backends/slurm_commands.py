"""How Slurm's commands are asked: in time, and in an environment that does not change what they answer.

Nothing here knows what the answers mean.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from slurmfork import names
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


def environment(own: Mapping[str, str] | None = None, *, submit: bool = False) -> dict[str, str]:
    """The environment for a command of Slurm; with ``submit`` the one that the job gets too.

    To ask is done in UTC and in C: times are printed without a zone, and words are compared.
    """
    found = {
        name: value
        for name, value in (os.environ if own is None else own).items()
        if name in _KEPT
        or not name.startswith(_SCRUBBED)
        or name in (names.ROOT, *(("SLURM_CLUSTERS",) if submit else ()))
    }
    return found if submit else {**found, "TZ": "UTC0", "LC_ALL": "C"}


def ask(argv: Sequence[str], *, timeout: float = PATIENCE_S, submit: bool = False) -> Answer:
    """Run a command of Slurm to its end; an answer that is not ``ok`` says why in ``words``."""
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment(submit=submit),
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
