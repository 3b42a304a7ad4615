"""What is recorded of a node: its journal, sorted by worker, for whoever holds it against what runs there.

What is missing, damaged, or could have been written by somebody else is said, and not believed.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct, field

from slurmfork import journal
from slurmfork.errors import RunDirError
from slurmfork.journal import Ended, Intent, Started
from slurmfork.process import Identity
from slurmfork.rundir import RunDir, check_private


class Recorded(Struct, kw_only=True):
    """What a node's journal says: the last start of each worker, its end, and what was seen below each."""

    node: str
    starts: dict[str, Started] = field(default_factory=dict)
    intents: dict[str, Intent] = field(default_factory=dict)
    ends: dict[tuple[str, int], Ended] = field(default_factory=dict)
    seen: dict[str, set[Identity]] = field(default_factory=dict)
    boot_id: str = ""
    notes: list[str] = field(default_factory=list)
    uncertain: str = ""  # why something that is not in it may have been started all the same

    @property
    def last(self) -> Started | None:
        """The last start that is recorded."""
        return max(self.starts.values(), key=lambda start: start.time, default=None)

    def begun(self, worker: str) -> float:
        """When the last start of a worker was recorded, in seconds since the epoch."""
        records = (self.starts.get(worker), self.intents.get(worker))
        return max((record.time for record in records if record), default=0.0)

    def pids(self) -> set[int]:
        """All PIDs that it names."""
        return {start.pid for start in self.starts.values()} | {one.pid for some in self.seen.values() for one in some}


def read_journal(rundir: RunDir, node: str) -> Recorded:
    """The journal of a node; what is missing, damaged or not to be believed is said in ``notes``."""
    found = Recorded(node=node)
    try:
        for path in (rundir.path, rundir.journals):
            check_private(path)
        records = journal.read(rundir.journal(node))
    except FileNotFoundError:
        found.uncertain = f"{node} has no journal"
    except (RunDirError, OSError) as error:
        words = error.strerror if isinstance(error, OSError) else str(error)
        found.uncertain = f"the journal of {node} was not used: {words}"
    else:
        if records.damaged:
            found.uncertain = f"the journal of {node} has {_lines(records.damaged)}"
        _sort_in(found, records)
    if found.uncertain:
        found.notes.append(found.uncertain)
    return found


def _sort_in(found: Recorded, records: Iterable[journal.Record]) -> None:
    for record in records:
        if isinstance(record, Intent):
            found.intents[record.worker] = record
        elif isinstance(record, Started):
            found.starts[record.worker] = record
            found.boot_id = record.boot_id
        elif isinstance(record, Ended):
            found.ends[record.start_id, record.pid] = record
        elif isinstance(record, journal.Seen):
            below = (Identity(pid, start_time, record.boot_id) for pid, start_time in record.processes)
            found.seen.setdefault(record.worker, set()).update(below)


def _lines(count: int) -> str:
    return "a damaged line" if count == 1 else f"{count} damaged lines"


def nodes_of(rundir: RunDir) -> set[str]:
    """The nodes that have a journal; none where the directory is not to be believed."""
    try:
        check_private(rundir.journals)
        return {path.stem for path in rundir.journals.glob("*.jsonl")}
    except (RunDirError, OSError):
        return set()
