"""What this machine must have: Python, packages, a kernel that can contain processes, limits, ssh."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from slurmfork import account
from slurmfork.agent import namespace
from slurmfork.backends.base import Check
from slurmfork.errors import RunDirError
from slurmfork.userdir import user_directory

PACKAGES = {  # as in setup.cfg; a test compares them
    "aiohttp": "3.9",
    "click": "8.1",
    "cryptography": "42",
    "jinja2": "3.1",
    "msgspec": "0.18",
    "packaging": "22",
    "paramiko": "3.4",
    "pathspec": "0.12",
    "psutil": "5.9",
    "pyyaml": "6.0",
    "rich": "13",
    "uvloop": "0.19",
}
LEAST_FILES = 1024
LEAST_PROCESSES = 4096
_PR_GET_CHILD_SUBREAPER = 37


def checks() -> list[Check]:
    """All of them."""
    found = [_python(), _packages(), _containment(), _isolation(), _scratch(), _limits(), _ssh()]
    return [*found, *([] if account.known_name() else [_nameless()])]


def _python() -> Check:
    ok = sys.version_info >= (3, 10)
    detail = f"{sys.version.split()[0]} at {sys.executable}" + ("" if ok else "; slurmfork needs 3.10 or later")
    return Check(name="python", ok=ok, detail=detail)


def _packages() -> Check:
    missing = []
    for name, least in PACKAGES.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(f"{name} is missing")
            continue
        if _numbers(version) < _numbers(least):
            missing.append(f"{name} is {version}, at least {least} is needed")
    if missing:
        return Check(name="packages", ok=False, detail="; ".join(missing) + ": install slurmfork again")
    return Check(name="packages", ok=True, detail=f"{len(PACKAGES)} packages, all there and new enough")


def _numbers(version: str) -> tuple[int, ...]:
    parts = [part for part in version.split(".")[:3] if part.isdecimal()]
    return tuple(map(int, parts))


def _containment() -> Check:
    """What the rings are made of: a subreaper, pidfds, and lists of children."""
    missing = [name for name, works in (("subreaper", _subreaper), ("pidfd", _pidfd)) if not _succeeds(works)]
    if missing:
        detail = f"no {' and no '.join(missing)}: Linux 5.3 or later is needed, and /proc"
        return Check(name="containment", ok=False, detail=detail)
    kind = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1 or none"
    return Check(name="containment", ok=True, detail=f"subreaper and pidfd work; cgroups: {kind}")


def _subreaper() -> None:
    answer = ctypes.c_int()  # asking, not setting: this process is to stay as it is
    if ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0) != 0:
        raise OSError


def _pidfd() -> None:
    descriptor = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(descriptor, 0)
    finally:
        os.close(descriptor)


def _succeeds(work: Callable[[], None]) -> bool:
    try:
        work()
    except (OSError, AttributeError, ValueError):
        return False
    return True


def _scratch() -> Check:
    """The node-local directory of this user, which must be nobody else's."""
    try:
        return Check(name="scratch", ok=True, detail=f"{user_directory()} is yours and private")
    except RunDirError as error:
        return Check(name="scratch", ok=False, detail=str(error))


def _limits() -> Check:
    found = []
    for name, which, least in (
        ("files", resource.RLIMIT_NOFILE, LEAST_FILES),
        ("processes", resource.RLIMIT_NPROC, LEAST_PROCESSES),
    ):
        soft, _ = resource.getrlimit(which)
        if soft != resource.RLIM_INFINITY and soft < least:
            found.append(f"only {soft} {name} (ulimit -{'n' if name == 'files' else 'u'} {least})")
    return Check(name="limits", ok=not found, detail="; ".join(found) or "open files and processes are enough")


def _ssh() -> Check:
    where = shutil.which("ssh")
    return Check(name="ssh", ok=True, detail=where or "no client here; only needed to reach other machines")


def _isolation() -> Check:
    """Whether this machine gives a PID namespace; the nodes may be set up otherwise, and each agent finds out."""
    why = namespace.refusal()
    if not why:
        return Check(
            name="isolation",
            ok=True,
            detail="a PID namespace can be had on this machine",
            means="where a node can, too, the kernel itself ends all of a run there, whatever Slurm tracks",
            todo="put `isolation: auto` into the spec; `status` tells which nodes had it",
        )
    return Check(
        name="isolation",
        ok=True,
        detail=f"no PID namespace on this machine: {why}",
        means="if the nodes are like this machine, a run relies on Slurm's tracker and on slurmfork's own rings",
        todo="leave `isolation` at `none`, or use `auto`; `namespace` would fail the run",
    )


def _nameless() -> Check:
    """A uid that the system does not know, as in containers and where a directory service is away."""
    return Check(
        name="account",
        ok=True,
        detail=f"uid {os.geteuid()} has no name on this machine",
        means="squeue cannot be asked for your jobs alone; where slurmctld does not know you either, "
        "it takes jobs and never starts them",
        todo="have the uid entered (`getent passwd` is to show it), here and where slurmctld runs",
    )
