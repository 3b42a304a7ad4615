"""Doctor: looks at what slurmfork needs of this machine, its file system and its Slurm, and says what to do.

Changes nothing but for one small file that it writes under the root and removes again, and this user's directory
under /tmp, which it makes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import click

from slurmfork import backends, rundir
from slurmfork.agent import namespace
from slurmfork.backends.base import Check
from slurmfork.cli import output
from slurmfork.cli.options import verb
from slurmfork.errors import RunDirError, SlurmforkError
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
_PR_GET_CHILD_SUBREAPER = 37
LEAST_SPACE = 1 << 30
CLOCK_TOLERANCE = 2.0
LEAST_FILES = 1024
LEAST_PROCESSES = 4096
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
LOCAL_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs", "f2fs"})


@verb("doctor", prints_data=True, examples=["slurmfork doctor", "slurmfork doctor --backend slurm --json"])
@click.option(
    "--backend", "-b", type=click.Choice(["local", "slurm", "ray"]), help="What must work; default: what is here."
)
def doctor(backend: str | None, root: str | None, as_json: bool) -> int:
    """Check Python, the shared directory, the clock, process limits and Slurm here; says what to do.

    Exits with 0 if everything is as it should be, else with 1.
    """
    place = rundir.root_of(root)
    found = [*_machine(), *_place(place), *_slurm(backend)]
    if as_json:
        output.document({"checks": found})
    else:
        output.table(["CHECK", "OK", "DETAIL"], [[c.name, "yes" if c.ok else "NO", c.detail] for c in found])
    return 0 if all(check.ok for check in found) else 1


def _machine() -> list[Check]:
    return [_python(), _packages(), _containment(), _isolation(), _scratch(), _limits(), _ssh()]


def _place(root: Path) -> list[Check]:
    nearest = _nearest(root)
    checks = [_root(root, nearest), _space(nearest), _file_system(nearest)]
    return [*checks, _clock(nearest)] if checks[0].ok else checks


# --- this machine


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


def _isolation() -> Check:
    """Whether the kernel of this machine gives what `isolation: namespace` asks for; not every run asks."""
    if why := namespace.refusal():
        detail = f"no PID namespace here: {why}; with `isolation: auto` such a node does without"
    else:
        detail = "a PID namespace can be had here: `isolation: namespace`"
    return Check(name="isolation", ok=True, detail=detail)


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


# --- the root, where run directories live


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    return next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))


def _root(root: Path, nearest: Path) -> Check:
    probe = nearest / f".slurmfork-doctor-{os.getpid()}"
    try:
        rundir.replace_file(probe, b"")
        probe.unlink()
    except OSError as error:
        detail = f"cannot write in {nearest}: {error.strerror}; choose another with --root or SLURMFORK_ROOT"
        return Check(name="root", ok=False, detail=detail)
    if nearest != root:
        return Check(name="root", ok=True, detail=f"{root} will be made by the first run")
    mode = root.stat().st_mode
    sticky = mode & stat.S_ISVTX  # nobody can take another's directory away then
    if mode & 0o022 and not sticky:
        detail = f"{root} can be written by others: chmod go-w it, or choose another with --root"
        return Check(name="root", ok=False, detail=detail)
    detail = f"{root} can be written" + ("" if sticky else ", by you alone")
    return Check(name="root", ok=True, detail=detail)


def _space(nearest: Path) -> Check:
    free = shutil.disk_usage(nearest).free
    ok = free >= LEAST_SPACE
    detail = f"{free / (1 << 30):.1f} GiB free" + ("" if ok else "; `slurmfork prune` removes old runs")
    return Check(name="space", ok=ok, detail=detail)


def _file_system(nearest: Path) -> Check:
    """Compute nodes must see the root; a file system that is this machine's own is then the wrong place."""
    kind = _kind_of_file_system(nearest)
    here = shutil.which("sbatch") is not None
    if kind in MEMORY_FILE_SYSTEMS and here:
        detail = f"{kind}: compute nodes do not see it; choose a shared directory with --root or SLURMFORK_ROOT"
        return Check(name="file system", ok=False, detail=detail)
    detail = kind or "unknown"
    if kind in LOCAL_FILE_SYSTEMS and here:
        detail += ": as a rule not shared; compute nodes must see it under the same path"
    return Check(name="file system", ok=True, detail=detail)


def _kind_of_file_system(path: Path) -> str:
    """The type of the mount that holds a path, from the longest mount point above it."""
    real = path.resolve()
    best, kind = -1, ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            point = fields.split()[4].encode().decode("unicode_escape")
            if real.is_relative_to(point) and len(point) >= best:  # later mounts cover earlier ones
                best, kind = len(point), rest.split()[0]
    return kind


def _clock(nearest: Path) -> Check:
    """The clock of the file server against ours: ages of runs, and who came first, depend on it."""
    probe = nearest / f".slurmfork-doctor-{os.getpid()}"
    try:
        before = time.time()
        probe.touch(mode=0o600)
        theirs = probe.stat().st_mtime
        after = time.time()
        probe.unlink()
    except OSError as error:
        return Check(name="clock", ok=False, detail=f"cannot compare clocks in {nearest}: {error.strerror}")
    off = max(before - theirs, theirs - after, 0.0)
    ok = off <= CLOCK_TOLERANCE
    detail = "agrees with the file system's" if ok else f"{off:.0f} s off the file system's: have NTP looked at"
    return Check(name="clock", ok=ok, detail=detail)


# --- Slurm


def _slurm(wanted: str | None) -> list[Check]:
    if wanted == "ray":
        return _check("ray")
    if wanted == "local" or (wanted is None and shutil.which("sbatch") is None):
        others = "no sbatch here" if shutil.which("sbatch") is None else "not looked at"
        return [
            Check(name="slurm", ok=True, detail=f"{others}; `--backend local` works without"),
            *_check("local"),
        ]
    missing = [name for name in ("sbatch", "srun", "squeue", "scancel", "sinfo", "scontrol") if not shutil.which(name)]
    if missing:
        detail = f"not on PATH: {', '.join(missing)}; load Slurm's module, or log in to a login node"
        return [Check(name="slurm commands", ok=False, detail=detail)]
    return [Check(name="slurm commands", ok=True, detail="all on PATH"), *_check("slurm")]


def _check(name: str) -> list[Check]:
    try:
        return backends.get(name).check()
    except SlurmforkError as error:
        return [Check(name=name, ok=False, detail=str(error))]
