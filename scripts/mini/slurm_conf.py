"""The files that Slurm's daemons read."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from mini.kernels import LOGIN, NETWORK, address
from mini.processes import CGROUPS
from mini.sites import site_lines, write_site
from mini.words import KILL_WAIT_S, Cluster, Place, Shape


def span(first: int, last: int) -> str:
    return f"[{first}-{last}]" if first < last else str(first)


def slurm_conf(cluster: Cluster, shape: Shape, place: Place) -> str:
    lines = [
        f"ClusterName={cluster_name(cluster)}",
        *(kernel_lines(shape) if shape.kernels else host_lines(cluster, shape, place)),
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        "MailProg=/bin/true",
        f"ProctrackType=proctrack/{shape.proctrack}",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerParameters=sched_interval=1,bf_interval=1",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        f"KillWait={KILL_WAIT_S}",
        f"MinJobAge={shape.min_job_age}",
        "MessageTimeout=30",  # many nodes share few cores here
        "PreemptType=preempt/partition_prio",
        "PreemptMode=CANCEL",
        *(["TaskPlugin=task/cgroup,task/affinity"] if shape.proctrack == "cgroup" else []),
        *(["GresTypes=gpu"] if shape.gpus else []),
        *(accounting_lines(cluster, place) if shape.accounting else []),
        "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=2",
        "PartitionName=spare Nodes=ALL MaxTime=INFINITE PriorityTier=1",  # jobs of `gpu` preempt those here
    ]
    chosen = [*shape.settings, *site_lines(cluster, shape)]
    own = {key_of(line) for line in chosen}
    return "\n".join([*chosen, *(line for line in lines if key_of(line) not in own)]) + "\n"


def host_lines(cluster: Cluster, shape: Shape, place: Place) -> list[str]:
    """All nodes on this host, told apart by ports and names."""
    home, host, n = cluster.home, socket.gethostname().partition(".")[0], shape.nodes
    return [
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={place.slurmctld}",
        f"AuthInfo=socket={home}/munge/socket",
        "CommunicationParameters=NoCtldInAddrAny",  # slurmd would listen at the host name, not at NodeAddr
        f"StateSaveLocation={home}/state",
        f"SlurmdSpoolDir={home}/spool/%n",
        f"SlurmctldPidFile={home}/run/slurmctld.pid",
        f"SlurmdPidFile={home}/run/%n.pid",
        f"SlurmctldLogFile={home}/log/slurmctld.log",
        f"SlurmdLogFile={home}/log/%n.log",
        "SlurmdTimeout=60",
        f"NodeName={cluster.prefix}{span(1, n)} NodeHostname={host} NodeAddr=127.0.{place.block}.{span(1, n)}"
        f" Port={span(place.slurmd(1), place.slurmd(n))} {resources(shape)}",
    ]


def kernel_lines(shape: Shape) -> list[str]:
    """Each node a host of its own, with the places that Debian's packages have."""
    return [
        f"SlurmctldHost={LOGIN}({address(LOGIN)})",
        "StateSaveLocation=/var/lib/slurm",
        "SlurmdSpoolDir=/var/spool/slurmd",
        "SlurmctldPidFile=/run/slurmctld.pid",
        "SlurmdPidFile=/run/slurmd.pid",
        "SlurmdTimeout=30",  # until a node without power is told; a busy machine leaves one without a word for less
        f"NodeName=n{span(1, shape.nodes)} NodeAddr={NETWORK}{span(1, shape.nodes)} {resources(shape)}",
    ]


def resources(shape: Shape) -> str:
    gres = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    return f"CPUs={shape.cpus} RealMemory=512000{gres}"


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


def cgroup_conf(shape: Shape) -> str:
    if shape.kernels or (CGROUPS / "cgroup.controllers").exists():
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
    if shape.kernels:
        return  # theirs come when their root is there
    write_conf(cluster, shape, place, home)
    if shape.gpus:
        make_gpus(cluster, shape)
    if shape.accounting:
        (home / "slurmdbd.conf").touch(mode=0o600)
        (home / "slurmdbd.conf").write_text(slurmdbd_conf(cluster, place))


def write_conf(cluster: Cluster, shape: Shape, place: Place, at: Path) -> None:
    """slurm.conf and what lies beside it, in this directory."""
    (at / "slurm.conf").write_text(slurm_conf(cluster, shape, place))
    (at / "cgroup.conf").write_text(cgroup_conf(shape))
    write_site(shape, at)
    if shape.gpus:
        files = f"{'/dev' if shape.kernels else cluster.home / 'gpus'}/gpu{span(0, shape.gpus - 1)}"
        names = f"{cluster.nodes(shape)[0][:-1]}{span(1, shape.nodes)}"
        (at / "gres.conf").write_text(f"NodeName={names} Name=gpu File={files}\n")


def make_gpus(cluster: Cluster, shape: Shape) -> None:
    """Devices that are /dev/null: Slurm counts and hands out character devices, and opens none."""
    for i in range(shape.gpus):
        device = cluster.home / "gpus" / f"gpu{i}"
        try:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:  # a container without the right to make devices
            device.symlink_to("/dev/null")
