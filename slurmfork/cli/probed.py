"""Showing what a probe found: a column for the workers, a table of the nodes, and a line for all that is odd.

Exit statuses: 0 where every node answered, whatever it said; 1 where one did not, so that not all is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from slurmfork.cli import output
from slurmfork.cli.options import Seconds
from slurmfork.errors import UsageError
from slurmfork.messages import WorkerView
from slurmfork.names import OVER_STATES, natural, split_target
from slurmfork.observe import RunStatus
from slurmfork.probe import NodeProbe, Probe, Verdict, WorkerProbe
from slurmfork.run import Run

TIMEOUT_S = 10.0
SHOWN = 5  # nodes in a sentence

Probed = tuple[Probe, RunStatus, list[WorkerView]]


def options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--probe, --via and --timeout."""
    probe = click.option(
        "--probe", is_flag=True, help="Look at the run's nodes themselves; needs no head and no agent."
    )
    via = click.option(
        "--via",
        type=click.Choice(["auto", "ssh", "srun"]),
        help="With --probe: how nodes are reached; auto (the default) tries ssh, then srun.",
    )
    timeout = click.option(
        "--timeout", type=Seconds(), metavar="S", help="With --probe: how long a node may take; default 10s."
    )
    return probe(via(timeout(function)))


def refuse_without_probe(via: str | None, timeout: float | None) -> None:
    """Raise UsageError for options that mean nothing without --probe."""
    for option, value in (("--via", via), ("--timeout", timeout)):
        if value is not None:
            raise UsageError(f"{option} goes with --probe")


def look(run: Run, via: str | None, timeout: float | None) -> Probed:
    """Probe a run."""
    return run.probed(via=via or "auto", timeout=TIMEOUT_S if timeout is None else timeout)


def of_role(found: Probe, role: str) -> Probe:
    """The part of a probe that is about one role; nodes are all there."""
    return Probe(
        nodes=found.nodes,
        workers=[one for one in found.workers if split_target(one.worker)[0] == role],
        unrecorded=[one for one in found.unrecorded if one.worker.partition("/")[0] == role],
        differences=[line for line in found.differences if line.partition("/")[0] == role],
    )


def conclude(found: Probe) -> int:
    """Complain of nodes that could not be asked; returns the exit status."""
    if not (failed := found.unanswered):
        return 0
    told = [f"{node.node} ({node.reason})" for node in failed[:SHOWN]]
    more = f", and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
    output.complain(
        f"could not ask {len(failed)} of {output.plural(len(found.nodes), 'node')}: {', '.join(told)}{more}"
    )
    return 1


# --- for people


def worker_rows(found: Probe, views: Iterable[WorkerView]) -> list[list[object]]:
    """WORKER, NODE, PID, STATE, PROBE, TARGET, RESTARTS, AGE, REASON; those too that only journals know of."""
    told = {one.worker: one for one in found.workers}
    known = {view.worker: view for view in views}
    return [_row(known.get(name), told.get(name)) for name in sorted(known.keys() | told.keys(), key=natural)]


def _row(view: WorkerView | None, one: WorkerProbe | None) -> list[object]:
    worker = one.worker if one else view.worker if view else ""
    node = (one.node if one else None) or (view.node if view else None) or "-"
    pid = (one.pid if one else None) or (view.pid if view else None) or "-"
    state = view.state if view else "-"
    verdict = one.verdict if one else "-"
    more = [view.target or "-", view.restarts, output.since(view.started) or "-"] if view else ["-"] * 3
    expected = one is not None and one.ended and not one.left and view is not None and view.state in OVER_STATES
    reasons = [one.reason if one and not expected else "", view.reason if view else ""]
    return [worker, node, pid, state, verdict, *more, "; ".join(word for word in reasons if word)]


WORKER_TITLES = ["WORKER", "NODE", "PID", "STATE", "PROBE", "TARGET", "RESTARTS", "AGE", "REASON"]


def node_table(found: Probe) -> None:
    """A line for each node: how it answered, its agent, and its workers by verdict."""
    output.table(["NODE", "ANSWER", "TOOK", "AGENT", "WORKERS", "REASON"], [_node(node, found) for node in found.nodes])


def _node(node: NodeProbe, found: Probe) -> list[object]:
    own = [one for one in found.workers if one.node == node.node]
    return [node.node, node.via or "NO", f"{node.took:.1f}s", node.agent, _counted(own) or "-", node.reason]


def _counted(workers: Sequence[WorkerProbe]) -> str:
    """How many there are of each verdict, those apart that ended as recorded, which nobody has to wonder about."""
    ended = sum(one.ended and not one.left for one in workers)
    counts = Counter(one.verdict for one in workers if not one.ended or one.left)
    words = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    return ", ".join([*words, *([f"{ended} ended"] if ended else [])])


def summary(found: Probe, status: RunStatus) -> None:
    """What was found in a line, and then a line for each thing that is not as it should be."""
    ways = Counter(node.via for node in found.nodes if node.ok)
    words = {way: way if way == "here" else f"by {way}" for way in sorted(ways)}
    how = ", ".join(f"{ways[way]} {word}" if len(ways) > 1 else word for way, word in words.items())
    took = max((node.took for node in found.nodes if node.ok), default=0.0)
    few = f"{sum(ways.values())} of " if found.unanswered else ""
    nodes = few + output.plural(len(found.nodes), "node") + (f" ({how})" if how else "")
    verdicts = _counted(found.workers) or "no worker was ever started"
    output.say(f"{nodes} answered{f' within {took:.1f} s' if ways else ''}: {verdicts}")
    if status.source == "saved":
        output.say(f"the head does not answer: states are as it saw them {output.span(status.age)} ago")
    for line in found.differences:
        output.say(line)
    for one in found.unrecorded:
        output.say(f"{one.worker}: no record names pid {one.pid} on {one.node} ({output.one_line(one.command)})")
    for node in found.nodes:
        for note in node.notes:
            output.say(note if node.node in note else f"{node.node}: {note}")


def tell_strays(found: Probe) -> None:
    """A line for each worker whose process is neither alive nor ended as recorded, if no difference told it."""
    told = {line.partition(":")[0] for line in found.differences}
    for one in found.workers:
        ended = one.verdict is Verdict.ALIVE or (one.ended and not one.left)
        unasked = any(node.node == one.node for node in found.unanswered)
        if not ended and not unasked and one.worker not in told:
            output.say(f"{one.worker} on {one.node}: {one.verdict}, {output.one_line(one.reason)}")
