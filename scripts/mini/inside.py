"""The namespaces that a cluster of another release lives in, and the way into them.

They belong to the keeper and to what it starts: when all of that has ended, the kernel takes every mount and interface
with it.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mini.clients import commands
from mini.releases import RELEASES, Release
from mini.roots import install_tree, root_of, tool
from mini.words import Cluster, Failed, Record, Shape

SCRIPT = Path(__file__).resolve().parent.parent / "minicluster"
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
BOUND = ("/proc", "/sys", "/dev", "/tmp")
COMMANDS = (
    "sacct sacctmgr salloc sattach sbatch sbcast scancel scontrol sdiag sinfo sprio squeue sreport srun sshare"
    " slurmfork"
)


def need_namespaces(shape: Shape) -> None:
    """Refuses in a line what this machine does not allow, before anything is made for it."""
    if not shape.rooted:
        return
    kinds = ["--mount", *(["--net"] if shape.kernels else [])]
    done = subprocess.run(["unshare", *kinds, "true"], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise Failed(f"this machine makes no namespaces: {done.stderr.strip()}", 3)
    if shape.kernels and not Path("/dev/net/tun").exists():
        raise Failed("this machine has no /dev/net/tun, by which kernels of their own are connected", 3)


def separate(network: bool) -> None:
    """From here on this process's mounts, and its network if that is asked for, are its own and its children's."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS | (CLONE_NEWNET if network else 0)):
        raise Failed(f"cannot make namespaces here: {os.strerror(ctypes.get_errno())}")
    tool(["mount", "--make-rprivate", "/"])


def furnish(cluster: Cluster, shape: Shape) -> None:
    """The release's root over the cluster's own layer, with this machine's /proc, /sys, /dev and /tmp in it, and with
    this working tree's slurmfork installed."""
    release = RELEASES[shape.slurm]
    lower, root = root_of(release), cluster.root
    for name in ("root", "upper", "work"):
        (cluster.home / name).mkdir(mode=0o755)
    layers = f"lowerdir={lower},upperdir={cluster.home}/upper,workdir={cluster.home}/work"
    tool(["mount", "-t", "overlay", "-o", layers, "overlay", str(root)])
    for path in bound(cluster):
        (root / path.strip("/")).mkdir(parents=True, exist_ok=True)
        tool(["mount", "--rbind" if path in ("/sys", "/dev") else "--bind", path, str(root / path.strip("/"))])
    for name in ("hosts", "resolv.conf"):
        shutil.copy(Path("/etc") / name, root / "etc" / name)
    if release.python:
        install_tree(root)


def unbind(cluster: Cluster) -> None:
    """The root alone again, for kernels that bring their own /proc."""
    for path in bound(cluster):
        tool(["umount", "--recursive", "--lazy", str(cluster.root / path.strip("/"))])


def bound(cluster: Cluster) -> list[str]:
    """What of this machine is seen inside; runs of tests and the cluster's own files are below /tmp, mostly."""
    return [*BOUND, *([] if str(cluster.home).startswith("/tmp/") else [str(cluster.home)])]


def way_in(cluster: Cluster, record: Record) -> list[str]:
    """What comes before a command to run it in the root, in the directory that it is called from."""
    if not record.keeper:
        raise Failed(f"{cluster.name} is not up")
    there = ["nsenter", f"--mount=/proc/{record.keeper.pid}/ns/mnt", "--", "chroot", str(cluster.root)]
    own = f"PATH=${{PATH#{commands(cluster)}:}}"  # there, these commands are but themselves
    return [*there, "/bin/sh", "-c", f'{own}; cd -- "$1" 2>/dev/null; shift; exec "$@"', "sh"]


def write_commands(cluster: Cluster, record: Record) -> None:
    """Slurm's commands, and slurmfork, as this machine's shells can call them."""
    at = commands(cluster)
    at.mkdir(mode=0o755)
    for name in COMMANDS.split():
        if record.shape.kernels:
            words = [sys.executable, str(SCRIPT), "exec", "--name", cluster.name, "--", name]
            line = f"SLURMFORK_MINICLUSTER_DIR={shlex.quote(str(cluster.home.parent))} exec {shlex.join(words)}"
        else:
            line = f'exec {shlex.join(way_in(cluster, record))} "$PWD" {name}'
        (at / name).write_text(f'#!/bin/sh\n{line} "$@"\n')
        (at / name).chmod(0o755)


def write_foreign_commands(cluster: Cluster, release: Release) -> None:
    """Slurm's commands of another release, for a cluster of this machine's own: each call has mounts of its own."""
    binds = "".join(f'mount --rbind {path} "$root{path}"; ' for path in BOUND)
    there = 'PATH=/usr/sbin:/usr/bin:/sbin:/bin; cd -- "$1" 2>/dev/null; shift; exec "$@"'
    line = f'root=$1; shift; {binds}exec chroot "$root" /bin/sh -c {shlex.quote(there)} sh "$@"'
    at = commands(cluster)
    at.mkdir(mode=0o755)
    for name in COMMANDS.split():
        if name != "slurmfork":
            words = shlex.join(["unshare", "--mount", "/bin/sh", "-c", line, "sh", str(root_of(release))])
            (at / name).write_text(f'#!/bin/sh\nexec {words} "$PWD" {name} "$@"\n')
            (at / name).chmod(0o755)


def chrooted(cluster: Cluster, shape: Shape, argv: Sequence[str]) -> list[str]:
    """A daemon's command, as the keeper starts it."""
    return ["chroot", str(cluster.root), *argv] if shape.rooted else list(argv)


def programs(shape: Shape) -> Iterable[tuple[str, str]]:
    """What this machine must have for it, and the packages that have it."""
    if shape.rooted:
        yield from {"mmdebstrap": "mmdebstrap", "nsenter": "util-linux", "mount": "mount"}.items()
    if shape.kernels:
        yield from {"linux.uml": "user-mode-linux", "ip": "iproute2", "ssh": "openssh-client"}.items()
        yield "ssh-keygen", "openssh-client"
