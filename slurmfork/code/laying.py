"""Laying code into a run directory: all of it, or nothing that anybody sees.

It is written beside its place and renamed there; links come last, so that nothing is written through one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from slurmfork.code.manifest import Entry
from slurmfork.code.reading import Vanished, pieces
from slurmfork.code.store import Store, write_all
from slurmfork.errors import RunDirError

AT_ONCE = 8  # a network file system answers each in its time, and many at once

Fill = Callable[[Entry, int], None]


def lay(entries: Sequence[Entry], place: Path, fill: Fill) -> list[str]:
    """Make ``place``, private, of entries that were checked; ``fill`` writes a file's content to a descriptor.

    Returns what has vanished meanwhile (``fill`` raised Vanished). Raises RunDirError.
    """
    building = place.with_name(f".{place.name}")
    try:
        building.mkdir(mode=0o700)
        for directory in _directories(entries):
            (building / directory).mkdir(mode=0o700)
        files = [entry for entry in entries if entry.target is None]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            made = pool.map(lambda entry: _file(building, entry, fill), files)
            vanished = [entry.path for entry, there in zip(files, made, strict=True) if not there]
        for entry in entries:
            if entry.target is not None:
                (building / entry.path).symlink_to(entry.target)
        building.rename(place)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise RunDirError(f"cannot write the code to {place}: {error.strerror}") from None
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return vanished


def _directories(entries: Sequence[Entry]) -> list[str]:
    """Directories that entries are in, each after the one that it is in."""
    found = {str(above) for entry in entries for above in PurePosixPath(entry.path).parents}
    return sorted(found - {"."}, key=lambda path: path.count("/"))


def _file(building: Path, entry: Entry, fill: Fill) -> bool:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(building / entry.path, flags, 0o700 if entry.executable else 0o600)
    try:
        os.fchmod(descriptor, 0o700 if entry.executable else 0o600)
        fill(entry, descriptor)
    except Vanished:
        (building / entry.path).unlink()
        return False
    finally:
        os.close(descriptor)
    return True


def from_directory(directory: Path) -> Fill:
    """Content from where the code is."""

    def fill(entry: Entry, descriptor: int) -> None:
        for data in pieces(directory, entry.path):
            write_all(descriptor, data)

    return fill


def from_store(store: Store) -> Fill:
    """Content that was sent."""

    def fill(entry: Entry, descriptor: int) -> None:
        store.copy(entry.digest, descriptor)

    return fill
