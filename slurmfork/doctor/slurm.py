"""What `doctor` says of Slurm here: whether it answers, and then what of this site's configuration bears on runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping

from slurmfork.backends.base import Check
from slurmfork.backends.slurm_commands import ask
from slurmfork.doctor import asking, ending, giving, starting
from slurmfork.doctor.site import Site, read

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "sinfo", "scontrol")
# In the order in which they are told. Each gives None where what it looks for does not hold here.
CHECKS: tuple[Callable[[Site], Check | None], ...] = (
    starting.release,
    starting.partitions,
    starting.root_jobs,
    starting.python_of_nodes,
    starting.filters,
    starting.environment,
    starting.interactive_step,
    starting.mpi,
    starting.binding,
    starting.firewall,
    giving.gpus,
    giving.shared_gpus,
    giving.devices,
    giving.private_tmp,
    giving.adoption,
    ending.tracker,
    ending.grace,
    ending.preemption,
    asking.accounting,
    asking.rate_limit,
    asking.private_data,
)


def checks(environment: Mapping[str, str] | None = None) -> list[Check]:
    """All that holds here; without an answering controller the rest would say nothing.

    ``environment`` is this user's own, by default this process's.
    """
    missing = [name for name in COMMANDS if not shutil.which(name)]
    if missing:
        detail = f"not on PATH: {', '.join(missing)}"
        todo = "load Slurm's module, or log in to a login node; `--backend local` works without"
        return [Check(name="slurm commands", ok=False, detail=detail, todo=todo)]
    here = Check(name="slurm commands", ok=True, detail="all on PATH")
    answer = ask(["scontrol", "show", "config"])
    if not answer.ok:
        todo = "ask whether slurmctld is up (`scontrol ping`), and whether this is a login node of it"
        return [here, Check(name="slurm", ok=False, detail=answer.words, todo=todo)]
    site = read(answer.output, os.environ if environment is None else environment)
    return [here, *(found for check in CHECKS if (found := check(site)) is not None)]
