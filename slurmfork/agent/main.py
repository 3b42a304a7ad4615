"""The agent: joins the head, does what it is told, and sees to it that nothing is left when it goes.

``main`` is called by the guardian, in the process that it forked. Everything happens in the event
loop of one thread, but for what may hang with a disk (``agent.starter``), and slow imports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import uvloop

from slurmfork import credentials, logbook, prctl
from slurmfork.agent import alarms, leftovers
from slurmfork.agent import node as nodes
from slurmfork.agent.environment import inherited
from slurmfork.agent.namespace import Namespace
from slurmfork.agent.node import Node
from slurmfork.agent.outfit import Site
from slurmfork.agent.ports import Ports
from slurmfork.agent.preflight import preflight
from slurmfork.agent.server import Server
from slurmfork.agent.starter import Starter
from slurmfork.agent.stopping import KILL_BOUND_S, Watch
from slurmfork.agent.supervisor import Supervisor
from slurmfork.agent.tree import Trees
from slurmfork.agent.uplink import Uplink
from slurmfork.errors import Refused, SlurmforkError
from slurmfork.journal import Note
from slurmfork.messages import WorkerView
from slurmfork.orders import (
    ApiAnswer,
    ApiCall,
    EndOrder,
    EndReport,
    Finding,
    Going,
    Join,
    ReserveOrder,
    SignalOrder,
    StartOrder,
    StopOrder,
    Welcome,
)
from slurmfork.process import alive, boot_id
from slurmfork.scratch import Scratch, remove
from slurmfork.shm import SharedMemory
from slurmfork.version import __version__

log = logging.getLogger("slurmfork.agent")

FIRST_JOIN_S = 60.0
HEADS_TURN_S = 0.5  # the head, told of a signal, sends the end to all nodes: that is worth a moment
KILL_MARGIN_S = 1.5  # before Slurm's SIGKILL; half a second later the guardian loses patience
LEAST_BUDGET_S = 2.0
FILES = 65_536


class Agent:
    """One node's agent. ``run()`` returns its exit status when the node's work is over."""

    def __init__(self, node: Node, guardian_pid: int, namespace: Namespace | None, no_namespace: str) -> None:
        self._node = node
        self._namespace = namespace
        self._no_namespace = no_namespace
        self._guardian_pid = guardian_pid
        self._loop = asyncio.get_running_loop()
        self._scratch = Scratch(node.run_id, node.name)
        cluster, job_id = (node.environment.get(name, "") for name in ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID"))
        self._scratch.mark((cluster, job_id), node.rundir.path, node.name)
        self._site = Site(
            node=node,
            base=inherited(node.environment),
            trees=_trees(node.run_id, self._loop.time, namespace),
            starter=Starter(node.rundir.journal(node.name), namespace),
            ports=Ports(self._scratch.ports),
            scratch=self._scratch,
            memory=SharedMemory(node.run_id),
            tell=self._changed,
            reap=lambda: self._supervisor.reap(),
            end_inside=self._end_inside if namespace else None,
        )
        self._supervisor = Supervisor(self._site)
        self._uplink = Uplink(
            node.heads,
            credentials.agent_context(node.rundir.credentials),
            credentials.server_name(node.run_id),
            join=self._join,
            handler=self._serve,
        )
        self._server = Server(
            self._scratch.socket,
            ask=self._ask_head,
            worker_of=self._site.trees.owner_of,
            health=self._health,
        )
        self._ops: dict[str, Callable[[msgspec.Raw], Awaitable[Any]]] = {
            "preflight": lambda body: preflight(node, self._site.starter, lambda: self._uplink.ahead, self._sweep()),
            "start": lambda body: self._supervisor.start(_read(body, StartOrder)),
            "stop": lambda body: self._supervisor.stop(_read(body, StopOrder)),
            "end": lambda body: self._end_by_order(_read(body, EndOrder)),
            "signal": lambda body: _now(self._supervisor.signal(_read(body, SignalOrder))),
            "reserve": lambda body: _now(self._supervisor.reserve(_read(body, ReserveOrder))),
            "views": lambda body: _now(self._supervisor.views()),
            "ping": lambda body: _now(None),
        }
        self._over: asyncio.Future[int] = self._loop.create_future()
        self._told_at: float | None = None
        self._ordered = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """From the first word with the head to the last."""
        alarms.listen(self._guardian_pid, self._told, pass_on=self._supervisor.pass_on, reap=self._supervisor.reap)
        alarms.watch_guardian(self._guardian_pid, self._told)
        if self._namespace is not None:
            alarms.watch_init(self._namespace.init.pid, self._init_is_gone)
        note = f"agent {__version__} of node {self._node.name} begins, pid {os.getpid()}"
        self._site.starter.note(Note(text=note))
        self._server.open()
        self._begin(self._stay_joined())
        status = await self._over
        await self._leave()
        return status

    def _begin(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except SlurmforkError as error:
                log.error("%s", error)
                await self._end_alone(1)
            except Exception:
                log.exception("fault in the agent: stopping everything")
                await self._end_alone(1)

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _leave(self) -> None:
        await self._server.close()
        await self._uplink.close(2.0)
        await self._site.starter.close(2.0)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._loop.run_in_executor(None, self._tidy), 5.0)

    def _tidy(self) -> None:
        """Remove what this node's part of the run has left outside of the run directory."""
        remove(self._scratch.path)
        if gone := self._site.memory.remove():
            log.info("removed from /dev/shm: %s", ", ".join(gone))

    # --- the head

    async def _stay_joined(self) -> None:
        welcome = self._welcomed(await self._uplink.connect(FIRST_JOIN_S))
        self._heartbeat(welcome.heartbeat)
        while not self._over.done():
            await self._uplink.lost()
            if self._over.done() or self._supervisor.over:
                return
            log.warning("the head is lost: trying for %g s to find it again", welcome.lease)
            welcome = self._welcomed(await self._uplink.connect(welcome.lease))

    def _welcomed(self, welcome: Welcome) -> Welcome:
        if welcome.run_id != self._node.run_id:
            raise Refused(f"the head is of run {welcome.run_id}, this agent of {self._node.run_id}", "conflict")
        self._site.address = welcome.address if _is_local(welcome.address) else self._site.address
        for view in self._supervisor.views():
            self._uplink.tell("worker", view)
        return welcome

    def _join(self, address: str) -> Join:
        self._site.address = self._site.address or address
        return Join(
            node=self._node.name,
            hostname=socket.gethostname(),
            address=address,
            devices=list(self._node.devices),
            cpus=self._node.cpus,
            agent_pid=os.getpid(),
            guardian_pid=self._guardian_pid,
            boot_id=boot_id(),
            guarantee="namespace" if self._namespace else self._node.guarantee,
            no_namespace=self._no_namespace,
            version=__version__,
            notes=list(self._node.notes),
        )

    def _changed(self, view: WorkerView) -> None:
        self._uplink.tell("worker", view)
        self._supervisor.changed(view)

    def _sweep(self) -> Callable[[str], list[Finding]]:
        """How what other runs left here is looked for: outside, where this process itself is not."""
        outside = self._namespace.outside if self._namespace else None
        return outside.sweep if outside else leftovers.sweep

    async def _serve(self, op: str, body: msgspec.Raw) -> Any:
        if op not in self._ops:
            raise Refused(f"this agent does not know {op!r}", "unknown")
        return await self._ops[op](body)

    async def _ask_head(self, call: ApiCall) -> ApiAnswer:
        return await self._uplink.ask("api", call, ApiAnswer)

    def _health(self) -> dict[str, Any]:
        return {
            "ok": True,
            "run_id": self._node.run_id,
            "node": self._node.name,
            "head": self._uplink.up,
            "workers": len(self._supervisor.views()),
            "time": time.time(),
        }

    def _heartbeat(self, interval: float) -> None:
        """Look at the trees now and then; each look is planned after the last, so that none pile up."""
        try:
            self._supervisor.heartbeat()
        except Exception:
            log.exception("the workers' trees could not be looked at")
        self._loop.call_later(interval, self._heartbeat, interval)

    # --- the end

    def _told(self, reason: str, status: int, lost: bool) -> None:
        """Told to end, not by the head. A second time means no more than the first."""
        if self._told_at is not None:
            log.info("told again: %s", reason)
            return
        log.warning("told to end: %s", reason)
        self._told_at = self._loop.time()
        self._supervisor.freeze()
        self._uplink.tell("going", Going(reason=reason, lost=lost))
        self._begin(self._await_order(status))

    def _init_is_gone(self, reason: str, status: int, lost: bool) -> None:
        if self._namespace is not None and not self._namespace.killed:
            self._told(reason, status, lost)

    async def _end_inside(self) -> bool:
        """Have the kernel end all that is in the namespace; whether it has."""
        assert self._namespace is not None
        self._namespace.kill()
        watch, deadline = Watch(), self._loop.time() + KILL_BOUND_S
        try:
            if watch.add(self._namespace.init):
                await watch.quiet(lambda: deadline)
        finally:
            watch.close()
        return not alive(self._namespace.init)

    async def _await_order(self, status: int) -> None:
        if self._uplink.up:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ordered.wait(), HEADS_TURN_S)
        if self._ordered.is_set():
            await self._supervisor.end(self._budget())  # what was ordered before knew of no limit
        else:
            await self._end_alone(status)

    def _budget(self) -> float | None:
        """Seconds that are left of what Slurm gives us; None while nobody told us to end."""
        if self._told_at is None:
            return None
        whole = max(LEAST_BUDGET_S, self._node.kill_wait - KILL_MARGIN_S)
        return max(0.0, self._told_at + whole - self._loop.time())

    async def _end_by_order(self, order: EndOrder) -> EndReport:
        log.info("the head orders the end%s", "" if order.budget is None else f", within {order.budget:g} s")
        self._ordered.set()
        limits = [limit for limit in (order.budget, self._budget()) if limit is not None]
        report = await self._supervisor.end(min(limits, default=None))
        self._finish(1 if report.survivors else 0)  # the answer is sent before anybody else's turn comes
        return report

    async def _end_alone(self, status: int) -> None:
        """End the node's work without an order: within the budget that a signal would have given."""
        self._told_at = self._told_at or self._loop.time()
        await self._supervisor.end(self._budget())
        self._finish(status)

    def _finish(self, status: int) -> None:
        if not self._over.done():
            self._over.set_result(status)


def _trees(run_id: str, clock: Callable[[], float], namespace: Namespace | None) -> Trees:
    if namespace is None:
        return Trees(run_id, clock)
    return Trees(run_id, clock, namespace.init.pid, namespace.keepers)


def _read(body: msgspec.Raw, kind: type[Any]) -> Any:
    return msgspec.json.decode(body, type=kind)


async def _now(value: Any) -> Any:
    return value


def _is_local(address: str) -> bool:
    """Whether an address is one of this machine's own."""
    if not address:
        return False
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _raise_file_limit() -> None:
    """Login nodes hand their low limits down; a node full of workers needs more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(guardian_pid: int, namespace: Namespace | None = None, no_namespace: str = "") -> int:
    """Be the agent; returns the exit status. If it dies instead, the guardian does the rest.

    ``no_namespace``: why there is no namespace, where one was asked for.
    """
    writing = logbook.begin()
    loop = uvloop.new_event_loop()  # its TLS takes a third of the time of asyncio's own
    try:
        prctl.become_subreaper()
        _raise_file_limit()
        node = nodes.here(os.environ)
        log.info("agent of node %s, run %s, pid %d", node.name, node.run_id, os.getpid())
        return loop.run_until_complete(_run(node, guardian_pid, namespace, no_namespace))
    except (SlurmforkError, OSError) as error:
        log.error("%s", error)
        return 1
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a child that ends now is nobody's news: the loop is gone
        loop.close()
        logbook.end(writing)
        if namespace is not None:
            namespace.end()


async def _run(node: Node, guardian_pid: int, namespace: Namespace | None, no_namespace: str) -> int:
    return await Agent(node, guardian_pid, namespace, no_namespace).run()
