"""Aftermath: what is left of a run that is over, looked for and ended wherever this machine can look.

Journals and the tag tell what to look for (``slurmfork.sweep``). A node that is another machine cannot be looked
at from here: it is named, never counted as clean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from slurmfork import journal, sweep
from slurmfork.process import boot_id
from slurmfork.rundir import RunDir


@dataclass
class Aftermath:
    """What a sweep did: processes ended and still alive (each described), and nodes that could not be asked."""

    killed: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)


def sweep_run(rundir: RunDir, *, grace: float = 2.0) -> Aftermath:
    """End whatever is left of the run on this machine; raises RunDirError if the directory is not ours."""
    report = sweep.sweep(rundir.path, run_id=rundir.run_id, node=None, grace=grace)
    return Aftermath(list(report.killed), list(report.survivors), _elsewhere(rundir))


def _elsewhere(rundir: RunDir) -> list[str]:
    """Nodes of other machines whose journal has a process without an end."""
    here = boot_id()
    nodes = []
    for path in sorted(rundir.journals.glob("*.jsonl")):
        if any(boot != here for boot in _open_boots(path)):
            nodes.append(path.stem)
    return nodes


def _open_boots(path: Path) -> set[str]:
    """Boot ids (one a machine) of the processes in a journal that have no end."""
    started: dict[str, str] = {}
    try:
        records = journal.read(path)
    except OSError:
        return set()
    for record in records:
        if isinstance(record, journal.Started):
            started[record.start_id] = record.boot_id
        elif isinstance(record, journal.Ended):
            started.pop(record.start_id, None)
    return set(started.values())
