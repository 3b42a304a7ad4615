"""Who writes a run's worker logs: what shed its tag and was never recorded still holds the log it was started with.

A worker's output goes straight to its log, and what it starts inherits that descriptor. Nobody else writes there;
who reads a log is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

from slurmfork.process import Identity, alive, identify, open_files, owned, owner, pids

_DELETED = " (deleted)"


def walk_writers(directory: str, logs: Collection[str] | None = None) -> Iterator[Identity]:
    """This user's processes that have a log in ``directory`` open for writing; the caller is left out.

    ``logs``: names of the files that count (None: all). The files themselves, on a disk that may hang, are not
    asked; that a log has been removed is no matter.
    """
    uid = os.geteuid()
    for pid in pids():
        if pid == os.getpid() or not owned(pid, uid) or not _writes(pid, directory, logs) or owner(pid) != uid:
            continue
        identity = identify(pid)
        # Looked at again: had the PID changed hands, the first look would be about another process.
        if identity and _writes(pid, directory, logs) and alive(identity):
            yield identity


def _writes(pid: int, directory: str, logs: Collection[str] | None) -> bool:
    for one in open_files(pid):
        path = one.path.removesuffix(_DELETED)
        if not path.startswith(f"{directory}/"):
            continue
        name = path[len(directory) + 1 :]
        # An editor has a file of its own, with another name, open for writing beside the log.
        if name.endswith(".log") and not name.startswith(".") and (logs is None or name in logs) and one.writable:
            return True
    return False
