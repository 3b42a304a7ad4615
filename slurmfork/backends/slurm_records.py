"""What squeue, scontrol and sacct print of a job, read into one shape.

Text formats that all releases since 20.11 have. A job's name or comment may hold anything, so nothing is read
that could come from one. Times are printed in UTC, because the commands are asked in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timezone

from msgspec import Struct

from slurmfork.backends.slurm_states import exit_status

SQUEUE_FORMAT = "%A|%T|%V|%S|%e|%N|%r"
SACCT_FORMAT = "JobIDRaw,Submit,Start,End,State,ExitCode,NodeList"

# Each at the beginning of a line of its own, so that no name of a job can pretend to be one.
_SCONTROL = {
    "state": r"JobState=(\S+) Reason=(.*?)(?: Dependency=.*)?",
    "restarts": r"(?:Requeue=\S+ )?Restarts=(\d+).* ExitCode=(\d+:\d+).*",
    "submitted": r"SubmitTime=(\S+).*",
    "times": r"StartTime=(\S+) EndTime=(\S+).*",
    "nodes": r"NodeList=(\S*)",
}
_LINES = {name: re.compile(rf"^ {{2,4}}{pattern}$", re.MULTILINE) for name, pattern in _SCONTROL.items()}


class Entry(Struct, kw_only=True):
    """One job as one of the commands shows it. Times are seconds since the epoch, or None."""

    job_id: str
    word: str
    submitted: float | None
    reason: str = ""
    nodes: str = ""
    started: float | None = None
    ended: float | None = None
    exit_status: int | None = None
    restarts: int = 0


def from_squeue(text: str) -> dict[str, Entry]:
    """Jobs by id; lines that are not of our format (a heading with the cluster's name) are left out."""
    jobs = {}
    for line in text.splitlines():
        fields = line.split("|", 6)
        if len(fields) == 7 and fields[0].isdigit():
            job_id, word, submitted, start, end, nodes, reason = (field.strip() for field in fields)
            jobs[job_id] = Entry(
                job_id=job_id,
                word=word,
                submitted=seconds(submitted),
                reason="" if reason == "None" else reason,
                nodes=nodes,
                started=seconds(start),
                ended=seconds(end),
            )
    return jobs


def from_scontrol(job_id: str, text: str) -> Entry | None:
    """The job of ``scontrol show job ID``; None if this is not what that prints."""
    found = {name: pattern.search(text) for name, pattern in _LINES.items()}
    state, submitted = found["state"], found["submitted"]
    if state is None or submitted is None:
        return None
    times, nodes, restarts = found["times"], found["nodes"], found["restarts"]
    return Entry(
        job_id=job_id,
        word=state[1],
        submitted=seconds(submitted[1]),
        reason="" if state[2] == "None" else state[2],
        nodes="" if nodes is None or nodes[1] == "(null)" else nodes[1],
        started=seconds(times[1]) if times else None,
        ended=seconds(times[2]) if times else None,
        exit_status=exit_status(state[1], restarts[2]) if restarts else None,
        restarts=int(restarts[1]) if restarts else 0,
    )


def from_sacct(text: str) -> Iterator[Entry]:
    """Every row: an id that was requeued, or given to another job later, has several."""
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == 7 and fields[0].isdigit():
            job_id, submitted, start, end, word, code, nodes = fields
            yield Entry(
                job_id=job_id,
                word=word,
                submitted=seconds(submitted),
                nodes="" if nodes == "None assigned" else nodes,
                started=seconds(start),
                ended=seconds(end),
                exit_status=exit_status(word, code),
            )


def seconds(text: str) -> float | None:
    """A time as Slurm prints it, in UTC; None for ``N/A``, ``Unknown`` and the like."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None
