"""Aftermath: what is left of a run that is over, looked for and ended wherever this machine can look.

Journals and the tag tell what to look for (``slurmfork.sweep``). A node that is another machine cannot be looked
at from here: it is named, never counted as clean.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from slurmfork import journal, sweep
from slurmfork.process import boot_id
from slurmfork.rundir import RunDir


@dataclass
class Aftermath:
    """What a sweep did: processes ended and still alive (each described), and nodes that could not be asked.

    ``notes`` says which of the run's records could not be used.
    """

    killed: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sweep_run(rundir: RunDir, *, grace: float = 2.0) -> Aftermath:
    """End whatever is left of the run on this machine; raises RunDirError if the directory is not ours."""
    report = sweep.sweep(rundir.path, run_id=rundir.run_id, node=None, grace=grace)
    return Aftermath(report.killed, report.survivors, _elsewhere(rundir), report.notes)


def _elsewhere(rundir: RunDir) -> list[str]:
    """Nodes of other machines whose journal has a process without an end."""
    here = boot_id()
    swept = _swept(rundir)
    nodes = []
    for path in sorted(rundir.journals.glob("*.jsonl")):
        starts = [start for start in _unfinished(path) if start.boot_id != here]
        if any(start.time > swept.get((path.stem, start.boot_id), 0.0) for start in starts):
            nodes.append(path.stem)
    return nodes


def _unfinished(path: Path) -> list[journal.Started]:
    try:
        return journal.unfinished(journal.read(path))
    except OSError:
        return []


def _swept(rundir: RunDir) -> dict[tuple[str, str], float]:
    """When a sweep that was run there last left nothing, by node and boot id (one a machine)."""
    found = {}
    for line in _lines(rundir.sweeps):
        with contextlib.suppress(msgspec.DecodeError):
            report = msgspec.json.decode(line, type=sweep.SweepReport)
            if report.node and not report.survivors:
                found[report.node, report.boot_id] = report.time
    return found


def _lines(path: Path) -> list[bytes]:
    with contextlib.suppress(OSError):
        return path.read_bytes().splitlines()
    return []
