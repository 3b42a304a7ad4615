"""How jobs begin here: releases, partitions, the Python of the nodes, and what changes a job on its way."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from slurmfork.backends.base import Check
from slurmfork.backends.slurm_environment import is_scrubbed
from slurmfork.doctor.place import LOCAL_FILE_SYSTEMS, file_system_of
from slurmfork.doctor.site import Site, release_of, several

OLDEST = (20, 11)
_OLD = (22, 5)
_PARTITIONS = 20
# Which Python a distribution brings by itself, told by the kernel that its nodes run.
_OWN_PYTHONS = (
    (r"\.el7\b|\.el7\.", "RHEL 7 and its kin have 3.6"),
    (r"\.el8", "RHEL 8 and its kin have 3.6, with 3.11 and 3.12 as packages"),
    (r"\.el9", "RHEL 9 and its kin have 3.9, with 3.11 and 3.12 as packages"),
    (r"Debian 4\.19", "Debian 10 has 3.7"),
    (r"Debian 5\.10", "Debian 11 has 3.9"),
    (r"^Linux 5\.4\.0.*Ubuntu", "Ubuntu 20.04 has 3.8"),
    (r"^Linux 5\.3\.18.*default|^Linux 5\.14\.21.*default", "SLES 15 has 3.6, with 3.11 as a package"),
)


def release(site: Site) -> Check:
    """Releases of the commands and of slurmctld, which may be two or three apart."""
    here, there = release_of(site.client), site.release
    detail = f"{site.client or 'no version'} here, slurmctld {site.settings.get('SLURM_VERSION', '?')} answers"
    old = [release for release in (here, there) if (0, 0) < release < OLDEST]
    if old:
        todo = "ask for Slurm 20.11 or later, or use `--backend local` on a machine of your own"
        means = "before 20.11 a job's steps cannot overlap, and an agent cannot run beside them"
        return Check(name="slurm", ok=False, detail=detail, means=means, todo=todo)
    if (0, 0) in (here, there):
        return Check(name="slurm", ok=True, detail=detail)
    if abs(_number(here) - _number(there)) > _number((1, 10)):
        means = "Slurm answers clients that are two or three releases away, and may refuse these"
        todo = "load the Slurm module that goes with this cluster"
        return Check(name="slurm", ok=True, detail=detail, means=means, todo=todo)
    return Check(name="slurm", ok=True, detail=detail)


def _number(release: tuple[int, int]) -> int:
    """Months, as releases are counted."""
    return release[0] * 12 + release[1]


def partitions(site: Site) -> Check:
    """Where jobs can go. Without one to be seen nothing can be submitted by its name."""
    if not site.partitions:
        detail = "no partition is shown"
        means = "either you may use none, or the site hides them"
        todo = "ask which partition to put into `slurm:`"
        return Check(name="partitions", ok=False, detail=detail, means=means, todo=todo)
    shown = [
        f"{one.get('PartitionName', '?')}{'*' if one.get('Default') == 'YES' else ''}: {one.get('TotalNodes', '?')} "
        f"nodes, {one.get('State', '?').lower()}, limit {one.get('MaxTime', '?')}"
        for one in site.partitions[:_PARTITIONS]
    ]
    if not any(one.get("Default") == "YES" for one in site.partitions):
        means = "there is no default: a spec that names none is refused"
        return Check(name="partitions", ok=True, detail="; ".join(shown), means=means, todo="put one into `slurm:`")
    return Check(name="partitions", ok=True, detail="; ".join(shown))


def root_jobs(site: Site) -> Check | None:
    """Some sites let root submit nothing."""
    if site.text("DisableRootJobs").lower() != "yes" or os.geteuid() != 0:
        return None
    means = "Slurm refuses what you submit as root"
    return Check(name="root's jobs", ok=False, detail="DisableRootJobs=Yes", means=means, todo="log in as yourself")


def python_of_nodes(site: Site) -> Check:
    """As far as it can be known without a job: whether nodes have the same file, or one of their own, and which."""
    python = Path(os.path.realpath(sys.executable))
    kind = file_system_of(python)
    kernels = {node["OS"] for node in site.nodes if node.get("OS")}
    owns = {words for pattern, words in _OWN_PYTHONS for kernel in kernels if re.search(pattern, kernel)}
    detail = f"runs start {sys.executable}" + (f", which is {python}" if str(python) != sys.executable else "")
    if kind and kind not in LOCAL_FILE_SYSTEMS:
        return Check(name="python of nodes", ok=True, detail=f"{detail}, on {kind}, which nodes may share")
    means = f"it lies on {kind or 'a file system'} of this machine, so each node needs its own, 3.10 or later"
    if owns:
        means += f"; by their kernels, {several(owns)}"
    elif (0, 0) < site.release < _OLD:
        means += "; systems of the age of this Slurm have 3.6 to 3.9 by themselves"
    todo = f"`srun -n1 {sys.executable} --version` shows it; if that fails, install slurmfork where nodes see it"
    return Check(name="python of nodes", ok=True, detail=detail, means=means, todo=todo)


def filters(site: Site) -> Check | None:
    """Plugins that look at each submission."""
    found = {name: site.text(name) for name in ("JobSubmitPlugins", "CliFilterPlugins") if site.text(name)}
    if not found:
        return None
    detail = "; ".join(f"{name}={value}" for name, value in found.items())
    means = "the site may add options to a job, refuse it, or remark on it; `submit` shows what it says"
    return Check(name="submit filters", ok=True, detail=detail, means=means)


def environment(site: Site) -> Check | None:
    """Variables of Slurm's in this very shell."""
    given = site.environment or {}
    found = [name for name in given if is_scrubbed(name)]
    if not found:
        return None
    detail = f"{len(found)} variables of Slurm's are set: {several(found)}"
    means = "they reach neither sbatch nor the job: a run is the same from any shell"
    if "SLURM_JOB_ID" in found:
        means = f"this is a shell inside of job {given['SLURM_JOB_ID']}; {means}"
    options = [name for name in found if name.startswith("SBATCH_")]
    todo = f"what {several(options)} should do, put into `slurm:`" if options else ""
    return Check(name="environment", ok=True, detail=detail, means=means, todo=todo)


def interactive_step(site: Site) -> Check | None:
    """salloc that leads to a compute node."""
    if "use_interactive_step" not in site.words("LaunchParameters"):
        return None
    detail = "LaunchParameters=use_interactive_step: salloc opens its shell on a node"
    means = "what you submit there is a job of its own, without what that shell has of its job"
    return Check(name="interactive step", ok=True, detail=detail, means=means)


def mpi(site: Site) -> Check | None:
    """What srun would set up for each task."""
    kind = site.text("MpiDefault")
    if not kind:
        return None
    means = "agents are started with --mpi=none; a worker that is an MPI program is no task of a step"
    todo = f"start such programs with `srun --overlap --mpi={kind}` from the worker's command"
    return Check(name="mpi", ok=True, detail=f"MpiDefault={kind}", means=means, todo=todo)


def binding(site: Site) -> Check | None:
    """A default by which one task gets one core."""
    words = site.words("TaskPluginParam")
    found = [f"autobind={words[word]}" for word in words if word == "autobind"]
    found += [f"CpuBind={one['CpuBind']}" for one in site.partitions if one.get("CpuBind", "none").lower() != "none"]
    if not found:
        return None
    means = "an agent would be bound to few CPUs; it is started with --cpu-bind=none and has all of the job's"
    return Check(name="cpu binding", ok=True, detail=several(found), means=means)


def firewall(site: Site) -> Check | None:
    """A range of ports for srun is a sign of one between the nodes."""
    ports = site.text("SrunPortRange")
    if ports in ("", "0-0"):
        return None
    means = "there may be a firewall between nodes; agents connect to a port of the head's, on the job's first node"
    todo = "if agents do not join, ask for all ports between compute nodes to be open"
    return Check(name="ports", ok=True, detail=f"SrunPortRange={ports}", means=means, todo=todo)
