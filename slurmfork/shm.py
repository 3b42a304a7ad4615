"""Shared memory: which files under /dev/shm are this run's, and their removal when it is over.

A run's are those that were not there when its agent began and that a process below the agent had open or mapped to
write to when it was looked, and those whose name holds the run id. Of these only regular files of this user go, and
only if no living process that can be seen has them open or mapped.
"""

# ruff: noqa: PTH108, PTH116

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from slurmfork import process

SHM = "/dev/shm"
LOOKS = 6  # at a file, as long as none of ours has it: then it is another's, and the trees are left in peace


class File(NamedTuple):
    """One file there; a new one of the same name is another."""

    name: str
    inode: int


class SharedMemory:
    """This run's files, as far as they were seen. Its methods are for threads: a process that hangs holds them up."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._before = set(_files())
        self._ours: set[File] = set()
        self._looks: dict[File, int] = {}
        self._busy = threading.Lock()

    def look(self) -> None:
        """Note which of the new files a process below this one may write to; nothing, while another look goes on."""
        if self._busy.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._busy.release()

    def _look(self) -> None:
        there = set(_files()) - self._before
        self._ours &= there
        self._looks = {file: self._looks.get(file, 0) + 1 for file in there - self._ours}
        unknown = {file.inode: file for file, looks in self._looks.items() if looks <= LOOKS}
        if unknown:
            names = {file.name for file in unknown.values()}
            for one in process.walk(os.getpid()):
                written = {inode for inode, writable in used(one.pid, names) if writable}
                self._ours.update(unknown[inode] for inode in written & unknown.keys())

    def remove(self) -> list[str]:
        """Remove them; returns their names. What is still in use stays."""
        with self._busy:
            return _remove({file for file in _files() if file in self._ours or self._run_id in file.name})


def remove_named(run_id: str) -> list[str]:
    """Remove the files whose name holds the run id, where nobody is left who saw the others."""
    return _remove({file for file in _files() if run_id in file.name})


def _remove(files: set[File]) -> list[str]:
    if files:
        names = {file.name for file in files}
        busy = {inode for pid in process.pids() for inode, _ in used(pid, names)}
        files = {file for file in files if file.inode not in busy}
    gone = []
    for file in files.intersection(_files()):
        with suppress(OSError):
            os.unlink(f"{SHM}/{file.name}")
            gone.append(file.name)
    return sorted(gone)


def _files() -> Iterator[File]:
    """The regular files of this user there."""
    with suppress(OSError):
        for entry in list(os.scandir(SHM)):
            with suppress(FileNotFoundError):
                facts = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid():
                    yield File(entry.name, facts.st_ino)


def used(pid: int, names: set[str]) -> Iterator[tuple[int, bool]]:
    """Inodes under /dev/shm that a process has mapped, or open under one of ``names``; and whether to write to."""
    device = os.stat(SHM).st_dev
    number = f"{os.major(device):02x}:{os.minor(device):02x}".encode()
    for match in re.finditer(rb"(?m)^\S+ .(.).(.) \S+ %b (\d+) " % number, process.maps(pid)):
        yield int(match[3]), match[1] + match[2] == b"ws"
    for file in process.open_files(pid):
        if file.path.rpartition("/")[2] in names:
            with suppress(OSError):
                facts = os.stat(file.link)
                if facts.st_dev == device:
                    yield facts.st_ino, file.writable
