"""Presets: how particular sites configure Slurm. Each is a real configuration, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mini.releases import RELEASES, Release, numbers_of, own
from mini.roots import root_of
from mini.words import Cluster, Failed, Shape

JOB_SUBMIT = """\
-- warns, adds, and rejects, as the filters of sites do
function slurm_job_submit(job_desc, part_list, submit_uid)
    if job_desc.time_limit == nil or job_desc.time_limit == slurm.NO_VAL then
        slurm.log_user("this site wants --time for every job")
        return slurm.ERROR
    end
    slurm.log_user("12;other is not your job: maintenance on Monday")
    job_desc.comment = "seen by the site"
    return slurm.SUCCESS
end

function slurm_job_modify(job_desc, job_rec, part_list, modify_uid)
    return slurm.SUCCESS
end

return slurm.SUCCESS
"""

CLI_FILTER = """\
function slurm_cli_setup_defaults(options, early_pass)
    return slurm.SUCCESS
end

function slurm_cli_pre_submit(options, pack_offset)
    slurm.log_info("your quota is at 90 percent")
    slurm.log_error("error: this is but a warning")
    return slurm.SUCCESS
end

function slurm_cli_post_submit(offset, job_id, step_id)
    return slurm.SUCCESS
end

return slurm.SUCCESS
"""


@dataclass(frozen=True)
class Site:
    """One preset. ``files`` lie beside slurm.conf; ``environment`` is that of every login; ``since``: the first
    release that has it; ``commands``: the release of the commands that logins have; ``refused``: why a cluster of this
    shape cannot have it, or empty."""

    about: str
    lines: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    since: tuple[int, int] = (0, 0)
    lacking: str = ""
    commands: str = ""
    refused: Callable[[Cluster, Shape], str] = lambda cluster, shape: ""


def release_of(shape: Shape) -> tuple[int, ...]:
    return numbers_of(shape.slurm or own())


def under_tmp(cluster: Cluster, shape: Shape) -> str:
    if shape.kernels:
        return ""
    return "its nodes are on this machine, and a /tmp of each job's own would hide what the cluster has there"


def no_other_user(cluster: Cluster, shape: Shape) -> str:
    if shape.kernels:
        return "it is about ordinary users, and on kernels of their own all work is root's, whom it lets pass"
    return "it is about SSH to nodes that are hosts of their own"


def too_far_apart(cluster: Cluster, shape: Shape) -> str:
    """A slurmctld answers commands of its own release and of the two before it."""
    if shape.rooted or release_of(shape) > (22, 5):
        return "slurmctld is to be this machine's own, of 22.05 at most, to understand commands of 20.11"
    return ""


def needs_lua(cluster: Cluster, shape: Shape) -> str:
    return needs_plugin(cluster, shape, "job_submit_lua.so")


def needs_pmix(cluster: Cluster, shape: Shape) -> str:
    at = root_of(RELEASES[shape.slurm]) if shape.rooted else Path("/")
    return "" if any((at / "usr").glob("lib*/**/libpmix.so.2*")) else "there is no libpmix.so.2 for Slurm's plugin"


def needs_plugin(cluster: Cluster, shape: Shape, name: str) -> str:
    if shape.rooted or any(Path("/usr").glob(f"lib*/**/slurm*/{name}")):
        return ""
    return f"this machine's Slurm has no {name}"


SITES = {
    "tmpfs": Site(
        "a /tmp of each job's own",
        ("JobContainerType=job_container/tmpfs", "PrologFlags=Contain"),
        {"job_container.conf": "AutoBasePath=true\nBasePath=/var/spool/private\n"},
        refused=under_tmp,
    ),
    "export-none": Site(
        "jobs get nothing of the submitting shell's environment",
        environment={"SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE"},
    ),
    "rate-limit": Site(
        "slurmctld answers a user two requests a second",
        ("SlurmctldParameters=rl_enable,rl_bucket_size=6,rl_refill_rate=2,rl_refill_period=1",),
        since=(23, 2),
        lacking="no rl_enable",
    ),
    "private-data": Site(
        "nobody sees other people's jobs",
        ("PrivateData=jobs,nodes,partitions,reservations,usage,users",),
    ),
    "noisy": Site(
        "filters that warn on stderr, add a comment, and reject jobs without a time limit",
        ("JobSubmitPlugins=lua", "CliFilterPlugins=cli_filter/lua"),
        {"job_submit.lua": JOB_SUBMIT, "cli_filter.lua": CLI_FILTER},
        refused=needs_lua,
    ),
    "short-memory": Site("squeue forgets an ended job after 2 s", ("MinJobAge=2",)),
    "preempt": Site(
        "partitions whose jobs are cancelled after a grace time, requeued, or suspended for those of `gpu`",
        (
            "PreemptMode=SUSPEND,GANG",
            "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF",
            "PartitionName=spare Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL GraceTime=10",
            "PartitionName=requeue Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=10",
            "PartitionName=suspend Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=SUSPEND",
        ),
    ),
    "interactive": Site("salloc's shell is on a node", ("LaunchParameters=use_interactive_step",)),
    "adopt": Site(
        "SSH to a node is for who has a job there, and is in that job",
        ("PrologFlags=Contain",),
        refused=no_other_user,
    ),
    "old-commands": Site(
        "the commands of logins are of Slurm 20.11, two releases behind", commands="20.11", refused=too_far_apart
    ),
    "pmix": Site("MpiDefault=pmix", ("MpiDefault=pmix",), refused=needs_pmix),
    "autobind": Site(
        "every task is bound to threads of its own",
        ("TaskPlugin=task/affinity", "TaskPluginParam=autobind=threads"),
    ),
}


def need_site(cluster: Cluster, shape: Shape) -> None:
    """Refuses what this release, or this shape, cannot have."""
    if not shape.site:
        return
    site, release = SITES[shape.site], release_of(shape)
    if release and release < site.since:
        since = ".".join(f"{part:02}" for part in site.since)
        found = ".".join(f"{part:02}" for part in release)
        raise Failed(f"--site {shape.site}: Slurm {found} has {site.lacking}; {since} has it", 4)
    if reason := site.refused(cluster, shape):
        raise Failed(f"--site {shape.site}: {reason}", 4)


def site_lines(cluster: Cluster, shape: Shape) -> list[str]:
    if not shape.site:
        return []
    lines = list(SITES[shape.site].lines)
    if shape.site == "tmpfs" and release_of(shape) >= (25, 11):
        lines[0] = "NamespaceType=namespace/tmpfs"
    return lines


def foreign_commands(shape: Shape) -> Release | None:
    """The release that logins have the commands of, where it is not the cluster's."""
    name = SITES[shape.site].commands if shape.site else ""
    return RELEASES[name] if name else None


def site_environment(shape: Shape) -> dict[str, str]:
    """What a login shell has set there."""
    return SITES[shape.site].environment if shape.site else {}


def write_site(shape: Shape, at: Path) -> None:
    """What lies beside slurm.conf."""
    for name, text in SITES[shape.site].files.items() if shape.site else ():
        (at / name).write_text(text)
