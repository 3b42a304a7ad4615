"""What a record of Slurm's says about a job of ours: whether it is about it at all, and then in our words."""

from __future__ import annotations

from collections.abc import Iterable

from slurmfork.backends.base import Job, JobReport
from slurmfork.backends.slurm_records import Entry
from slurmfork.backends.slurm_states import pending_reason, run_state
from slurmfork.names import ENDED_STATES, RunState

SAME_S = 300.0  # submit times no further apart than clocks may be are of one job
_REQUEUES = ("REQUEUE", "NODE_FAIL", "PREEMPTED")  # what an attempt ended with that another followed


def key_of(job: Job) -> str:
    """Id and submit time together: ids are given out again."""
    return f"{job.job_id}@{job.submitted:.0f}"


def is_same(job: Job, entry: Entry) -> bool:
    """Whether it is this job, and not another that was given its id. A requeue moves the submit time on."""
    if entry.submitted is None or abs(entry.submitted - job.submitted) <= SAME_S:
        return True
    return entry.submitted > job.submitted and entry.restarts > 0


def latest_of(job: Job, rows: Iterable[Entry]) -> Entry | None:
    """The last attempt of this job among rows of sacct, where other jobs may have had its id too."""
    latest: Entry | None = None
    for row in sorted(rows, key=lambda row: row.submitted or 0.0):
        if row.job_id == job.job_id and (is_same(job, row) or (latest and _follows(latest, row))):
            latest = row
    return latest


def _follows(before: Entry, row: Entry) -> bool:
    """A requeue begins a row of its own, submitted when the attempt before it ended."""
    gap = (row.submitted or 0.0) - (before.ended or 0.0)
    return before.word.startswith(_REQUEUES) and abs(gap) <= SAME_S


def report_of(entry: Entry, fresh: float) -> JobReport:
    """The record in our words."""
    state = run_state(entry.word)
    begun = state not in (None, RunState.PENDING)  # before, Slurm shows when it expects to begin
    return JobReport(
        state=state,
        word=entry.word,
        reason=_reason(entry.reason, state),
        exit_status=entry.exit_status,
        nodes=entry.nodes,
        fresh=fresh,
        started=entry.started if begun else None,
        ended=entry.ended if state in ENDED_STATES else None,
    )


def _reason(reason: str, state: RunState | None) -> str:
    """A cancelled job still shows why it was pending once."""
    if state is RunState.CANCELLED:
        return ""
    return pending_reason(reason) if state is RunState.PENDING else reason
