"""Probing: asks all nodes of a run at once what runs there, and has the answers judged (``slurmfork.probe``).

Needs neither head nor agents. Where a head answers, its word is taken before the nodes are asked and after; where it
says otherwise than they do, the nodes concerned are asked once more before that is told, for things go on meanwhile.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import BoundedSemaphore
from typing import NamedTuple

from slurmfork import nodelook, probe, reaching
from slurmfork.backends.base import Backend, Job
from slurmfork.errors import UsageError
from slurmfork.messages import NodeView, WorkerView
from slurmfork.names import natural
from slurmfork.nodelook import Look
from slurmfork.observe import RunStatus
from slurmfork.probe import NodeProbe, Probe, Verdict, WorkerProbe
from slurmfork.process import boot_id
from slurmfork.reaching import Commands, Way
from slurmfork.recorded import Recorded, nodes_of, read_journal
from slurmfork.rundir import RunDir

TIMEOUT_S = 10.0
AT_ONCE = 128  # nodes
STEPS_AT_ONCE = 32  # by srun: each is work for slurmctld
ROUNDS = 6  # times the limit of a node is what all nodes may take together
LOOKS = 3  # at a node on which workers start all the time

View = tuple[RunStatus, list[WorkerView]]


class _Answer(NamedTuple):
    node: NodeProbe
    recorded: Recorded
    look: Look | None


class _Budget:
    """The seconds that a node may still take; waiting for one's turn costs none."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds


class Prober:
    """One probe of one run. ``view`` gives the run's status and workers; ``timeout`` is in seconds, for each node.

    Raises UsageError for a way (``via``) that there is not.
    """

    def __init__(
        self, rundir: RunDir, backend: Backend, job: Job | None, view: Callable[[], View], *, via: str, timeout: float
    ) -> None:
        if via not in reaching.VIAS:
            raise UsageError(f"via is {', '.join(reaching.VIAS[:-1])} or {reaching.VIAS[-1]}, not {via!r}")
        if not timeout > 0:
            raise UsageError(f"timeout is a number of seconds above 0, not {timeout!r}")
        self._rundir = rundir
        self._backend = backend
        self._job = job
        self._view = view
        self._via = via
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout * ROUNDS
        self._commands = Commands()
        self._steps = BoundedSemaphore(STEPS_AT_ONCE)

    def run(self) -> tuple[Probe, RunStatus, list[WorkerView]]:
        """The probe, and the run's status and workers as they are known otherwise."""
        status, before = self._view()
        views = {node.node: node for node in status.nodes}
        nodes = sorted({*views, *nodes_of(self._rundir)}, key=natural)
        answers = self._ask_all([views.get(node) or NodeView(node=node) for node in nodes])
        if status.source != "head":
            return self._result(answers, before, before, compared=False), status, before
        status, after = self._view()
        found = self._result(answers, before, after, compared=status.source == "head")
        if found.differences:
            doubtful = {_node_of(line, found) for line in found.differences}
            again = self._ask_all([views.get(node) or NodeView(node=node) for node in nodes if node in doubtful])
            answers.update(again)
            status, last = self._view()
            found = self._result(answers, after, last, compared=status.source == "head")
            after = last
        return found, status, after

    # --- asking

    def _ask_all(self, nodes: Sequence[NodeView]) -> dict[str, _Answer]:
        if not nodes:
            return {}
        with ThreadPoolExecutor(min(len(nodes), AT_ONCE), thread_name_prefix="probe") as pool:
            try:
                answers = list(pool.map(self._ask, nodes))
            except BaseException:  # Ctrl-C: nobody is to wait for nodes that do not answer
                self._commands.end()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return {answer.node.node: answer for answer in answers}

    def _ask(self, view: NodeView) -> _Answer:
        """Look at a node; again if its journal names a start by then that was not asked for."""
        node = NodeProbe(node=view.node)
        begin = time.monotonic()
        recorded = read_journal(self._rundir, view.node)
        budget, look = _Budget(self._timeout), None
        for _ in range(LOOKS):
            asked = recorded
            look = self._look(node, view, asked, budget)
            recorded = read_journal(self._rundir, view.node)
            if look is None or recorded.pids() <= asked.pids():
                break
        node.took = round(time.monotonic() - begin, 3)
        node.notes = list(recorded.notes)
        if look is not None:
            node.agent, odd = probe.agent_of(view.node, look)
            node.notes += [odd] if odd else []
            if not look.complete:
                node.notes.append("it was not searched to the end for processes that no record names")
        return _Answer(node, recorded, look)

    def _look(self, node: NodeProbe, view: NodeView, recorded: Recorded, budget: _Budget) -> Look | None:
        host = self._backend.host(self._rundir, view.node)
        near = host == os.uname().nodename or (
            recorded.boot_id == boot_id() and (not view.address or reaching.is_own_address(view.address))
        )
        step = self._backend.step(self._job, view.node) if self._job else []
        ways = reaching.ways(self._via, host, view.address, step, near=near)
        why: list[str] = []
        node.ok, node.via = False, ""
        while ways:
            way = ways.pop(0)
            look, reason = self._by(way, recorded, budget, budget.left / 2 if ways else budget.left)
            if look is not None and (stranger := _stranger(view.node, recorded, look)):
                look, reason = None, f"{way.via}: {stranger}"
            if look is not None:
                node.ok, node.via, node.reason = True, way.via, ""
                return look
            why.append(reason)
            if way.via == reaching.SSH and view.address and "Could not resolve hostname" in reason:
                ways.insert(0, reaching.by_ssh(host, view.address))  # Slurm's names need not be the network's
                why.pop()
        node.reason = "; ".join(why)
        return None

    def _by(self, way: Way, recorded: Recorded, budget: _Budget, seconds: float) -> tuple[Look | None, str]:
        mark = f"slurmfork-{secrets.token_hex(8)}"
        script = nodelook.script(recorded.pids(), self._rundir.run_id, mark)
        turn = self._steps if way.via == reaching.SRUN else nullcontext()
        with turn:
            begin = time.monotonic()
            seconds = min(seconds, self._deadline - begin)
            if seconds <= 0:
                return None, f"{way.via}: not asked, there was no time left"
            asked = self._commands.run(way.argv(seconds), script, seconds)
            budget.left -= time.monotonic() - begin
        look = nodelook.read(asked.output, self._rundir.run_id, mark)
        return look, "" if look else reaching.refusal(way.via, asked, seconds)

    # --- judging

    def _result(
        self, answers: dict[str, _Answer], before: Iterable[WorkerView], after: Iterable[WorkerView], *, compared: bool
    ) -> Probe:
        job_id = self._job.job_id if self._job and self._backend.name == "slurm" else None
        after = list(after)
        found = Probe(nodes=[answer.node for answer in answers.values()])
        latest: dict[str, tuple[tuple[bool, float], WorkerProbe]] = {}
        for answer in answers.values():
            for one in probe.judge(answer.recorded, answer.look, answer.node.reason):
                rank = (one.verdict is Verdict.ALIVE, answer.recorded.begun(one.worker))
                if one.worker not in latest or rank > latest[one.worker][0]:  # requeued, it may be on another node
                    latest[one.worker] = (rank, one)
            if answer.look is not None:
                found.unrecorded += probe.unrecorded(answer.recorded, answer.look, job_id)
        every = {name: (answer.recorded, answer.look) for name, answer in answers.items()}
        found.workers = [one for _, one in latest.values()]
        found.workers += probe.without_record(after, every, set(latest))
        found.workers.sort(key=lambda one: natural(one.worker))
        if compared:
            found.differences = probe.differences(before, after, found.workers)
        return found


def _stranger(node: str, recorded: Recorded, look: Look) -> str:
    """Why it was another machine that answered; empty if it was not, as far as can be told."""
    last = recorded.last
    if last is None or not probe.is_another_machine(last, look):
        return ""
    return f"{look.host}, which answers as {node}, is not the machine on which its workers were started"


def _node_of(line: str, found: Probe) -> str:
    """The node of the worker that a difference is about."""
    worker = line.partition(": ")[0]
    return next((one.node for one in found.workers if one.worker == worker), "")
