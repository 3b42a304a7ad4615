"""What the root, where run directories live, must be: writable, nobody else's, roomy, shared, and of the same time."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from pathlib import Path

from slurmfork import rundir
from slurmfork.backends.base import Check

LEAST_SPACE = 1 << 30
CLOCK_TOLERANCE = 2.0
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
LOCAL_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs", "f2fs"})


def checks(root: Path) -> list[Check]:
    """All of them; clocks are compared only where something can be written."""
    nearest = _nearest(root)
    found = [_root(root, nearest), _space(nearest), _file_system(nearest)]
    return [*found, *([_clock(nearest)] if found[0].ok else [])]


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
    kind = file_system_of(nearest)
    here = shutil.which("sbatch") is not None
    if kind in MEMORY_FILE_SYSTEMS and here:
        detail = f"{kind}: compute nodes do not see it; choose a shared directory with --root or SLURMFORK_ROOT"
        return Check(name="file system", ok=False, detail=detail)
    detail = kind or "unknown"
    if kind in LOCAL_FILE_SYSTEMS and here:
        detail += ": as a rule not shared; compute nodes must see it under the same path"
    return Check(name="file system", ok=True, detail=detail)


def file_system_of(path: Path) -> str:
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
