"""The files that Slurm's daemons read."""

from __future__ import annotations

import os
import socket
import stat

from mini.processes import CGROUPS
from mini.words import KILL_WAIT_S, Cluster, Place, Shape


def span(first: int, last: int) -> str:
    return f"[{first}-{last}]" if first < last else str(first)


def slurm_conf(cluster: Cluster, shape: Shape, place: Place) -> str:
    home, host, n = cluster.home, socket.gethostname().partition(".")[0], shape.nodes
    gres = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    lines = [
        f"ClusterName={cluster_name(cluster)}",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={place.slurmctld}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={home}/munge/socket",
        "CommunicationParameters=NoCtldInAddrAny",  # slurmd would listen at the host name, not at NodeAddr
        f"StateSaveLocation={home}/state",
        f"SlurmdSpoolDir={home}/spool/%n",
        f"SlurmctldPidFile={home}/run/slurmctld.pid",
        f"SlurmdPidFile={home}/run/%n.pid",
        f"SlurmctldLogFile={home}/log/slurmctld.log",
        f"SlurmdLogFile={home}/log/%n.log",
        "MailProg=/bin/true",
        f"ProctrackType=proctrack/{shape.proctrack}",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerParameters=sched_interval=1,bf_interval=1",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        f"KillWait={KILL_WAIT_S}",
        f"MinJobAge={shape.min_job_age}",
        "SlurmdTimeout=60",
        "MessageTimeout=30",  # many nodes share few cores here
        "PreemptType=preempt/partition_prio",
        "PreemptMode=CANCEL",
        *(["TaskPlugin=task/cgroup,task/affinity"] if shape.proctrack == "cgroup" else []),
        *(["GresTypes=gpu"] if shape.gpus else []),
        *(accounting_lines(cluster, place) if shape.accounting else []),
        f"NodeName={cluster.prefix}{span(1, n)} NodeHostname={host} NodeAddr=127.0.{place.block}.{span(1, n)}"
        f" Port={span(place.slurmd(1), place.slurmd(n))} CPUs={shape.cpus} RealMemory=512000{gres}",
        "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=2",
        "PartitionName=spare Nodes=ALL MaxTime=INFINITE PriorityTier=1",  # jobs of `gpu` preempt those here
    ]
    own = {key_of(line) for line in shape.settings}
    return "\n".join([*shape.settings, *(line for line in lines if key_of(line) not in own)]) + "\n"


def key_of(line: str) -> str:
    return line.partition("=")[0].strip().lower()


def cluster_name(cluster: Cluster) -> str:
    return "slurmfork_" + cluster.name.replace("-", "_")


def accounting_lines(cluster: Cluster, place: Place) -> list[str]:
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={place.slurmdbd}",
        f"AccountingStoragePass={cluster.home}/munge/socket",  # sacctmgr asks here, not AuthInfo
        "AccountingStorageTRES=gres/gpu",
    ]


def slurmdbd_conf(cluster: Cluster, place: Place) -> str:
    home = cluster.home
    lines = [
        "AuthType=auth/munge",
        f"AuthInfo=socket={home}/munge/socket",
        "DbdHost=localhost",
        "DbdAddr=127.0.0.1",
        f"DbdPort={place.slurmdbd}",
        "SlurmUser=root",
        f"LogFile={home}/log/slurmdbd.log",
        f"PidFile={home}/run/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        "StorageUser=root",
        "StorageLoc=slurm",
    ]
    return "\n".join(lines) + "\n"


def cgroup_conf() -> str:
    if (CGROUPS / "cgroup.controllers").exists():
        kind = ["CgroupPlugin=cgroup/v2", "IgnoreSystemd=yes"]
    else:
        kind = ["CgroupPlugin=cgroup/v1", f"CgroupMountpoint={CGROUPS}"]
    return "\n".join([*kind, "ConstrainCores=no", "ConstrainDevices=no", "ConstrainRAMSpace=no"]) + "\n"


def write_files(cluster: Cluster, shape: Shape, place: Place) -> None:
    home = cluster.home
    for part in ("state", "spool", "run", "log", "gpus", "munge"):
        (home / part).mkdir(mode=0o755)
    (home / "munge" / "key").write_bytes(os.urandom(128))
    (home / "munge" / "key").chmod(0o400)
    cluster.conf.write_text(slurm_conf(cluster, shape, place))
    (home / "cgroup.conf").write_text(cgroup_conf())
    if shape.gpus:
        make_gpus(cluster, shape)
    if shape.accounting:
        (home / "slurmdbd.conf").touch(mode=0o600)
        (home / "slurmdbd.conf").write_text(slurmdbd_conf(cluster, place))


def make_gpus(cluster: Cluster, shape: Shape) -> None:
    """Devices that are /dev/null: Slurm counts and hands out character devices, and opens none."""
    for i in range(shape.gpus):
        device = cluster.home / "gpus" / f"gpu{i}"
        try:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:  # a container without the right to make devices
            device.symlink_to("/dev/null")
    names, files = cluster.prefix + span(1, shape.nodes), f"{cluster.home}/gpus/gpu{span(0, shape.gpus - 1)}"
    (cluster.home / "gres.conf").write_text(f"NodeName={names} Name=gpu File={files}\n")
