"""Leftovers: what still runs here of this user's runs that are over; ended, because nobody else will.

A run that may be alive is never touched: its own record must say that it is over, and no agent or guardian of it
may be left on this machine. What shed its tag is left alone too, for it may have become somebody else's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from slurmfork import names, process
from slurmfork.errors import RunDirError
from slurmfork.killing import end_all
from slurmfork.orders import Finding
from slurmfork.process import Identity
from slurmfork.rundir import RunDir, RunRecord, is_private
from slurmfork.scratch import marked, remove_left
from slurmfork.shm import remove_named

GRACE_S = 2.0
BOUND_S = 3.0

_KEEPERS = frozenset({"slurmfork-agent", "slurmfork-guard"})


class Tag(NamedTuple):
    """What a process's environment says of the run that it was started for, and of the Slurm job that it is in."""

    run_id: str
    node: str
    directory: str
    job_id: str


def sweep(run_id: str) -> list[Finding]:
    """End what is left of runs other than ``run_id`` that are over: SIGTERM, a short grace, SIGKILL; and tell.

    What agents of such runs left behind as they were killed, on disk and in shared memory, goes too.
    """
    findings = _end(run_id)
    for run_dir, node in marked():
        if run_dir.name != run_id and _is_over(Tag(run_dir.name, node, str(run_dir), "")):
            _tidy(run_dir.name, node)
    return findings


def _tidy(run: str, node: str) -> None:
    remove_left(run, node)
    remove_named(run)


def _end(run_id: str) -> list[Finding]:
    found: dict[Identity, Tag] = {}

    def find() -> Iterator[Identity]:
        for one, tag in leftovers(run_id):
            found[one] = tag
            yield one

    if not any([*find()]):
        return []
    survivors = end_all(find, grace=GRACE_S, bound=BOUND_S).survivors
    ended = Counter(tag.run_id for one, tag in found.items() if one not in survivors)
    findings = [Finding(kind="leftovers", text=_ended(run, count)) for run, count in ended.items()]
    for one in survivors:
        text = f"left by run {found[one].run_id}, would not die: {process.describe(one)}"
        findings.append(Finding(kind="leftovers", serious=True, text=text))
    for run, node in {tag[:2] for tag in found.values()} - {found[one][:2] for one in survivors}:
        _tidy(run, node)
    return findings


def _ended(run: str, count: int) -> str:
    return f"ended {count} {'process' if count == 1 else 'processes'} left by run {run}"


def leftovers(run_id: str) -> Iterator[tuple[Identity, Tag]]:
    """Processes of this user whose tag is of another run that is over; the caller's ancestors are left out."""
    uid, kin = os.geteuid(), process.ancestors(os.getpid())
    tagged: list[tuple[Identity, Tag]] = []
    kept: set[str] = set()
    for pid in process.pids():
        if not process.owned(pid, uid) or (tag := _tag(pid)) is None or tag.run_id == run_id:
            continue
        if process.owner(pid) != uid:  # another user's, of a program that is set-uid
            continue
        one = process.identify(pid)
        if process.name(pid) in _KEEPERS:
            kept.add(tag.run_id)
        # Looked at again: had the PID changed hands, the first look would be about another process.
        elif one and tag.node and pid not in kin and _same_files(pid) and _tag(pid) == tag and process.alive(one):
            tagged.append((one, tag))
    over: dict[Tag, bool] = {}
    for one, tag in tagged:
        if tag.run_id not in kept and over.setdefault(tag, _is_over(tag)):
            yield one, tag


def _tag(pid: int) -> Tag | None:
    found = process.environ(pid, having=names.RUN_ID)
    if found is None:
        return None
    values = (found.get(name, "") for name in (names.RUN_ID, names.NODE, names.RUN_DIR, "SLURM_JOB_ID"))
    return Tag(*values)


def _same_files(pid: int) -> bool:
    """Whether a process sees the file systems that we see: only then is a path the same to both."""
    try:
        return Path(f"/proc/{pid}/ns/mnt").samefile("/proc/self/ns/mnt")
    except OSError:
        return False


def _is_over(tag: Tag) -> bool:
    """Whether that run is over beyond doubt, and the process is in no other job, which had inherited the tag."""
    directory = Path(tag.directory)
    if not names.RUN_ID_PATTERN.fullmatch(tag.run_id) or not directory.is_absolute() or directory.name != tag.run_id:
        return False
    rundir = RunDir(directory)
    try:
        if not os.path.lexists(directory):
            return directory.parent.is_dir() and not tag.job_id  # which job was its own nobody knows any more
        if not is_private(directory.lstat()) or not (rundir.end.exists() or rundir.batch_status.exists()):
            return False
        record = rundir.read_record(rundir.record, RunRecord)
    except (OSError, RunDirError):
        return False
    own = record.job_id if record is not None and record.backend == "slurm" else ""
    return tag.job_id in ("", own)
