"""One worker: its process, its readiness, its restarts and its end. Always in exactly one of the states of ``names``.

Told from outside what to do (``prepare``, ``launch``, ``stop``) and what happened (``exited``); it tells every change.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slurmfork import journal
from slurmfork.agent import environment, readiness
from slurmfork.agent.command import BadCommand, arguments
from slurmfork.agent.ledger import Ledger
from slurmfork.agent.node import Node
from slurmfork.agent.ports import Ports
from slurmfork.agent.scratch import Scratch, remove
from slurmfork.agent.spawn import StartFailed, open_log, spawn
from slurmfork.agent.stopping import KILL_BOUND_S, Outcome, Stopping
from slurmfork.agent.tree import Trees
from slurmfork.errors import Refused, RunDirError
from slurmfork.messages import Order, StopResult, WorkerView
from slurmfork.names import LIVE_STATES, UP_STATES, WorkerState
from slurmfork.process import Identity, send

log = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 60.0
TAIL_LINES = 20
TAIL_BYTES = 4096
REAP_TIMEOUT_S = 1.0
STATUS_INTERVAL_S = 0.25


@dataclass
class Site:
    """What all workers of a node share.

    ``tell`` sends a view to the head, ``reap`` has those hear of it whose processes have ended, ``address`` is the
    node's own. ``closing``: nothing is started any more.
    """

    node: Node
    base: Mapping[str, str]
    trees: Trees
    ledger: Ledger
    ports: Ports
    scratch: Scratch
    tell: Callable[[WorkerView], None]
    reap: Callable[[], None]
    address: str = ""
    closing: bool = False


class Worker:
    """One worker of this node; ``view`` is how it stands."""

    def __init__(self, order: Order, site: Site) -> None:
        role, _, index = order.worker.partition("/")
        self.order = order
        self.view = WorkerView(
            worker=order.worker,
            role=role,
            index=int(index),
            node=site.node.name,
            target=order.target,
            rank=order.rank,
            log=str(site.node.rundir.worker_log(role, int(index))),
        )
        self._site = site
        self._loop = asyncio.get_running_loop()
        self._wanted = True
        self._stopped = False
        self._starts = 0
        self._start_id = ""
        self._argv: list[str] = []
        self._environment: dict[str, str] = {}
        self._log_begin = 0
        self._notify: readiness.Notify | None = None
        self._leader: Identity | None = None
        self._reaped = asyncio.Event()
        self._unwanted = asyncio.Event()
        self._checking: asyncio.Task[None] | None = None
        self._stopping: Stopping | None = None
        self._winding_up: asyncio.Task[None] | None = None
        self._outcome = Outcome()
        self._status_due: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return self.order.worker

    @property
    def live(self) -> bool:
        """Whether it has a process, or will have, or something of it is still being stopped."""
        return self.view.state in LIVE_STATES or self._winding_up is not None

    @property
    def held(self) -> bool:
        """Whether its name is taken: it lives, or is about to be started."""
        return self.live or self.view.state is WorkerState.PENDING

    @property
    def running(self) -> bool:
        """Whether it has a process of its own at this moment."""
        return self._leader is not None

    # --- start

    def prepare(self) -> None:
        """Lay out all that a start needs and the node can refuse; raises StartFailed. ``discard`` undoes it."""
        site, order = self._site, self.order
        try:
            self.view.gpus = environment.slice_of(site.node.devices, order.devices)
            if order.ports:
                self.view.ports = site.ports.reserve(order.worker, order.ports)
            signal_number(order.stop.signal)
            if order.ready and order.ready.notify:
                self._notify = readiness.Notify(site.scratch.notify(order.worker), self._said)
            self._environment = environment.of_worker(
                site.node,
                order,
                base=site.base,
                ports=self.view.ports,
                socket=site.scratch.socket,
                scratch=site.scratch.worker(order.worker),
                notify=self._notify.path if self._notify else None,
            )
            self._argv = arguments(order.command, self._values(), self._environment)
        except (ValueError, BadCommand, Refused, RunDirError) as error:
            raise StartFailed(str(error)) from None
        except OSError as error:
            raise StartFailed(f"{error.filename}: {error.strerror}") from None
        self._next_start()

    def _values(self) -> dict[str, str]:
        """What the placeholders of the command stand for."""
        ports = [str(port) for port in self.view.ports]
        return {
            "index": str(self.view.index),
            "rank": str(self.order.rank),
            "role": self.view.role,
            "worker": self.name,
            "node": self._site.node.name,
            "run_id": self._site.node.run_id,
            "run_dir": str(self._site.node.rundir.path),
            **({"port": ports[0], "ports": ",".join(ports)} if ports else {}),
        }

    def _next_start(self) -> None:
        self._starts += 1
        self._start_id = f"{os.getpid()}.{self.name}.{self._starts}"

    def intent(self) -> journal.Intent:
        """What the journal says before a start."""
        return journal.Intent(start_id=self._start_id, worker=self.name, argv=self._argv)

    def started(self) -> journal.Started:
        """What the journal says after it."""
        assert self._leader is not None
        pid, start_time, boot_id = self._leader
        return journal.Started(
            start_id=self._start_id,
            worker=self.name,
            pid=pid,
            start_time=start_time,
            boot_id=boot_id,
            uid=os.geteuid(),
            argv=self._argv,
        )

    def launch(self) -> None:
        """Start the process; raises StartFailed."""
        if not self._wanted or self._site.closing:
            raise StartFailed("stopped before it was started")
        self._reaped.clear()
        descriptor = open_log(Path(self.view.log or ""))
        try:
            self._log_begin = os.fstat(descriptor).st_size
            if self._notify:
                self._notify.forget()
            self._leader = spawn(
                self._argv, cwd=self.order.cwd, environment=self._environment, log=descriptor
            )
        finally:
            os.close(descriptor)
        self._site.trees.enter(self.name, self._leader, self.view.log or "")
        self.view.pid, self.view.started = self._leader.pid, time.time()
        self.view.ready = self.view.ended = self.view.exit_status = None
        self.view.log_tail = ""
        log.info("%s started: pid %d", self.name, self._leader.pid)
        if self.order.ready is None:
            self._become(WorkerState.RUNNING)
        else:
            self._become(WorkerState.STARTING)
            self._checking = asyncio.ensure_future(self._await_ready())

    async def _await_ready(self) -> None:
        assert self.order.ready is not None
        try:
            await readiness.until_ready(
                self.order.ready,
                notify=self._notify,
                port=self.view.ports[0] if self.view.ports else None,
                hosts=readiness.probe_hosts(self._site.address),
            )
        except readiness.NotReady as error:
            self._checking = None
            self._fall(str(error))
        else:
            self._checking = None
            self.view.ready = time.time()
            self._become(WorkerState.READY, self.view.reason)

    def _said(self, status: str) -> None:
        """A STATUS line of the worker; told in its time, however often it changes."""
        if self.view.state in (*UP_STATES, WorkerState.STARTING) and status != self.view.reason:
            self.view.reason = status
            if self._status_due is None:
                self._status_due = self._loop.call_later(STATUS_INTERVAL_S, self._tell_status)

    def _tell_status(self) -> None:
        self._status_due = None
        self._site.tell(self.view)

    def _become(self, state: WorkerState, reason: str = "") -> None:
        if (state, reason) != (self.view.state, self.view.reason):
            log.info("%s is %s%s", self.name, state, f": {reason}" if reason else "")
        self.view.state, self.view.reason = state, reason
        self._site.tell(self.view)

    # --- end

    def exited(self, code: int) -> None:
        """Its process has ended and was reaped; ``code`` as ``os.waitstatus_to_exitcode`` has it."""
        assert self._leader is not None
        self.view.exit_status = code if code >= 0 else 128 - code
        self.view.ended = time.time()
        self.view.pid = None
        self._site.ledger.later(
            journal.Ended(
                start_id=self._start_id,
                worker=self.name,
                pid=self._leader.pid,
                exit_status=self.view.exit_status,
            )
        )
        log.info("%s ended: %s", self.name, _in_words(code))
        self._leader = None
        self._reaped.set()
        if self._winding_up is None:
            self._fall(_in_words(code), well=code == 0)
        elif not self._stopped:
            self._site.tell(self.view)  # its state was settled before, its exit status was not known

    def _fall(self, reason: str, *, well: bool = False) -> None:
        """It ended, or is not what it should be: settle what is to become of it, say so, clean up behind it."""
        if well and self.view.state is WorkerState.STARTING:
            well, reason = False, "exited with 0 before it was ready"
        self._stop_checking()
        pause = self._pause_before_restart(well=well)
        if not well:
            self.view.log_tail = _tail(self.view.log, self._log_begin)
        self._begin_winding_up(pause)
        if pause is not None:
            count = f"restart {self.view.restarts + 1} of {self.order.restart.max} in {pause:g} s"
            self._become(WorkerState.RESTARTING, f"{reason}; {count}")
        else:
            self._become(WorkerState.EXITED if well else WorkerState.FAILED, "" if well else reason)

    def _stop_checking(self) -> None:
        if self._checking is not None:
            self._checking.cancel()
            self._checking = None
        if self._status_due is not None:
            self._status_due.cancel()
            self._status_due = None

    def _pause_before_restart(self, *, well: bool) -> float | None:
        """Seconds until it is started again; None: it is not."""
        restart = self.order.restart
        asked = restart.policy == "always" or (restart.policy == "on-failure" and not well)
        if not asked or not self._wanted or self._site.closing or self.view.restarts >= restart.max:
            return None
        return min(restart.backoff * 2.0**self.view.restarts, LONGEST_BACKOFF_S)

    def _begin_winding_up(self, pause: float | None, grace: float | None = None) -> None:
        self._winding_up = asyncio.ensure_future(self._wind_up(pause, grace))
        self._winding_up.add_done_callback(_log_fault)

    async def _wind_up(self, pause: float | None, grace: float | None) -> None:
        """Stop what there is of it; then start it again after ``pause`` seconds, or let go of all that it held."""
        again = self._loop.time() + (pause or 0.0)
        stop = self.order.stop
        self._stopping = Stopping(
            self._look,
            leader=self._leader,
            signum=signal_number(stop.signal),
            grace=stop.grace if grace is None else grace,
        )
        self._outcome = await self._stopping.run()
        if self._leader is not None and not self._outcome.survivors:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._reaped.wait(), REAP_TIMEOUT_S)
        self._stopping = None
        if pause is not None and not self._outcome.survivors and await self._relaunch(again):
            return
        self._let_go()

    def _look(self, newer_than: float) -> list[Identity]:
        self._site.reap()
        return self._site.trees.of(self.name, newer_than)

    async def _relaunch(self, when: float) -> bool:
        """Start it once more; False where that is not wanted any more, or impossible."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._unwanted.wait(), max(0.0, when - self._loop.time()))
        if not self._wanted or self._site.closing:
            return False
        self._next_start()
        try:
            await self._site.ledger.write(self.intent())
            self.view.restarts += 1
            self.launch()
        except OSError as error:
            self._become(WorkerState.FAILED, f"not restarted, the journal cannot be written: {error}")
            return False
        except StartFailed as error:
            if self._wanted and not self._site.closing:
                self._become(WorkerState.FAILED, str(error))
            return False
        self._winding_up = None
        self._site.ledger.later(self.started())
        return True

    def _let_go(self) -> None:
        """Nothing of it runs any more: its ports, its scratch and its socket are free."""
        if self._stopped or self.view.state is WorkerState.RESTARTING:
            killed = " (killed: it outlived its grace)" if self._outcome.killed else ""
            self._become(WorkerState.STOPPED, f"stopped{killed}")
        if self._outcome.survivors:
            log.error("%s would not die: %s", self.name, "; ".join(self._outcome.survivors))
        else:
            self._site.trees.leave(self.name)
            self.discard()
        self._winding_up = None

    def discard(self) -> None:
        """Give back what ``prepare`` took."""
        self._site.ports.release(self.name)
        if self._notify:
            self._notify.close()
        if left := self._site.scratch.set_aside(self.name):
            self._loop.run_in_executor(None, remove, left)

    async def stop(self, grace: float | None = None, bound: float = KILL_BOUND_S) -> StopResult:
        """Stop it with all that it started; returns when nothing of it is left, or would die.

        ``grace`` is in place of its own; a second stop may only shorten the first.
        """
        begun = self._loop.time()
        self._wanted = False
        self._unwanted.set()
        if self._winding_up is None and self.view.state in LIVE_STATES:
            self._stop_checking()
            self._stopped = True
            self._begin_winding_up(None, grace)
        await asyncio.sleep(0)  # let a task that was just made begin
        if self._stopping is not None and grace is not None:
            self._stopping.hasten(grace, bound)
        if self._winding_up is not None:
            await asyncio.shield(self._winding_up)
        return StopResult(
            worker=self.name,
            exit_status=self.view.exit_status,
            seconds=round(self._loop.time() - begun, 4),
            killed=self._outcome.killed,
            survivors=self._outcome.survivors,
        )

    def signal(self, signum: int) -> bool:
        """Signal the worker's own process; False if it has none."""
        return self._leader is not None and send(self._leader, signum)

    def catches(self, signum: int) -> bool:
        """Whether its process has a handler for this signal."""
        return self._leader is not None and bool(_caught(self._leader.pid) >> (signum - 1) & 1)

    def never_started(self, state: WorkerState, reason: str) -> WorkerView:
        """Its start was taken back; returns how that is to be told."""
        self.discard()
        self.view.state, self.view.reason, self.view.ended = state, reason, time.time()
        return self.view


def _log_fault(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("a worker could not be wound up", exc_info=error)


def signal_number(name: str) -> int:
    """The number of TERM, USR1, RTMIN+2 ...; raises ValueError."""
    base, _, offset = name.partition("+")
    number = getattr(signal, f"SIG{base}", None)
    if not isinstance(number, signal.Signals) or (offset and not offset.isdigit()):
        raise ValueError(f"there is no signal {name}")
    value = int(number) + int(offset or 0)
    if value not in signal.valid_signals():
        raise ValueError(f"there is no signal {name}")
    return value


def _caught(pid: int) -> int:
    """The signals that a process has handlers for, as bits."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return int(line.split()[1], 16)
    return 0


def _in_words(code: int) -> str:
    if code >= 0:
        return f"exited with {code}" + {126: " (not executable?)", 127: " (command not found?)"}.get(code, "")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _tail(path: str | None, begin: int) -> str:
    """The end of what a log holds from ``begin`` on: some lines, some bytes, whichever is less."""
    try:
        descriptor = os.open(path or "", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        end = os.fstat(descriptor).st_size
        start = max(begin if begin < end else 0, end - TAIL_BYTES) if end else 0
        data = os.pread(descriptor, TAIL_BYTES, start)
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return "\n".join(data.decode(errors="replace").splitlines()[-TAIL_LINES:])
