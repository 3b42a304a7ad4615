"""Runs: the handle on what was submitted, which the CLI and Python users hold.

run = slurmfork.submit("grpo.yaml")
run.wait("ready")
run.fork("eval", target="rollout")
run.cancel()
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from slurmfork import backends, hints, rundir
from slurmfork.backends.base import PATIENCE_S, Backend, Job, JobReport
from slurmfork.errors import BackendError, Refused, RunDirError, StillAlive, Unreachable, UsageError
from slurmfork.messages import (
    CancelReply,
    CancelRequest,
    Event,
    PortsRequest,
    SignalRequest,
    StopReply,
    StopRequest,
    WorkerView,
    checked,
    fork_request,
    new_request_id,
)
from slurmfork.names import RunState
from slurmfork.observe import Observation, RunStatus
from slurmfork.rundir import EndRecord, RunDir, RunRecord
from slurmfork.spec import Spec, Stop

if TYPE_CHECKING:
    from pathlib import Path

    from slurmfork.client import Client
    from slurmfork.engine.role import Role
    from slurmfork.probe import Probe

SETTLE_S = 15.0  # heads linger for 10 at their end
POLL = 0.05  # seconds between looks at a file that another node will write
SCHEDULER_POLL = 2.0  # seconds between asking the backend, which asks Slurm still more seldom
WORD_POLL = 0.5  # the same, where it has just told more than it reports
LEAST_PATIENCE = 1.0
QUICK = 5.0  # seconds for the scheduler's word where somebody sits and waits for an answer
END_PATIENCE = 60.0
END_MARGIN = 20.0  # seconds beyond the workers' grace that an end in order may take
HEAD_PATIENCE = 15.0  # seconds of silence after which a followed head is asked whether it lives


class Run:
    """One run, wherever it is in its life. Cheap to make; every method looks afresh.

    Methods raise RunDirError, Unreachable (the head does not answer), Refused (it says no).
    """

    def __init__(self, directory: RunDir, record: RunRecord, *, notes: Sequence[str] = ()) -> None:
        self.rundir = directory
        self.record = record
        self.notes = list(notes)

    def __repr__(self) -> str:
        return f"Run({self.run_id!r})"

    @classmethod
    def load(cls, wanted: str, root: str | os.PathLike[str] | None = None) -> Run:
        """The run that ``wanted`` names: a run id, a unique prefix, a job id or ``last``; raises RunNotFound."""
        return cls._of(rundir.find(rundir.root_of(root), wanted))

    @classmethod
    def all(cls, root: str | os.PathLike[str] | None = None) -> list[Run]:
        """Every run under the root, oldest first; but for those whose record is damaged."""
        found = []
        for entry in rundir.run_dirs(rundir.root_of(root)):
            with suppress(RunDirError):
                found.append(cls._of(entry))
        return sorted(found, key=lambda run: run.record.submitted)

    @classmethod
    def _of(cls, directory: RunDir) -> Run:
        record = directory.read_record(directory.record, RunRecord)
        if record is None:
            raise RunDirError(f"{directory.path} is not a run directory")
        if record.run_id != directory.run_id:
            raise RunDirError(f"{directory.path} is the directory of {record.run_id}: give it that name again")
        if record.job_id is None:  # who submitted it was killed before it could say so
            with suppress(UsageError, RunDirError):
                record.job_id = backends.get(record.backend).started(directory)
        return cls(directory, record)

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def job_id(self) -> str | None:
        return self.record.job_id

    @property
    def backend(self) -> Backend:
        return backends.get(self.record.backend)

    @property
    def job(self) -> Job | None:
        """The scheduler's job of this run; None if it was never submitted."""
        if self.record.job_id is None:
            return None
        return Job(job_id=self.record.job_id, cluster=self.record.cluster, submitted=self.record.submitted)

    def spec(self) -> Spec:
        """The resolved spec as it was submitted."""
        found = self.rundir.read_record(self.rundir.spec, Spec)
        if found is None:
            raise RunDirError(f"{self.rundir.spec} is missing")
        return found

    # --- looking

    def status(self) -> RunStatus:
        """State, reason, nodes and counts of workers, with whose word it is and how old."""
        return statuses([self])[0][0]

    def workers(self, role: str | None = None) -> list[WorkerView]:
        """Every worker that the run has or had, forked ones too, by role and index."""
        views = statuses([self], QUICK)[0][1]
        return [view for view in views if role in (None, view.role)]

    def probe(self, *, via: str = "auto", timeout: float = 10.0) -> Probe:
        """Look at the run's nodes themselves: for each worker, whether the process that its journal names is alive.

        Needs neither head nor agents. ``via``: ``auto`` (here, ssh, srun), ``ssh`` or ``srun``; ``timeout``: seconds
        for each node. Never raises for nodes that do not answer: they are ``unanswered``, their workers unknown.
        """
        return self.probed(via=via, timeout=timeout)[0]

    def probed(self, *, via: str = "auto", timeout: float = 10.0) -> tuple[Probe, RunStatus, list[WorkerView]]:
        """As ``probe``, with the run's status and workers as head and scheduler tell them."""
        from slurmfork.probing import Prober

        look = Prober(self.rundir, self.backend, self.job, lambda: statuses([self], QUICK)[0], via=via, timeout=timeout)
        return look.run()

    def events(self, since: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """What happens in the run, as it happens, until its head is gone."""
        with self._head() as client:
            yield from client.events(since, timeout)

    def wait(self, for_: str = "done", timeout: float | None = None) -> RunStatus:
        """Wait until the run is ``ready`` (or over), or ``done``; returns its status.

        However long the queue takes. Raises TimeoutError after ``timeout`` seconds.
        """
        if for_ not in ("ready", "done"):
            raise UsageError(f"wait for 'ready' or 'done', not for {for_!r}")
        if timeout is not None and not isinstance(timeout, (int, float)):
            raise UsageError(f"timeout is a number of seconds, or None; not {timeout!r}")
        deadline = None if timeout is None else time.monotonic() + timeout
        for status in self.progress(deadline):
            if status.over or (for_ == "ready" and status.state is RunState.READY):
                return status
        raise TimeoutError(f"run {self.run_id} is not {for_} after {timeout:g} s")

    def settled(self, status: RunStatus, deadline: float | None = None) -> RunStatus:
        """That status; of a run that its head calls over the one with the end record, which comes a moment later.

        It need not be over, then: Slurm has yet to say why it was ended, or has it in its queue again. Where the end
        cannot be written, or at ``deadline``, a time of time.monotonic(), what is known then.
        """
        until = time.monotonic() + SETTLE_S
        while status.over and status.source in ("head", "saved") and time.monotonic() < min(until, deadline or until):
            time.sleep(POLL)
            status = self._status_by(deadline)
        return status

    def progress(self, deadline: float | None = None) -> Iterator[RunStatus]:
        """The run's status whenever it changed (by the head's events) or may have (by the scheduler).

        Stops at the run's end, or at ``deadline``, a time of time.monotonic(). Raises RunDirError if it is damaged.
        """
        while deadline is None or time.monotonic() < deadline:
            status = self.settled(self._status_by(deadline), deadline)
            if status.state is RunState.UNKNOWN:
                raise RunDirError(status.reason)
            yield status
            if status.over:
                return
            if status.source == "head":
                yield from self._follow(status, deadline)
                self._await_change(1.0, deadline)
            elif status.source == "end":
                self._await_word(deadline)
            else:
                self._await_change(SCHEDULER_POLL, deadline)

    def _follow(self, status: RunStatus, deadline: float | None) -> Iterator[RunStatus]:
        """What the head says after ``status``; returns when it is silent, for the scheduler to be asked."""
        patience = HEAD_PATIENCE
        if deadline is not None:
            patience = min(patience, max(0.01, deadline - time.monotonic()))
        try:
            with self._head() as client:
                for event in client.events(since=status.seq, timeout=patience):
                    if deadline is not None and time.monotonic() >= deadline:
                        return
                    if event.seq > status.seq and event.kind in ("run", "worker", "node"):
                        status = self._status_by(deadline)  # it may hold many events that are still to come
                        if status.over:  # by the head's word, which is not the last one
                            return
                        yield status
        except (TimeoutError, Unreachable, RunDirError):
            return

    def _await_change(self, patience: float, deadline: float | None) -> None:
        """Wait until a head appears or the end is recorded; at most ``patience`` seconds."""
        until = time.monotonic() + patience
        had_head = self.rundir.head.exists()
        while time.monotonic() < min(until, deadline or until):
            if self.rundir.end.exists() or self.rundir.batch_status.exists() or self.rundir.head.exists() != had_head:
                return
            time.sleep(POLL)

    def _await_word(self, deadline: float | None) -> None:
        """Wait until the scheduler, too, calls the job over; or a moment, after which it may be asked again."""
        if self.job is not None and self.backend.ended(self.rundir, self.job):  # its report is older than that
            time.sleep(min(WORD_POLL, max(0.0, (deadline or math.inf) - time.monotonic())))
            return
        until = time.monotonic() + SCHEDULER_POLL
        while time.monotonic() < min(until, deadline or until):
            time.sleep(POLL)
            if self.job is not None and self.backend.ended(self.rundir, self.job):
                return

    def _status_by(self, deadline: float | None) -> RunStatus:
        """The status, for which the scheduler is not waited for beyond ``deadline``."""
        if deadline is None:
            return self.status()
        return statuses([self], min(PATIENCE_S, max(LEAST_PATIENCE, deadline - time.monotonic())))[0][0]

    # --- engines

    def role(self, name: str) -> Role:
        """The workers of a role that hosts engines, to call their methods; all of them have to be up.

        Raises UsageError where there is no such role, or it has a command; WorkerFailed, EngineError for one that is
        not up.
        """
        from slurmfork.engine.role import Role, packages_of

        spec = self.spec()
        return Role(self, name, packages_of(spec), spec)

    @property
    def credentials_directory(self) -> Path:
        """Where the run's certificates are."""
        return self.rundir.credentials

    def engine_views(self, role: str) -> list[WorkerView]:
        """The workers of a role, as they stand now."""
        return self.workers(role)

    # --- acting

    def fork(
        self,
        role: str,
        *,
        target: str | None = None,
        count: int = 1,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[WorkerView]:
        """Start children of ``role`` beside each worker of ``target``, all or none; returns them when they are up.

        ``target`` (a role or role/index) and ``command`` default to the spec's. Raises Refused, whose ``detail``
        lists the workers that failed, with exit status and the end of their logs.
        """
        request = fork_request(
            role, target=target, count=count, env=env, command=command, timeout=timeout, request_id=request_id
        )
        with self._head() as client:
            return client.fork(request).workers

    def stop(self, target: str, *, grace: float | None = None) -> StopReply:
        """Stop a role or one worker, with everything below it; returns when they are gone."""
        request = checked(StopRequest(target=target, grace=grace, request_id=new_request_id()))
        with self._head() as client:
            return client.stop(request)

    def signal(self, target: str, signal: str) -> list[str]:
        """Send a signal (a name without SIG) to a role's workers or to one; returns their names."""
        request = checked(SignalRequest(target=target, signal=signal.upper().removeprefix("SIG")))
        with self._head() as client:
            return client.signal(request)

    def ports(self, worker: str, count: int = 1) -> list[int]:
        """Reserve ``count`` further ports on the node of a worker (role/index), its own until it ends."""
        request = checked(PortsRequest(worker=worker, count=count))
        with self._head() as client:
            return client.ports(request)

    def cancel(self, reason: str = "") -> CancelReply:
        """End the run, and verify: ``survivors`` counts what is left on the nodes that could be asked.

        First the head is asked, which stops all workers with their own grace; then the scheduler's job is
        cancelled: if that fails after the head has verified, ``notes`` says so. Cancelling a run that is over
        changes nothing.
        """
        if end := self._end():
            if self.record.requeue and end.outside and self.job is not None:  # Slurm may have it in its queue again
                self.backend.cancel(self.rundir, self.job, END_MARGIN)
                self.rundir.secrets.unlink(missing_ok=True)  # which were kept for that
            return CancelReply(state=end.state, survivors=end.survivors, unverified=end.unverified)
        request = checked(CancelRequest(reason=reason))
        reply = self._ask_head_to_cancel(request)
        if reply is None:
            if self.job is not None:
                self.backend.cancel(self.rundir, self.job, self._longest_grace() + END_MARGIN)
            return self._verify_without_head(request)
        try:
            if self.job is not None:
                self.backend.cancel(self.rundir, self.job, END_MARGIN)
        except BackendError as error:
            reply.notes.append(f"the job could not be cancelled, and ends by itself: {error}")
        else:
            self._await_end(END_PATIENCE)
        return reply

    def _end(self) -> EndRecord | None:
        """How the run ended; None if it did not, or if that cannot be read."""
        with suppress(RunDirError):
            return self.rundir.read_record(self.rundir.end, EndRecord)
        return None

    def _ask_head_to_cancel(self, request: CancelRequest) -> CancelReply | None:
        """None: no head answers, or one with a fault of its own; the job can be cancelled all the same."""
        try:
            with self._head() as client:
                return client.cancel(request)
        except (Unreachable, Refused, RunDirError):
            return None

    def _longest_grace(self) -> float:
        """Seconds that the slowest role may take to stop; a role's default where the spec cannot be read."""
        with suppress(RunDirError):
            return max((role.stop.grace for role in self.spec().roles.values()), default=0.0)
        return Stop().grace

    def _verify_without_head(self, request: CancelRequest) -> CancelReply:
        """The job never ran, or its head is gone: wait for the job's end, then look at what can be looked at."""
        if self.job is None:
            self.rundir.script.unlink(missing_ok=True)  # a job that the scheduler took after all ends without it
        deadline = time.monotonic() + END_PATIENCE
        while not self._job_is_over():
            if self.job is None and (reply := self._ask_head_to_cancel(request)):  # it came up after all
                return reply
            if time.monotonic() >= deadline:
                waited = f"within {END_PATIENCE:.0f} s"
                raise StillAlive(f"the job {self.job_id or ''} of run {self.run_id} has not ended {waited}")
            time.sleep(POLL)
        if end := self._end():
            return CancelReply(state=end.state, survivors=end.survivors, unverified=end.unverified)
        from slurmfork import aftermath

        after = aftermath.sweep_run(self.rundir)
        record = EndRecord(
            state=RunState.CANCELLED,
            reason="cancelled" + (f": {request.reason}" if request.reason else ""),
            exit_status=None,
            survivors=len(after.survivors),
            unverified=after.unverified,
            ended=time.time(),
        )
        self.rundir.write_record(self.rundir.end, record)  # no head is there that could
        self.rundir.secrets.unlink(missing_ok=True)
        return CancelReply(
            state=record.state,
            survivors=record.survivors,
            unverified=record.unverified,
            details=after.survivors,
        )

    def _job_is_over(self) -> bool:
        """Whether the batch script is done, with its sweep, which comes after the head's own end record."""
        if self.rundir.batch_status.exists():
            return True
        if self.job is None:  # nobody knows of a job: the script runs if it has begun to write
            return not self.rundir.batch_log.exists()
        return self.backend.ended(self.rundir, self.job)

    def _await_end(self, patience: float) -> None:
        """Wait for the batch script: what it sweeps belongs to the cancel."""
        until = time.monotonic() + patience
        while not self._job_is_over() and time.monotonic() < until:
            time.sleep(POLL)

    @contextmanager
    def _head(self) -> Iterator[Client]:
        """A client of the run's head; raises Unreachable, in words that fit the run's state."""
        seen = Observation(self.rundir, self.record)
        if seen.end is not None:
            raise Unreachable(f"run {self.run_id} is over: {seen.end.state}, {seen.end.reason}")
        client = seen.client()
        if client is None and seen.damage:
            raise RunDirError(seen.damage)
        if client is None:
            wait = hints.command("wait", self.run_id, "--for", "ready")
            raise Unreachable(f"run {self.run_id} has not started yet; {wait}")
        with client:
            yield client


def statuses(runs: Sequence[Run], patience: float = PATIENCE_S) -> list[tuple[RunStatus, list[WorkerView]]]:
    """Status and workers of each run; each scheduler is asked once for all of its runs, all heads at once.

    ``patience``: seconds for a scheduler, whose last word counts then, however old; "don't know" is never "gone".
    A run that is damaged is ``unknown``, with the reason, and keeps nothing from the others.
    """
    seen = [Observation(run.rundir, run.record) for run in runs]
    asked: dict[str, dict[int, tuple[RunDir, Job]]] = {}
    for place, run in enumerate(runs):
        if run.job is not None and seen[place].needs_scheduler():
            asked.setdefault(run.record.backend, {})[place] = (run.rundir, run.job)
    words: list[JobReport | None] = [None] * len(runs)
    for name, jobs in asked.items():
        try:
            reports = backends.get(name).report(list(jobs.values()), patience)
        except UsageError as error:
            for place in jobs:
                seen[place].damage = str(error)
            continue
        for place, report in zip(jobs, reports, strict=True):
            words[place] = report
    return _looks(seen, words)


def _looks(seen: Sequence[Observation], words: Sequence[JobReport | None]) -> list[tuple[RunStatus, list[WorkerView]]]:
    """What is seen of each: one after the other where a run's files say all, side by side where heads are asked."""
    found = {place: look.look(words[place]) for place, look in enumerate(seen) if look.end is not None}
    rest = [place for place in range(len(seen)) if place not in found]
    if len(rest) < 2:
        found.update((place, seen[place].look(words[place])) for place in rest)
    else:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(len(rest), 16)) as pool:  # one dead node must not hold up the others' word
            looked = pool.map(Observation.look, [seen[place] for place in rest], [words[place] for place in rest])
            found.update(zip(rest, looked, strict=True))
    return [found[place] for place in range(len(seen))]


__all__ = ["Run", "RunStatus", "statuses"]
