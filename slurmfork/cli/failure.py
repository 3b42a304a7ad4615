"""Failure: telling why a run, a fork or a worker failed, with the end of the log that says it best."""

from __future__ import annotations

from collections.abc import Sequence

from slurmfork import hints
from slurmfork.cli import output
from slurmfork.messages import WorkerView
from slurmfork.names import RunState, WorkerState
from slurmfork.observe import RunStatus, last_lines
from slurmfork.run import Run

SHOWN = 5  # workers; of a thousand that failed alike nobody reads more
TAIL = 12  # lines of a log


def exit_status(status: RunStatus) -> int:
    """What the process exits with for a run that is over (or ready): its own status; 1 where it has none."""
    if not status.over or status.state is RunState.COMPLETED:
        return 0
    return status.exit_status or 1


def explain(run: Run, status: RunStatus, *, tails: bool = True) -> None:
    """Say on stderr how a run ended, unless well: the reason, who failed, and the end of their logs."""
    if exit_status(status) == 0:
        return
    output.complain(verdict(status))
    failed = failed_workers(run.workers())
    if failed:
        tell_workers(failed, tails=tails)
    elif tails and status.state is RunState.FAILED:
        quote(last_lines(run.rundir.batch_log, TAIL))
        output.aside(f"{hints.command('logs', run.run_id, 'batch')} shows all of it")


def verdict(status: RunStatus) -> str:
    """How a run ended, in a line."""
    line = f"{status.run_id} {ended_as(status.state)}"
    if status.reason and output.one_line(status.reason) != str(status.state):
        line += f": {output.one_line(status.reason)}"
    if status.survivors:
        line += f"; {output.plural(status.survivors, 'process')} left: {hints.command('clean', status.run_id)}"
    if status.unverified:
        line += f"; could not ask {', '.join(status.unverified)}: {hints.command('clean', status.run_id)}"
    return line


def ended_as(state: RunState) -> str:
    """A final state as the end of a sentence."""
    words = {
        RunState.COMPLETED: "is completed",
        RunState.FAILED: "failed",
        RunState.CANCELLED: "was cancelled",
        RunState.TIMEOUT: "ran into its time limit",
        RunState.PREEMPTED: "was preempted",
        RunState.NODE_FAIL: "lost a node",
    }
    return words.get(state, f"is {state}")


def failed_workers(views: Sequence[WorkerView]) -> list[WorkerView]:
    """Those that failed, the first to fail first: the others often only followed."""
    return sorted((v for v in views if v.state is WorkerState.FAILED), key=lambda v: (v.ended or 0.0, v.worker))


def tell_workers(views: Sequence[WorkerView], *, tails: bool = True) -> None:
    """A line on stderr for each worker, with the end of its log; after a few only how many more there are."""
    for view in views[:SHOWN]:
        output.aside(worker_line(view))
        if tails:
            quote(view.log_tail.splitlines()[-TAIL:])
    if len(views) > SHOWN:
        output.aside(f"and {len(views) - SHOWN} more")


def worker_line(view: WorkerView) -> str:
    """What became of a worker, in a line."""
    where = f" on {view.node}" if view.node else ""
    line = f"{view.worker}{where}: {view.state}"
    if view.reason:
        line += f", {output.one_line(view.reason)}"
    elif view.exit_status is not None:
        line += f", exit status {view.exit_status}"
    return line


def quote(lines: Sequence[str]) -> None:
    """Lines of a log on stderr, marked as such."""
    for line in lines:
        output.aside(f"  | {line.rstrip()}")
