"""How a run ends: who decides it, and what is done so that nothing is left when it is said.

The first verdict holds. Then: forks are refused, every agent stops all that it has and leaves, the launcher ends,
secrets are removed, and only after that ``end.json`` says how it went.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from slurmfork.errors import RunDirError, SlurmforkError
from slurmfork.head import scheduler
from slurmfork.head.launcher import Launcher
from slurmfork.head.members import Members
from slurmfork.head.sweeper import PATIENCE_S, Sweeper
from slurmfork.head.table import Table
from slurmfork.head.warning import EndWarning
from slurmfork.head.workers import STOP_MARGIN, Workers
from slurmfork.messages import WorkerView
from slurmfork.names import OVER_STATES, RunState, WorkerState
from slurmfork.orders import EndOrder, EndReport
from slurmfork.rundir import EndRecord, RunDir
from slurmfork.spec import Spec

log = logging.getLogger(__name__)

SIGTERM_STATUS = 128 + 15
HOLD = 0.5  # a worker that dies of SIGTERM may be the first to hear that the whole job is being ended
LAUNCHER_PATIENCE = 15.0
DISK_PATIENCE = 10.0
LEAST_PATIENCE = 1.0


@dataclass(frozen=True)
class Verdict:
    """How the run shall end. ``budget``: seconds in which all must be gone (None: as each worker's grace asks).

    ``lost``: the node whose loss it is. ``requeue``: the run is to come back.
    """

    state: RunState
    reason: str
    exit_status: int | None
    budget: float | None = None
    outside: bool = False
    lost: str | None = None
    requeue: bool = False


class Ending:
    """Watches the table for what ends a run, and carries the verdict out."""

    def __init__(
        self,
        table: Table,
        members: Members,
        workers: Workers,
        launcher: Launcher,
        sweeper: Sweeper,
        rundir: RunDir,
        spec: Spec,
    ) -> None:
        self.decided: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self.done: asyncio.Future[EndRecord] = asyncio.get_running_loop().create_future()
        self._table, self._members, self._workers = table, members, workers
        self._launcher, self._sweeper, self._rundir = launcher, sweeper, rundir
        self._spec = spec
        self._main = next((name for name, role in spec.roles.items() if role.main), None)
        self.warning = EndWarning(spec, workers, os.environ, self._at_limit)
        self._held: dict[str, asyncio.TimerHandle] = {}
        self._deadline = math.inf  # of the event loop's time, by which all has to be over

    def decide(self, verdict: Verdict) -> None:
        """Say how the run ends; only the first word counts."""
        if not self.decided.done():
            self.decided.set_result(verdict)
            self._table.set_state(RunState.STOPPING, verdict.reason)

    # --- what ends a run

    def told(self, by: str, budget: float) -> None:
        """Slurm, or somebody by signal, ends the job; an end that is under way has no more time than that either."""
        self._limit(budget)
        state = RunState.TIMEOUT if self.warning.time_limit else RunState.CANCELLED
        reason = "the time limit was reached" if self.warning.time_limit else f"ended from outside ({by})"
        for name in self._held:  # they did not fail: the same signal reached them first
            view = self._table.workers.get(name)
            if view is not None and view.state is WorkerState.FAILED:
                view.state, view.log_tail = WorkerState.STOPPED, ""
        self.decide(Verdict(state, reason, None, budget, outside=True))

    def _at_limit(self) -> None:
        """The time limit is so near that the run has to end now, to be put into the queue again."""
        self.decide(Verdict(RunState.TIMEOUT, "the time limit is near", None, requeue=True))

    def worker_changed(self, view: WorkerView, planned: list[str]) -> None:
        """Judge a worker's new state: failures end the run, and so does the end of the main role."""
        if self.decided.done():
            return
        if view.state is WorkerState.FAILED and not self._tolerated(view):
            if view.exit_status == SIGTERM_STATUS:
                self._hold(view)
            else:
                self._fail(view)
        elif view.state in OVER_STATES:
            self._check_over(planned)

    def _tolerated(self, view: WorkerView) -> bool:
        return view.role in self._workers.forking or self._workers.ignores(view.role)

    def _hold(self, view: WorkerView) -> None:
        self._held[view.worker] = asyncio.get_running_loop().call_later(HOLD, self._fail, view)

    def _fail(self, view: WorkerView) -> None:
        reason = f"{view.worker} failed: {view.reason}"
        self.decide(Verdict(RunState.FAILED, reason, view.exit_status or 1))

    def _check_over(self, planned: list[str]) -> None:
        """The run is over with its main role, or without one when all planned workers are."""
        views = [self._table.workers[name] for name in planned if name in self._table.workers]
        if self._main is not None:
            views = [view for view in views if view.role == self._main]
        if not views or any(view.state not in OVER_STATES for view in views):
            return
        if self._main is None and self._workers.kept:  # more may be started, on devices that are kept for it
            return
        if self._main is not None and any(view.state is WorkerState.STOPPED for view in views):
            self.decide(Verdict(RunState.CANCELLED, f"the main role {self._main} was stopped", None))
        else:
            what = f"{self._main} is done" if self._main else "all workers are done"
            self.decide(Verdict(RunState.COMPLETED, what, 0))

    def node_lost(self, node: str, how: str = "", budget: float | None = None, *, everywhere: bool = False) -> None:
        """An agent is gone for longer than its lease, or says how it is lost: its workers are, too, or soon will be.

        ``everywhere``: so it is on all nodes.
        """
        lost = [v for v in self._table.workers.values() if v.node == node and v.state not in OVER_STATES]
        for view in lost:
            view.state, view.reason = WorkerState.FAILED, f"the agent on {node} was lost"
            self._table.event("worker", state="failed", worker=view.worker, node=node, message=view.reason)
        goes_on = self._spec.on_node_fail == "continue" and not everywhere
        if goes_on and not any(view.role == self._main for view in lost):
            log.warning("node %s is lost: the run goes on without it", node)
        else:
            reason = "the agents on all nodes were lost" if everywhere else f"the agent on node {node} was lost"
            if how:
                reason += f"; on {node} {how}" if everywhere else f": {how}"
            self.decide(Verdict(RunState.FAILED, reason, 1, budget, outside=True, lost=node))

    def launcher_ended(self, log_tail: str) -> None:
        """The launcher is gone while the run was not over: no agent is left, or none ever came.

        On Slurm that may be a node's failure, which Slurm tells of the job, and may have it queued again for.
        """
        status = self._launcher.status
        told = f" with {status}" if status is not None else ""
        reason = f"the agents' launcher ({Path(self._launcher.argv[0]).name}) ended{told}"
        reason = f"{reason}: {log_tail}" if log_tail else reason
        self.decide(Verdict(RunState.FAILED, reason, status or 1, outside=True))

    # --- carrying it out

    async def carry_out(self) -> EndRecord:
        """Wait for the verdict, then end everything; returns, and writes, the record of it."""
        verdict = await self.decided
        for hold in self._held.values():
            hold.cancel()
        if verdict.budget is not None:
            self._limit(verdict.budget)
        missing = self._members.close()
        survivors, silent = await self._end_agents(verdict.budget)
        left, unverified = await self._sweep(silent)
        survivors += left
        if verdict.lost in unverified:  # it is not the agent alone that is gone
            reason = f"node {verdict.lost} was lost: its agent is gone, and nothing can be run there"
            verdict = replace(verdict, state=RunState.NODE_FAIL, reason=reason)
        launcher_gone = await self._launcher_gone()
        if missing and not launcher_gone:
            unverified.append(f"{missing} nodes whose agents never joined")
        elif missing and not self._launcher.orderly:
            survivors += await self._sweep_absent()
        requeued = verdict.requeue and await self._requeue()
        record = EndRecord(
            state=verdict.state,
            reason=verdict.reason,
            exit_status=verdict.exit_status,
            survivors=len(survivors),
            ended=time.time(),
            unverified=unverified,
            outside=verdict.outside,
        )
        for line in survivors:
            log.error("still alive: %s", line)
        if requeued:
            self._table.set_state(RunState.PENDING, "requeued at its time limit")
        else:
            self._table.set_state(verdict.state, verdict.reason, verdict.exit_status)
        may_be_requeued = self._spec.requeue and self._spec.backend == "slurm"
        comes_back = requeued or (verdict.outside and may_be_requeued)  # then its secrets are needed again
        try:
            await asyncio.wait_for(self._record(None if requeued else record, comes_back), DISK_PATIENCE)
        except asyncio.TimeoutError:
            log.error("the end could not be recorded within %g s: the run directory's file system hangs", DISK_PATIENCE)
        self.done.set_result(record)
        return record

    async def _requeue(self) -> bool:
        """Have Slurm put the job into the queue again; False where it does not."""
        job_id = os.environ.get("SLURM_JOB_ID", "")
        try:
            # Before Slurm hears of it: the batch script, which it signals at once, must find a run that goes on.
            self._rundir.write(self._rundir.requeued, b"")
            self._rundir.head.unlink(missing_ok=True)
        except (OSError, RunDirError) as error:
            log.warning("the run is not requeued: %s", error)
            return False
        if await scheduler.ask("scontrol", "requeue", job_id, patience=30) is not None:
            return True
        with contextlib.suppress(OSError):
            self._rundir.requeued.unlink(missing_ok=True)
        return False

    async def _end_agents(self, budget: float | None) -> tuple[list[str], list[str]]:
        """(descriptions of survivors, nodes whose agents did not answer)."""
        nodes = [member.node for member in self._members.sorted()]
        patience = STOP_MARGIN + (self._workers.longest_grace() if budget is None else budget)
        bodies = {node: EndOrder(budget=budget) for node in nodes}
        answers = await self._members.ask_each("end", bodies, EndReport, timeout=patience)
        survivors: list[str] = []
        unverified: list[str] = []
        for node, answer in answers.items():
            if isinstance(answer, SlurmforkError):
                log.warning("node %s: %s", node, answer)
                unverified.append(node)
            else:
                survivors += [f"{node}: {line}" for line in answer.survivors]
        return survivors, unverified

    async def _record(self, record: EndRecord | None, keep_secrets: bool) -> None:
        """Leave the run directory as a run that is over leaves it; in threads, for the disk may hang."""
        await self._table.close()
        await asyncio.get_running_loop().run_in_executor(None, self._write, record, keep_secrets)

    def _write(self, record: EndRecord | None, keep_secrets: bool) -> None:
        if not keep_secrets:
            with contextlib.suppress(OSError):
                self._rundir.secrets.unlink(missing_ok=True)
        try:
            if record is not None:
                self._rundir.write_record(self._rundir.end, record)
        except RunDirError as error:
            log.error("the end could not be recorded: %s", error)

    async def _sweep(self, nodes: list[str]) -> tuple[list[str], list[str]]:
        """Sweep nodes whose agents did not answer; (descriptions of survivors, nodes where that was not possible)."""
        found = await self._sweeper.sweep(nodes, self._patience(PATIENCE_S))
        survivors = [f"{node}: {line}" for node, lines in found.items() for line in lines or ()]
        return survivors, [node for node, lines in found.items() if lines is None]

    async def _sweep_absent(self) -> list[str]:
        """As ``_sweep``, for nodes whose agents never joined: a launcher that a signal ended may have left some behind.

        They have started nothing, for nobody told them to, and leave when they find no head; so this is for order's
        sake, and nodes that cannot be asked any more are not named.
        """
        survivors, unknown = await self._sweep(self._members.absent())
        if unknown:
            log.info("not swept: %s, whose agents never joined", ", ".join(unknown))
        return survivors

    async def _launcher_gone(self) -> bool:
        """Whether the launcher has ended, as it does when the last guardian has; bounded."""
        patience = self._patience(LAUNCHER_PATIENCE)
        try:
            await asyncio.wait_for(asyncio.shield(self._launcher.ended), patience)
        except asyncio.TimeoutError:
            log.warning("the launcher is still there after %.0f s", patience)
            return False
        return True

    def _limit(self, budget: float) -> None:
        """Have all be over in so many seconds, or as soon as was to be before."""
        self._deadline = min(self._deadline, asyncio.get_running_loop().time() + budget)

    def _patience(self, most: float) -> float:
        """Seconds to wait for something, ``most`` at most, and no longer than all may take."""
        return max(LEAST_PATIENCE, min(most, self._deadline - asyncio.get_running_loop().time()))
