"""Faults of the file system that the run directory is on: gone, full, read-only."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from chaos import stage
from chaos.faults import fault

if TYPE_CHECKING:
    from chaos.trial import Trial

MOMENTS = ("forking", "ready", "stopping")


@fault(
    "rundir-deleted",
    "the run directory deleted in mid-run",
    moments=("forking", "ready"),
    ends=False,
    outside=True,
    excuses="silent journal intent",
)
def rundir_deleted(trial: Trial) -> None:
    trial.struck()
    shutil.rmtree(trial.rundir, ignore_errors=True)
    shutil.rmtree(trial.rundir, ignore_errors=True)  # what was written meanwhile


def _cannot_mount() -> str:
    return "" if os.geteuid() == 0 else "it needs root, to mount a file system"


def _mount(trial: Trial, *argv: str) -> None:
    trial.root.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *argv, str(trial.root)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise stage.Broken(f"a file system for the run cannot be mounted here: {done.stderr.strip()}")
    trial.mounted.append(trial.root)
    trial.root.chmod(0o700)


def _small(trial: Trial) -> None:
    _mount(trial, "-t", "tmpfs", "-o", "size=4m", "chaos")


def _filler(trial: Trial) -> Path:
    return trial.root / ".filler"


def _empty(trial: Trial) -> None:
    _filler(trial).unlink(missing_ok=True)


@fault(
    "disk-full",
    "the run directory's file system full",
    prepare=_small,
    finish=_empty,
    moments=MOMENTS,
    ends=False,
    lacks=_cannot_mount,
    excuses="silent journal intent",
)
def disk_full(trial: Trial) -> None:
    trial.struck()
    with _filler(trial).open("wb", buffering=0) as file:
        try:
            while file.write(bytes(65536)):
                pass
        except OSError:
            for size in (4096, 512, 64, 1):
                _fill(file.fileno(), size)


def _fill(descriptor: int, size: int) -> None:
    try:
        while os.write(descriptor, bytes(size)):
            pass
    except OSError:
        return


def _image(trial: Trial) -> None:
    image = trial.directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
    _mount(trial, "-o", "loop,errors=remount-ro", str(image))


@fault(
    "disk-read-only",
    "the run directory's file system read-only, as after an error of its disk",
    prepare=_image,
    moments=MOMENTS,
    ends=False,
    lacks=_cannot_mount,
    excuses="silent journal intent",
)
def disk_read_only(trial: Trial) -> None:
    """The kernel's own way: open files cannot be written to any more, either."""
    source = next(
        line.split()[0] for line in Path("/proc/mounts").read_text().splitlines() if f" {trial.root} " in line
    )
    trial.struck()
    Path(f"/sys/fs/ext4/{Path(source).name}/trigger_fs_error").write_text("1")
