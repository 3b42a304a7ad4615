"""What a job is given here: GPUs, whole or shared, devices that are kept apart, a /tmp, and ways to its nodes."""

from __future__ import annotations

from slurmfork.backends.base import Check
from slurmfork.doctor.site import Site

_SHARED = ("shard", "mps")


def gpus(site: Site) -> Check | None:
    """Whether Slurm knows of GPUs at all."""
    if "gpu" in site.words("GresTypes"):
        return None
    detail = "GresTypes has no gpu" + (f" ({site.text('GresTypes')})" if site.text("GresTypes") else "")
    means = "Slurm hands out no GPUs here: a role with `gpus` finds no node"
    return Check(
        name="gpus", ok=True, detail=detail, means=means, todo="leave `gpus` out, or ask about another cluster"
    )


def shared_gpus(site: Site) -> Check | None:
    """GPUs that several jobs may be on."""
    found = [kind for kind in _SHARED if kind in site.words("GresTypes")]
    if not found:
        return None
    means = "such a part of a GPU is no device of one's own: a role with `gpus` needs whole GPUs"
    todo = "ask for `gpus-per-node`; or for `gres: shard:N`, and roles without `gpus`, which all see what was given"
    return Check(name="shared gpus", ok=True, detail=f"GresTypes has {' and '.join(found)}", means=means, todo=todo)


def devices(site: Site) -> Check | None:
    """Whether a job can open the GPUs of others."""
    if "gpu" not in site.words("GresTypes"):
        return None
    kept = site.text("ConstrainDevices").lower() == "yes" and "cgroup" in site.text("TaskPlugin")
    if kept:
        means = "a job's GPUs are counted from 0; which they are on the node is in SLURM_STEP_GPUS"
        return Check(name="devices", ok=True, detail="ConstrainDevices=yes", means=means)
    means = "programs can open every GPU of the node: CUDA_VISIBLE_DEVICES alone keeps jobs and workers apart"
    todo = "leave CUDA_VISIBLE_DEVICES of a worker as it is; preflight tells who else holds your GPUs"
    return Check(name="devices", ok=True, detail="devices are not constrained", means=means, todo=todo)


def private_tmp(site: Site) -> Check | None:
    """A /tmp for each job: job_container/tmpfs, called namespace/tmpfs since 25.11."""
    kind = site.plugin("NamespaceType") or site.plugin("JobContainerType")
    if not kind:
        return None
    means = "each job has a /tmp and /dev/shm of its own, gone at its end; all steps of the job share them"
    if kind == "linux":
        means += "; its processes have PIDs and perhaps uids of their own, other than those seen on the node"
    todo = "keep nothing in /tmp that is to outlive the run; look at workers by `slurmfork ps --probe --via srun`"
    return Check(name="private /tmp", ok=True, detail=f"{kind}", means=means, todo=todo)


def adoption(site: Site) -> Check:
    """What can be known of ssh to the nodes from here."""
    contained = {"contain", "x11"} & set(site.words("PrologFlags"))
    if contained and site.plugin("ProctrackType") == "cgroup":
        detail = "PrologFlags=Contain: nodes may admit ssh to those who have a job there (pam_slurm_adopt)"
        means = "what is started by ssh then belongs to a job, the newest of yours on that node, and ends with it"
        return Check(name="ssh to nodes", ok=True, detail=detail, means=means)
    detail = "nodes cannot put an ssh session into a job here" + ("" if contained else " (no PrologFlags=Contain)")
    means = "ssh is refused, or is outside of all jobs; `ps --probe` tries it, and then srun"
    return Check(name="ssh to nodes", ok=True, detail=detail, means=means)
