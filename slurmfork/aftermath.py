"""Aftermath: what is left of a run that is over, looked for and ended wherever this machine can look.

Journals and the tag tell what to look for (``slurmfork.sweep``). A node that is another machine cannot be looked
at from here: it is named, never counted as clean.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
        open_ends = journal.unfinished(journal.read(path))
        if any(record.boot_id != here for record in open_ends):
            nodes.append(path.stem)
    return nodes
