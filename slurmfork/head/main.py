"""The head's main: brings listeners, launcher, agents, plan and workers up in that order, then sees the run end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from slurmfork import credentials, logbook, names, prctl
from slurmfork.errors import PlanError, Refused, RunDirError, SlurmforkError
from slurmfork.head import addresses, isolation, scheduler
from slurmfork.head.absentees import BatchLog
from slurmfork.head.api import Api
from slurmfork.head.ending import Ending, Verdict
from slurmfork.head.launcher import Launcher
from slurmfork.head.members import Members, listen
from slurmfork.head.preflight import preflight
from slurmfork.head.server import serve
from slurmfork.head.sweeper import Sweeper
from slurmfork.head.table import Table
from slurmfork.head.workers import Workers
from slurmfork.messages import CancelReply, CancelRequest, NodeView, WorkerView
from slurmfork.names import LIVE_STATES, RunState
from slurmfork.orders import ApiAnswer, ApiCall, Going
from slurmfork.plan import Node, plan, request
from slurmfork.process import boot_id, identify
from slurmfork.rundir import EndRecord, HeadRecord, RunDir, RunRecord
from slurmfork.spec import Spec
from slurmfork.spec.shape import shares_of

log = logging.getLogger("slurmfork.head")

JOIN_TIMEOUT = 600.0  # nodes of cloud clusters boot for minutes
KILL_WAIT = 30.0  # Slurm's default; what follows SIGTERM must be over before
LINGER = 10.0
LAST_PATIENCE = 2.0
LAUNCHERS_TURN = 0.3  # in which its end is heard, if it is that: agents that are about to end wait for half a second
HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Head:
    """One run's head. ``run()`` returns the exit status of the batch step."""

    def __init__(self, rundir: RunDir, launcher: list[str], sweep: list[str], parent: int = 0) -> None:
        self._rundir = rundir
        self._parent = parent
        self._argv = launcher
        self._sweeper = Sweeper(sweep, rundir)
        self._signalled = asyncio.Event()
        self._by_request = False
        record = rundir.read_record(rundir.record, RunRecord)
        spec = rundir.read_record(rundir.spec, Spec)
        if record is None or spec is None:
            raise RunDirError(f"{rundir.path} is not a run directory")
        self._record, self._spec = record, spec
        self._planned: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._bereaved: set[str] = set()  # nodes on which what the agent needs is gone

    async def run(self) -> int:
        """The whole life of the run."""
        environment = dict(os.environ)
        known = await addresses.node_addresses(environment)
        self._addresses, (api_socket, link_socket) = addresses.bind(
            known, environment, apart=self._record.backend == "ray"
        )
        credentials.make(self._rundir.credentials, self._rundir.run_id)
        self._assemble(addresses.expected_nodes(environment, request(self._spec).nodes), known)
        self._handle_signals()
        context = credentials.server_context(self._rundir.credentials)
        link_server = await listen(self._members, link_socket, context)
        self._launch(environment, link_socket)
        watch = [
            asyncio.ensure_future(self._bring_up()),
            asyncio.ensure_future(self._watch_launcher()),
            asyncio.ensure_future(self._open_api(api_socket)),
        ]
        await self._ending.decided
        watch[0].cancel()  # nothing more is started
        record = await self._ending.carry_out()
        for task in watch:
            task.cancel()
        await self._linger()
        link_server.close()
        # The loop forgets its handlers when it is closed: a signal that comes then would change the exit status.
        signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        return _exit_status(record)

    def _assemble(self, expected: int, known: dict[str, str]) -> None:
        self._table = Table(self._rundir.run_id, self._rundir)
        self._batch_log = BatchLog(self._rundir)
        self._members = Members(
            self._rundir.run_id,
            expected,
            known,
            on_join=self._joined,
            on_lost=self._lost,
            on_silence=self._silent,
            on_notice=self._noticed,
            on_api=self._worker_api,
            end_of=self._batch_log.end_of,
        )
        self._workers = Workers(
            self._spec,
            self._table,
            self._members,
            self._rundir,
            cwd=self._record.cwd,
            extra={**_secrets(self._rundir), names.ATTEMPT: str(_attempt())},
        )
        self._launcher = Launcher(self._argv)
        self._ending = Ending(
            self._table,
            self._members,
            self._workers,
            self._launcher,
            self._sweeper,
            self._rundir,
            self._spec,
        )
        self._api = Api(self._table, self._workers, self._cancel)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminated)
        loop.add_signal_handler(signal.SIGINT, self._terminated)
        loop.add_signal_handler(signal.SIGUSR1, self._warned)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        prctl.signal_at_parents_death(signal.SIGTERM)  # the batch script's end is the run's, whoever killed it
        if self._parent and os.getppid() != self._parent:
            self._terminated()  # it was killed before we asked to be told

    def _terminated(self) -> None:
        self._signalled.set()
        self._ending.told("scancel, or a signal to the batch script", _kill_wait())

    def _warned(self) -> None:
        self._table.event("run", state=str(self._table.state), message="warned that the job is about to be ended")
        self._ending.warning.given()

    def _launch(self, environment: dict[str, str], link_socket: socket.socket) -> None:
        environment[names.HEAD] = addresses.head_variable(self._addresses, link_socket)
        environment[names.RUN_ID] = self._rundir.run_id
        environment[names.RUN_DIR] = str(self._rundir.path)
        environment[names.ISOLATION] = self._spec.isolation
        if self._record.backend == "slurm" and (shares := shares_of(self._spec.slurm)):
            environment[names.SHARES] = ",".join(shares)
        if self._record.backend == "ray":  # the tag by which the sweep finds the driver, and a cluster that it starts
            environment[names.NODE] = "launcher"
        try:
            self._launcher.start(environment)
        except OSError as error:
            self._ending.decide(Verdict(RunState.FAILED, f"cannot start {self._argv[0]}: {error}", 1))

    async def _open_api(self, sock: socket.socket) -> None:
        """The HTTP server is slow to import: that is done while the agents are on their way."""
        await asyncio.get_running_loop().run_in_executor(None, __import__, "aiohttp.web")
        context = credentials.server_context(self._rundir.credentials)
        await serve(self._api, sock, context)
        own = identify(os.getpid())
        record = HeadRecord(
            addresses=self._addresses,
            port=sock.getsockname()[1],
            node=addresses.node_name(os.environ),
            pid=os.getpid(),
            boot_id=boot_id(),
            start_time=own.start_time if own else 0,
            started=time.time(),
            attempt=_attempt(),
            job_id=os.environ.get("SLURM_JOB_ID"),
        )
        self._rundir.write_record(self._rundir.head, record)

    async def _bring_up(self) -> None:
        """Agents, plan, preflight, workers: until all are up, or the run is decided to end."""
        try:
            if not await self._all_joined():
                return
            isolation.check(self._members, self._table, required=self._spec.isolation == "namespace")
            nodes = [Node(member.node, len(member.join.devices), member.join.cpus) for member in self._members.sorted()]
            placements = plan(self._spec, self._nodes(nodes))
            self._planned = [p.worker for p in placements if self._spec.roles[p.role].autostart]
            if self._spec.preflight != "off":
                await preflight(self._members, self._table, refuse=self._spec.preflight == "refuse")
            await self._workers.start_all(placements)
        except Refused as error:
            self._fail(str(error), error)
        except PlanError as error:
            notes = [f"node {view.node}: {note}" for view in self._table.nodes.values() for note in view.notes]
            self._fail("; ".join([str(error), *notes[:1]]))
        except SlurmforkError as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("the run could not be started")
            self._fail(f"fault in the head: {type(error).__name__}: {error}")
        else:
            if not self._ending.decided.done():
                self._table.set_state(RunState.READY)

    async def _all_joined(self) -> bool:
        """Wait for all agents; False, and the run is decided to fail, where one does not come."""
        absent = asyncio.ensure_future(self._batch_log.absentee(lambda node: node in self._table.nodes))
        complete = asyncio.ensure_future(self._members.complete.wait())
        # On Ray the launcher may wait in a queue, and its agents, once they are there, give up by themselves.
        patience = None if self._record.backend == "ray" else JOIN_TIMEOUT
        try:
            await asyncio.wait([absent, complete], timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if absent.done():
                self._fail(absent.result())
            elif not complete.done():
                missing = self._members.expected - len(self._table.nodes)
                self._fail(f"{missing} of {self._members.expected} agents did not join within {JOIN_TIMEOUT:.0f} s")
            return complete.done() and not absent.done()
        finally:
            absent.cancel()
            complete.cancel()

    def _nodes(self, nodes: list[Node]) -> list[Node]:
        """Where CPUs are shared with everything else, they limit only where the spec says how many."""
        limits = {"local": self._spec.local.cpus_per_node, "ray": self._spec.ray.cpus_per_node}
        if self._record.backend not in limits:
            return nodes
        return [Node(node.name, node.gpus, limits[self._record.backend]) for node in nodes]

    def _fail(self, reason: str, error: Refused | None = None) -> None:
        failed = [view for view in (error.detail if error and isinstance(error.detail, list) else [])]
        status = next((view.exit_status for view in failed if view.exit_status), 1)
        self._ending.decide(Verdict(RunState.FAILED, reason, status))

    async def _watch_launcher(self) -> None:
        await asyncio.shield(self._launcher.ended)
        if refusal := await self._batch_log.refusal():
            self._fail(refusal)
        words = _last_words(self._rundir, joined=self._members.complete.is_set())
        self._ending.launcher_ended(words or await self._batch_log.trouble())

    # --- what agents and clients say

    def _joined(self, view: NodeView) -> None:
        if known := self._table.nodes.get(view.node):
            view.notes = known.notes  # with what preflight found
        self._table.nodes[view.node] = view
        self._table.event("node", state="joined", node=view.node, message=view.address)

    def _lost(self, node: str) -> None:
        if not self._ending.decided.done():
            self._ending.node_lost(node)

    def _silent(self, node: str, silent: bool) -> None:
        self._table.nodes[node].silent = silent
        message = "the agent does not answer" if silent else "the agent answers again"
        log.warning("node %s: %s", node, message)
        self._table.event("node", state="silent" if silent else "joined", node=node, message=message)

    def _noticed(self, node: str, op: str, body: msgspec.Raw) -> None:
        if op == "worker":
            view = msgspec.json.decode(body, type=WorkerView)
            known = view.worker in self._table.workers
            if view.state in LIVE_STATES and (view.worker in self._workers.unwanted or not known):
                self._begin(self._workers.stop_unwanted(node, view.worker))
            elif known:
                self._table.update_worker(view)
                self._ending.worker_changed(view, self._planned)
        elif op == "going":
            going = msgspec.json.decode(body, type=Going)
            if going.lost:
                self._begin(self._bereft(node, going.reason))
            else:
                self._ending.told(f"{going.reason}, heard on node {node}", _kill_wait())
        else:
            raise Refused(f"unknown notice {op!r}", "unknown")

    async def _bereft(self, node: str, reason: str) -> None:
        """What an agent needs on its node is gone. If that is the launcher's doing, its own end says more."""
        self._bereaved.add(node)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._launcher.ended), LAUNCHERS_TURN)
            return
        everywhere = len(self._bereaved) == len(self._table.nodes) > 1
        if not self._ending.decided.done():
            self._ending.node_lost(node, reason, _kill_wait(), everywhere=everywhere)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _worker_api(self, node: str, body: msgspec.Raw) -> ApiAnswer:
        call = msgspec.json.decode(body, type=ApiCall)
        caller = f"{call.worker or 'a process'} on {node}"
        answer = await self._api.answer(call.method, call.path, call.body.encode(), caller)
        return ApiAnswer(status=answer.status, body=answer.body.decode(), headers=answer.headers)

    async def _cancel(self, asked: CancelRequest) -> CancelReply:
        self._by_request = True
        reason = "cancelled" + (f": {asked.reason}" if asked.reason else "")
        self._ending.decide(Verdict(RunState.CANCELLED, reason, None))
        record = await asyncio.shield(self._ending.done)
        return CancelReply(state=record.state, survivors=record.survivors, unverified=record.unverified)

    async def _linger(self) -> None:
        """Let replies and event streams out; after a cancel leave it to scancel to end the job, as its state tells."""
        await asyncio.sleep(0.1)
        if not self._by_request or "SLURM_JOB_ID" not in os.environ or self._signalled.is_set():
            return
        try:
            await asyncio.wait_for(self._signalled.wait(), LINGER)
        except asyncio.TimeoutError:
            await self._scancel()

    async def _scancel(self) -> None:
        await scheduler.ask("scancel", os.environ["SLURM_JOB_ID"])
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._signalled.wait(), LINGER)


def _attempt() -> int:
    """How often Slurm has started this run before."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _kill_wait() -> float:
    """Seconds between Slurm's SIGTERM and its SIGKILL, less a margin."""
    return max(2.0, float(os.environ.get(names.KILL_WAIT) or KILL_WAIT) - 2.0)


def _secrets(rundir: RunDir) -> dict[str, str]:
    try:
        data = json.loads(rundir.secrets.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunDirError(f"cannot read {rundir.secrets}: {error}") from None
    return {str(name): str(value) for name, value in data.items()}


def _last_words(rundir: RunDir, *, joined: bool) -> str:
    """What an agent's log says of its end: its guardian's word, or before it joined whatever was written last."""
    for path in sorted(rundir.agents.glob("*.log")):
        lines = path.read_text(errors="replace").strip().splitlines()
        guardians = [line.removeprefix("slurmfork: ") for line in lines if line.startswith("slurmfork: the agent on ")]
        if guardians:
            return guardians[-1]
        if lines and not joined:
            return f"{path.name}: {lines[-1][:500]}"
    return ""


def _exit_status(record: EndRecord) -> int:
    if record.state is RunState.COMPLETED:
        return 0
    return record.exit_status or 1


def main(arguments: list[str]) -> int:
    """``--run-dir DIR [--parent PID] -- LAUNCHER... [--sweep PREFIX...]``; the exit status of the run.

    ``--parent``: who started the head, without whom there is no run.
    """
    parent = 0
    if arguments[2:3] == ["--parent"] and arguments[3:4] and arguments[3].isdecimal():
        parent = int(arguments[3])
        arguments = arguments[:2] + arguments[4:]
    if len(arguments) < 4 or arguments[0] != "--run-dir" or arguments[2] != "--":
        usage = "usage: head --run-dir DIR [--parent PID] -- LAUNCHER [ARGUMENT...] [--sweep PREFIX...]"
        print(usage, file=sys.stderr)
        return 2
    end = arguments.index("--sweep") if "--sweep" in arguments else len(arguments)
    launcher, sweep = arguments[3:end], arguments[end + 1 :]
    writing = logbook.begin()
    rundir = RunDir(Path(arguments[1]))

    async def run() -> int:
        try:
            return await Head(rundir, launcher, sweep, parent).run()
        finally:
            await _give_up_the_rest()

    loop = uvloop.new_event_loop()  # its TLS takes a third of the time of asyncio's own
    try:
        return loop.run_until_complete(run())  # not uvloop.run: that waits for threads that hang with a disk
    except SlurmforkError as error:
        print(f"slurmfork head: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        loop.close()
        logbook.end(writing)


async def _give_up_the_rest() -> None:
    """Cancel what still goes on when the run is over."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=LAST_PATIENCE)
