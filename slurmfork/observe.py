"""Observe: what can be said of a run from the outside, merged from its end record, its head, and its scheduler.

The end record is final. A living head knows best. Where it is silent, the scheduler's word on the job counts; an
empty answer of the scheduler means "don't know", never "gone". Nothing here waits for a dead node.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from slurmfork.backends.base import JobReport
from slurmfork.errors import RunDirError, SlurmforkError
from slurmfork.messages import NodeView, StatusView, WorkerCounts, WorkerView
from slurmfork.names import ENDED_STATES, OVER_STATES, RunState, WorkerState
from slurmfork.rundir import CodeRecord, EndRecord, HeadRecord, RunDir, RunRecord

if TYPE_CHECKING:
    from slurmfork.client import Client

T = TypeVar("T")

HEAD_TIMEOUT = 3.0
LATE_WORD = 60.0  # seconds that what a compute node wrote may take to be seen here
# Slurm knows better than the head, which saw a SIGTERM and no more, why a job was ended.
STANDING_STILL = frozenset({"SUSPENDED", "STOPPED"})  # the head is stopped then, too
SLURM_KNOWS_BETTER = frozenset({RunState.TIMEOUT, RunState.PREEMPTED, RunState.NODE_FAIL})


class RunStatus(msgspec.Struct, kw_only=True):
    """A run as `status` shows it.

    ``source`` says whose word this is (``end``, ``head``, ``saved``, ``scheduler``, ``submit``) and ``age`` how
    many seconds old it is. ``scheduler`` is the scheduler's own word for the job, where it was asked. ``attempt``
    counts how often it was requeued. ``code`` is where the code that was sent along came from.
    """

    run_id: str
    name: str
    backend: str
    job_id: str | None
    state: RunState
    reason: str = ""
    nodes: list[NodeView] = msgspec.field(default_factory=list)
    workers: WorkerCounts = msgspec.field(default_factory=WorkerCounts)
    exit_status: int | None = None
    survivors: int | None = None
    unverified: list[str] = msgspec.field(default_factory=list)
    scheduler: str = ""
    source: str = "submit"
    age: float = 0.0
    seq: int = 0
    submitted: float = 0.0
    started: float | None = None
    ready: float | None = None
    ended: float | None = None
    run_dir: str = ""
    attempt: int = 0
    code: CodeRecord | None = None

    @property
    def over(self) -> bool:
        """Whether the state is final."""
        return self.state in ENDED_STATES


class Observation:
    """One look at one run. ``damage`` says what of it cannot be read, and is told where no head answers."""

    def __init__(self, rundir: RunDir, record: RunRecord) -> None:
        self.rundir = rundir
        self.record = record
        self.damage = ""
        self.end = self._read(rundir.end, EndRecord)
        self.head = self._read(rundir.head, HeadRecord)

    def _read(self, path: Path, kind: type[T]) -> T | None:
        try:
            return self.rundir.read_record(path, kind)
        except RunDirError as error:
            self.damage = str(error)
            return None

    def needs_scheduler(self) -> bool:
        """Whether the scheduler's word may change anything: not once a run ended by its own doing."""
        return self.end is None or self.end.outside

    def client(self) -> Client | None:
        """A client of the head, if there was one; it need not live."""
        if self.head is None:
            return None
        from slurmfork.client import Client  # TLS and HTTP: of no use where no head is asked

        return Client(self.head.addresses, self.head.port, self.rundir.credentials, self.record.run_id)

    def look(self, report: JobReport | None) -> tuple[RunStatus, list[WorkerView]]:
        """The run's status and its workers; ``report`` is the scheduler's word, if it was asked."""
        status = RunStatus(
            run_id=self.record.run_id,
            name=self.record.name,
            backend=self.record.backend,
            job_id=self.record.job_id,
            state=RunState.PENDING,
            submitted=self.record.submitted,
            run_dir=str(self.rundir.path),
            scheduler=report.word if report else "",
            age=time.time() - self.record.submitted,
            attempt=self.head.attempt if self.head else 0,
            code=self.record.code,
        )
        view = self._ask_head() if self.end is None else None
        if view is not None:
            self._take_view(status, view, "head")
            if status.over and (end := self._read(self.rundir.end, EndRecord)) is not None:  # it comes about now
                self._take_end(status, end, report)
            return status, view.workers
        view = self._saved()
        if self.end is None and not self.damage and self._is_over(view, report):  # since the first look, perhaps
            self.end, self.head = self._read(self.rundir.end, EndRecord), self._read(self.rundir.head, HeadRecord)
            view = self._saved()
        if self.end is not None:
            self._take_view(status, view, "end")
            self._take_end(status, self.end, report)
            return status, _closed(view)
        self._take_view(status, view, "saved")
        if self.damage:
            status.state, status.reason = RunState.UNKNOWN, self.damage
        else:
            self._take_report(status, report)
        return status, _closed(view) if status.over else (view.workers if view else [])

    def _ask_head(self) -> StatusView | None:
        client = self.client()
        if client is None:
            return None
        with client, contextlib.suppress(SlurmforkError):
            return client.status(timeout=HEAD_TIMEOUT)
        return None

    def _is_over(self, view: StatusView | None, report: JobReport | None) -> bool:
        """Whether anybody says so."""
        if any(one is not None and one.state in ENDED_STATES for one in (view, report)):
            return True
        return self.rundir.batch_status.exists()

    def _saved(self) -> StatusView | None:
        with contextlib.suppress(RunDirError):
            return self.rundir.read_record(self.rundir.status, StatusView)
        return None

    def _take_view(self, status: RunStatus, view: StatusView | None, source: str) -> None:
        if view is None:
            return
        status.state, status.reason, status.exit_status = view.state, view.reason, view.exit_status
        status.nodes, status.workers = view.nodes, view.counts
        status.started, status.ready, status.seq = view.started, view.ready, view.seq
        status.source, status.age = source, max(0.0, time.time() - view.updated)

    def _take_end(self, status: RunStatus, end: EndRecord, report: JobReport | None) -> None:
        status.state, status.reason, status.exit_status = end.state, end.reason, end.exit_status
        status.survivors, status.unverified, status.ended = end.survivors, end.unverified, end.ended
        status.source, status.age = "end", max(0.0, time.time() - end.ended)
        if end.outside and report and self.record.requeue and report.state is RunState.PENDING:
            status.state, status.source, status.ended = RunState.PENDING, "scheduler", None
            status.reason = f"requeued: {report.reason}" if report.reason else "requeued"
        elif end.outside and report and report.state in SLURM_KNOWS_BETTER:
            status.state = report.state
            status.reason = f"Slurm ended the job: {report.word}"
            if report.state is RunState.NODE_FAIL and end.unverified:
                status.reason += f"; {', '.join(end.unverified)} did not answer at the end"
        elif report and _awaits_scheduler(end, report):
            status.state, status.ended = RunState.STOPPING, None
            status.reason = f"{end.reason}; the scheduler has yet to say why"

    def _take_report(self, status: RunStatus, report: JobReport | None) -> None:
        """No head answers: what the batch script left, and what the scheduler says."""
        silent = f"the head does not answer; last heard of {status.age:.0f} s ago" if self.head else ""
        if silent and report is not None and report.word in STANDING_STILL:
            silent = f"Slurm has stopped the job ({report.word}): it stands still until it is resumed"
        batch = _batch_status(self.rundir.batch_status)
        if report is not None and report.state in ENDED_STATES:
            status.state, status.source = report.state, "scheduler"
            status.exit_status = report.exit_status
            status.reason = _why_ended(self.rundir, report, headless=self.head is None)
        elif batch is not None:
            status.state, status.source = (RunState.FAILED if batch else RunState.COMPLETED), "scheduler"
            status.exit_status = batch
            status.reason = _why_batch_ended(self.rundir, batch, headless=self.head is None)
        elif report is not None and report.state is not None:
            status.state = report.state if self.head is None else status.state
            status.reason = silent or report.reason
            status.source, status.age = ("saved" if self.head else "scheduler"), time.time() - report.fresh
        elif self.record.job_id is None:
            status.reason = silent or "the scheduler has not said that it has the job"
        else:
            status.reason = silent or (report.reason if report else "")
        if status.state is RunState.COMPLETED and self.head is None:
            self._take_headless(status, (report and report.ended) or _changed(self.rundir.batch_status))
        if status.over and status.exit_status is None and status.state is RunState.FAILED:
            status.exit_status = 1

    def _take_headless(self, status: RunStatus, ended: float) -> None:
        """A script that ended well and had no head has run nothing; but a network file system may hold it back."""
        if time.time() - ended < LATE_WORD:
            status.state, status.exit_status = RunState.STOPPING, None
            status.reason = "the job is over; the last word of its head is not here yet"
        else:
            status.state, status.exit_status = RunState.FAILED, None
            status.reason = "the batch script ended without having started a head: is there an `exec` in setup?"


def _awaits_scheduler(end: EndRecord, report: JobReport) -> bool:
    """Whether the job's last word is still to come, and may be another than the head's: preempted, not cancelled.

    What is told as over stays what it was told as.
    """
    if not end.outside or end.state is not RunState.CANCELLED:
        return False
    going_on = report.state is not None and report.state not in ENDED_STATES
    return going_on and abs(time.time() - end.ended) < LATE_WORD  # the node's clock may be ahead of ours


def _changed(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _batch_status(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text().strip())
    return None


def _why_ended(rundir: RunDir, report: JobReport, *, headless: bool) -> str:
    if report.state is RunState.FAILED and headless:
        return _why_batch_ended(rundir, report.exit_status or 1, headless=True)
    detail = f" ({report.reason})" if report.reason and report.reason != "None" else ""
    return f"the scheduler says {report.word}{detail}"


def _why_batch_ended(rundir: RunDir, status: int, *, headless: bool) -> str:
    """The end of the batch log is where a start that failed before the head has said why."""
    tail = last_lines(rundir.batch_log, 1)
    if tail:
        return f"the batch script ended with {status}: {tail[-1][:300]}"
    if headless and not rundir.batch_log.exists():
        return (
            f"the batch script could not write to {rundir.path}: the compute nodes probably do not see that "
            "directory; choose one on the shared file system with --root or SLURMFORK_ROOT"
        )
    return f"the batch script ended with {status} and left no word"


def last_lines(path: Path, count: int, size: int = 16_384) -> list[str]:
    """The last lines of a file, read from its end; empty if it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - size))
        lines = file.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()][-count:]
    return []


def _closed(view: StatusView | None) -> list[WorkerView]:
    """Workers of a run that is over: none of them can still be up."""
    if view is None:
        return []
    for worker in view.workers:
        if worker.state not in OVER_STATES:
            worker.state, worker.pid = WorkerState.STOPPED, None
    return view.workers
