"""The supervisor: the table of one node's workers, and what the head orders of them. Starts are all or none.

It hears of ends by SIGCHLD, remembers in the journal what lives below the workers, and ends the node's work.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from slurmfork import journal, process
from slurmfork.agent.guest import Guest
from slurmfork.agent.lastwords import signal_number
from slurmfork.agent.outfit import Site
from slurmfork.agent.spawn import StartFailed
from slurmfork.agent.stopping import KILL_BOUND_S, Stopping
from slurmfork.agent.worker import LAUNCH_TIMEOUT_S, Worker
from slurmfork.errors import Refused
from slurmfork.messages import StopResult, WorkerView
from slurmfork.names import WorkerState
from slurmfork.orders import EndReport, Order, ReserveOrder, SignalOrder, StartOrder, StopOrder
from slurmfork.process import Identity

log = logging.getLogger(__name__)

ANSWERS_KEPT = 1024
ORPHANS_GRACE_S = 1.0
END_MARGIN_S = 1.0
LEFT_TO_KERNEL_S = 0.5
# Seconds between looks after a start, in which most daemons are made: who saw them come knows whose they are.
EARLY_LOOKS_S = (0.3, 1.2, 2.5)


class Supervisor:
    """Starts, stops and knows the workers of a node."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._workers: dict[str, Worker | Guest] = {}
        self._answers: dict[str, asyncio.Task[list[WorkerView]]] = {}
        self._seen: dict[str, frozenset[Identity]] = {}
        self._last_pid = b""
        self._late: set[asyncio.Task[None]] = set()
        self._early: list[float] = []
        self._looking: asyncio.TimerHandle | None = None
        self._end: asyncio.Task[EndReport] | None = None
        self._budget_ends = float("inf")
        self._loop = asyncio.get_running_loop()

    def changed(self, view: WorkerView) -> None:
        """How one of them stands has changed: those who live in its process follow it."""
        for worker in list(self._workers.values()):
            if isinstance(worker, Guest) and worker.order.target == view.worker:
                worker.host_changed(view)

    def _view(self, name: str) -> WorkerView | None:
        worker = self._workers.get(name)
        return worker.view if worker else None

    def views(self) -> list[WorkerView]:
        """How every worker stands."""
        return [worker.view for worker in self._workers.values()]

    @property
    def over(self) -> bool:
        """Whether the node's work has been ended."""
        return self._end is not None and self._end.done()

    def freeze(self) -> None:
        """The node is about to end: nothing is started, or started again, any more."""
        self._site.closing = True
        for worker in self._workers.values():
            worker.call_off()

    # --- start

    async def start(self, order: StartOrder) -> list[WorkerView]:
        """Start all of these workers, or none; the same answer for a request that was asked before.

        Raises Refused; its detail is then a view of each worker of the order, the ones at fault first.
        """
        task = self._answers.get(order.request_id)
        if task is None:
            # The names are taken before anything is awaited: a stop that comes next finds whom it means.
            workers = self._take_in(order.orders)
            task = self._answers[order.request_id] = asyncio.ensure_future(self._start(workers))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            while len(self._answers) > ANSWERS_KEPT:
                del self._answers[next(iter(self._answers))]
        return await asyncio.shield(task)

    def _take_in(self, orders: list[Order]) -> list[Worker | Guest]:
        self._refuse(orders)
        workers = [
            Guest(order, self._site, self._view) if order.shared else Worker(order, self._site) for order in orders
        ]
        self._workers.update({worker.name: worker for worker in workers})
        return workers

    async def _start(self, workers: list[Worker | Guest]) -> list[WorkerView]:
        failed: dict[str, StartFailed] = {}
        for worker in workers:
            try:
                worker.prepare()
            except StartFailed as failure:
                failed[worker.name] = failure
        if not failed and (processes := [worker for worker in workers if isinstance(worker, Worker)]):
            failed = await self._launch(processes)
        if failed:
            await self._roll_back(workers, failed)
        for worker in workers:
            if isinstance(worker, Guest):
                worker.begin(told=True)
        for worker in workers:
            await worker.words_read()
        return [worker.view for worker in workers]

    async def _launch(self, workers: list[Worker]) -> dict[str, StartFailed]:
        """Have the starter start them; why each of those failed that did."""
        launches = [worker.launch() for worker in workers]

        def over() -> None:
            for worker in workers:
                worker.launched(told=True)  # by the answer to this order

        done = self._site.starter.start(launches, over)
        await asyncio.wait([done], timeout=LAUNCH_TIMEOUT_S)
        if not done.done():
            undoing = asyncio.ensure_future(self._undo_late(workers, done))
            self._late.add(undoing)
            undoing.add_done_callback(self._late.discard)
            why = StartFailed(f"not started within {LAUNCH_TIMEOUT_S:g} s: a file system hangs")
            return dict.fromkeys((worker.name for worker in workers), why)
        self.reap()
        self._look_soon()
        return {worker.name: worker.start_failure for worker in workers if worker.start_failure}

    async def _undo_late(self, workers: list[Worker], done: asyncio.Future[None]) -> None:
        """A start that was given up is over after all: nothing of it stays."""
        for worker in workers:
            worker.call_off()
        await done
        self.reap()
        await self._stop_and_forget(workers)

    async def _stop_and_forget(self, workers: Sequence[Worker | Guest]) -> None:
        await asyncio.gather(*(worker.stop() for worker in workers if worker.live))
        for worker in workers:
            self._workers.pop(worker.name, None)
            worker.discard()

    def _refuse(self, orders: list[Order]) -> None:
        if self._site.closing:
            raise Refused(f"node {self._site.node.name} is ending: nothing can be started there", "stopping")
        wanted = [order.worker for order in orders]
        for name in wanted:
            known = self._workers.get(name)
            if wanted.count(name) > 1 or (known is not None and known.held):
                raise Refused(f"worker {name} runs already on node {self._site.node.name}", "in_use")

    async def _roll_back(self, workers: Sequence[Worker | Guest], failed: dict[str, StartFailed]) -> None:
        """Stop those that did start, free all the names, and say why."""
        await self._stop_and_forget([worker for worker in workers if not worker.in_hand])
        culprits = ", ".join(failed)
        views: list[WorkerView] = []
        for worker in workers:
            if worker.name in failed:
                why = failed[worker.name]
                views.insert(0, worker.never_started(WorkerState.FAILED, str(why), why.status))
            else:
                views.append(worker.never_started(WorkerState.STOPPED, f"not started, for {culprits} could not be"))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(failed.items())[:3])
        log.warning("start refused: %s", reasons)
        raise Refused(reasons, "stopping" if self._site.closing else "start_failed", views)

    # --- stop, signal, ports

    async def stop(self, order: StopOrder) -> list[StopResult]:
        """Stop these workers side by side; one that is not there is stopped already."""
        return list(await asyncio.gather(*(self._stop(name, order) for name in dict.fromkeys(order.workers))))

    async def _stop(self, name: str, order: StopOrder) -> StopResult:
        worker = self._workers.get(name)
        if worker is None:
            return StopResult(worker=name)
        result = await worker.stop(order.grace)
        if order.forget and not result.survivors and self._workers.get(name) is worker:
            del self._workers[name]
        return result

    def signal(self, order: SignalOrder) -> list[str]:
        """Signal these workers' own processes; the names of those that had one."""
        try:
            number = signal_number(order.signal)
        except ValueError as error:
            raise Refused(str(error), "malformed") from None
        return [name for name in order.workers if (worker := self._workers.get(name)) and worker.signal(number)]

    def pass_on(self, number: int) -> None:
        """Hand a signal that was sent to the whole job to those workers that have a handler for it."""
        for worker in self._workers.values():
            if worker.catches(number):
                worker.signal(number)

    def reserve(self, order: ReserveOrder) -> list[int]:
        """Reserve ports; a worker's go when it ends, others with the agent."""
        found = self._site.ports.reserve(order.owner, order.count)
        if (worker := self._workers.get(order.owner)) is not None:
            worker.view.ports = self._site.ports.owned(order.owner)
            self._site.tell(worker.view)
        return found

    # --- what happens by itself

    def reap(self) -> None:
        """Take note of every child that has ended: a worker's own process, or an orphan that fell to us."""
        for ended in self._ended():
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            name = self._site.trees.reaped(ended.si_pid)
            if name is not None and (worker := self._workers.get(name)) is not None:
                worker.exited(code)

    def _ended(self) -> Iterator[os.waitid_result]:
        """Reap children. While the starter is at work, only those of which it is known whose they are."""
        pids = self._site.trees.leaders if self._site.starter.busy else None
        for kind, pid in [(os.P_PID, pid) for pid in pids] if pids is not None else itertools.repeat((os.P_ALL, 0)):
            try:
                ended = os.waitid(kind, pid, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                ended = None
            if ended is not None:
                yield ended
            elif pids is None:
                return

    def _look_soon(self) -> None:
        """Look at the trees early, however many starts there are: a look costs as much as ten of them."""
        self._early = list(EARLY_LOOKS_S[1:])
        if self._looking is None:
            self._looking = self._loop.call_later(EARLY_LOOKS_S[0], self._early_look)

    def _early_look(self) -> None:
        self.heartbeat()
        self._looking = self._loop.call_later(self._early.pop(0), self._early_look) if self._early else None

    def heartbeat(self) -> None:
        """Note what is new below the workers, in the journal, and what they have in shared memory."""
        self._loop.run_in_executor(None, self._site.memory.look)
        last_pid = _last_pid()
        if last_pid == self._last_pid:
            return  # no process was born on this machine since the last look
        self._last_pid = last_pid
        found = {worker: frozenset(below) for worker, below in self._site.trees.survey().items()}
        new = {worker: below - self._seen.get(worker, frozenset()) for worker, below in found.items()}
        self._seen = found
        records = [
            journal.Seen(worker=worker, processes=sorted((one.pid, one.start_time) for one in below))
            for worker, below in new.items()
            if below
        ]
        if records:
            self._site.starter.note(*records)

    # --- the end

    async def end(self, budget: float | None = None) -> EndReport:
        """Stop everything within ``budget`` seconds (None: as each worker's grace asks).

        A second call may only shorten the first; both have the same answer.
        """
        self.freeze()
        if budget is not None:
            self._budget_ends = min(self._budget_ends, self._loop.time() + budget)
        if self._end is None:
            self._end = asyncio.ensure_future(self._stop_all())
        elif budget is not None:
            await asyncio.gather(*(self._stop_in_time(worker) for worker in list(self._workers.values())))
        return await asyncio.shield(self._end)

    async def _stop_all(self) -> EndReport:
        workers = list(self._workers.values())
        log.info("ending: %d workers to stop", sum(worker.live for worker in workers))
        was_live = [worker for worker in workers if worker.live]
        results = await asyncio.gather(*(self._stop_in_time(worker) for worker in was_live))
        if any(result.survivors for result in results) and await self._end_inside():
            for result in results:
                result.survivors = []
            for worker in workers:
                worker.ended_after_all()
        survivors = [line for result in results for line in result.survivors]
        survivors += [line for line in await self._sweep() if line not in survivors]
        if survivors and await self._end_inside():
            survivors = [process.describe(one) for one in self._anything(self._loop.time())]
        for line in survivors:
            log.error("still alive: %s", line)
        return EndReport(survivors=survivors, results=list(results))

    async def _end_inside(self) -> bool:
        """Have the kernel end all that was started here, where it can; whether it has."""
        return self._site.end_inside is not None and await self._site.end_inside()

    @property
    def _bound(self) -> float:
        """Seconds in which SIGKILL is to end what runs; where there is a namespace, the kernel ends the rest of it."""
        return KILL_BOUND_S if self._site.end_inside is None else LEFT_TO_KERNEL_S

    def _rest(self) -> float:
        return self._budget_ends - self._loop.time()

    async def _stop_in_time(self, worker: Worker | Guest) -> StopResult:
        rest = self._rest()
        if rest == float("inf"):
            return await worker.stop(worker.order.stop.grace, self._bound)  # a stop with a longer one may be under way
        margin = min(END_MARGIN_S, rest / 3)
        grace = max(0.0, min(worker.order.stop.grace, rest - margin))
        # A busy machine takes a while to take apart what was killed: no survivor, where there is time to wait.
        return await worker.stop(grace, min(self._bound, max(0.5, margin, rest - grace - END_MARGIN_S)))

    async def _sweep(self) -> list[str]:
        """End what is nobody's: orphans without a tag below us, and what carries our tag elsewhere."""
        grace = max(0.0, min(ORPHANS_GRACE_S, self._rest() / 3))
        rest = Stopping(self._anything, leader=None, signum=signal.SIGTERM, grace=grace)
        rest.hasten(grace, max(0.5, min(self._bound, self._rest())))
        outcome = await rest.run()
        return outcome.survivors

    def _anything(self, newer_than: float) -> list[Identity]:
        self.reap()
        found = dict.fromkeys(self._site.trees.everything(newer_than))
        node, kin = self._site.node, process.ancestors(os.getpid()) | self._site.trees.keepers
        job_id = node.environment.get("SLURM_JOB_ID")
        for one in process.walk_tagged(node.run_id, node.name, job_id=job_id):
            if one.pid not in kin and process.alive(one):
                found.setdefault(one)
        return list(found)


def _last_pid() -> bytes:
    """The PID that was given out last on this machine."""
    with contextlib.suppress(OSError):
        return Path("/proc/loadavg").read_bytes().split()[-1]
    return os.urandom(8)
