"""One worker: its process, its readiness, its restarts and its end; always in exactly one state.

Told from outside what to do (``prepare``, ``launch``, ``stop``) and what happened (``launched``, ``exited``); tells
each change. Between ``launch`` and ``launched`` the starter's thread has it in hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time

from slurmfork import journal
from slurmfork.agent import readiness
from slurmfork.agent.lastwords import caught, in_words, signal_number, tail
from slurmfork.agent.outfit import Outfit, Site, outfit
from slurmfork.agent.spawn import StartFailed
from slurmfork.agent.standing import Standing
from slurmfork.agent.starter import Launch
from slurmfork.agent.stopping import KILL_BOUND_S, Outcome, Stopping
from slurmfork.messages import StopResult, WorkerView
from slurmfork.names import LIVE_STATES, WorkerState
from slurmfork.orders import Order
from slurmfork.process import Identity, send
from slurmfork.scratch import remove

log = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 60.0
REAP_TIMEOUT_S = 1.0
TAIL_TIMEOUT_S = 1.0
LAUNCH_TIMEOUT_S = 60.0  # of a start, its disk and its exec included


class Worker:
    """One worker of this node; ``view`` is how it stands."""

    def __init__(self, order: Order, site: Site) -> None:
        role, _, index = order.worker.partition("/")
        self.order = order
        self.log_path = site.node.rundir.worker_log(role, int(index))
        self._standing = Standing(order, node=site.node.name, log_path=str(self.log_path), tell=site.tell)
        self.view = self._standing.view
        self._site = site
        self._loop = asyncio.get_running_loop()
        self._wanted = True
        self._stopped = False
        self._grace: float | None = None
        self._starts = 0
        self._outfit: Outfit | None = None
        self._launch: Launch | None = None
        self._in_hand: asyncio.Future[None] | None = None
        self._leader: Identity | None = None
        self._reaped = asyncio.Event()
        self._unwanted = asyncio.Event()
        self._checking: asyncio.Task[None] | None = None
        self._stopping: Stopping | None = None
        self._winding_up: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._outcome = Outcome()

    @property
    def name(self) -> str:
        return self.order.worker

    @property
    def live(self) -> bool:
        """Whether it has a process, or will have, or something of it is still being stopped."""
        return self.view.state in LIVE_STATES or self._winding_up is not None or self._in_hand is not None

    @property
    def held(self) -> bool:
        """Whether its name is taken: it lives, or is about to be started."""
        return self.live or self.view.state is WorkerState.PENDING

    @property
    def in_hand(self) -> bool:
        """Whether the starter has it in hand: there may be a process of it that is not known yet."""
        return self._in_hand is not None

    # --- start

    def prepare(self) -> None:
        """Lay out all that a start needs of this node; raises StartFailed. ``discard`` undoes it."""
        self._outfit = outfit(self.order, self._site, self._standing.said)
        self.view.gpus, self.view.ports = list(self._outfit.gpus), list(self._outfit.ports)

    def launch(self) -> Launch:
        """What the starter is to start next; what came of it is then told by ``launched``."""
        assert self._outfit is not None
        self._starts += 1
        self._in_hand = self._loop.create_future()
        self._reaped.clear()
        if self._outfit.notify:
            self._outfit.notify.forget()
        self._launch = Launch(
            start_id=f"{os.getpid()}.{self.name}.{self._starts}",
            worker=self.name,
            command=self._outfit.command,
            values=self._outfit.values,
            environment=self._outfit.environment,
            cwd=self.order.cwd,
            log=self.log_path,
            scratch=self._outfit.scratch,
            called_off=not self._wanted or self._site.closing,
        )
        return self._launch

    @property
    def start_failure(self) -> StartFailed | None:
        """Why its last start failed, if it did."""
        return self._launch.failure if self._launch else None

    def launched(self, *, told: bool = False) -> None:
        """The starter is done with it: settle what it is now. ``told``: whoever asked for it tells the head."""
        assert self._launch is not None
        if self._in_hand is not None:
            self._in_hand.set_result(None)
            self._in_hand = None
        if (leader := self._launch.leader) is not None:
            self._leader = leader
            self._site.trees.enter(self.name, leader, str(self.log_path))
            self._standing.begun(leader.pid, checked=self.order.ready is not None, told=told)
            if self.order.ready is not None:
                self._checking = asyncio.ensure_future(self._await_ready())

    def _relaunched(self) -> None:
        """As ``launched``, for one that runs again: it may end before whoever had it started hears of the start."""
        self.launched()
        if self._leader is not None:
            self._winding_up = None

    def call_off(self) -> None:
        """It is not to be started any more, should it not be yet."""
        if self._launch is not None:
            self._launch.called_off = True

    async def _await_ready(self) -> None:
        assert self.order.ready is not None
        assert self._outfit is not None
        try:
            await readiness.until_ready(
                self.order.ready,
                notify=self._outfit.notify,
                port=self.view.ports[0] if self.view.ports else None,
                hosts=readiness.probe_hosts(self._site.address),
            )
        except readiness.NotReady as error:
            self._checking = None
            self._fall(str(error))
        except Exception as error:  # a fault in the check must not leave the worker hanging between two states
            log.exception("%s: the readiness check failed", self.name)
            self._checking = None
            self._fall(f"the readiness check failed: {error}")
        else:
            self._checking = None
            self._standing.ready(self._outfit.notify.endpoints if self._outfit.notify else [])

    # --- end

    def exited(self, code: int) -> None:
        """Its process has ended and was reaped; ``code`` as ``os.waitstatus_to_exitcode`` has it."""
        assert self._leader is not None
        self._standing.ended(code if code >= 0 else 128 - code)
        assert self._launch is not None
        self._site.starter.note(
            journal.Ended(
                start_id=self._launch.start_id,
                worker=self.name,
                pid=self._leader.pid,
                exit_status=self.view.exit_status,
            )
        )
        words = in_words(code, ours=self._stopping is not None)
        log.info("%s ended: %s", self.name, words)
        self._leader = None
        self._reaped.set()
        if self._winding_up is None and self.view.state in LIVE_STATES:
            self._fall(words, well=code == 0)
        elif not self._is_telling() and (self._stopping is None or not self._stopped):
            self._standing.tell()  # its state was settled before, its exit status was not known

    def _fall(self, reason: str, *, well: bool = False) -> None:
        """It ended, or is not what it should be: settle what becomes of it, say so, clean up behind it."""
        if well and self.view.state is WorkerState.STARTING:
            well, reason = False, "exited with 0 before it was ready"
        self._stop_checking()
        pause = self._pause_before_restart(well=well)
        self._begin_winding_up(pause)
        if pause is not None:
            count = f"restart {self.view.restarts + 1} of {self.order.restart.max} in {pause:g} s"
            self._standing.become(WorkerState.RESTARTING, f"{reason}; {count}", told=not well)
        else:
            self._standing.become(
                WorkerState.EXITED if well else WorkerState.FAILED, "" if well else reason, told=not well
            )
        if not well:
            self._telling = asyncio.ensure_future(self._tell_with_last_words())

    def _is_telling(self) -> bool:
        return self._telling is not None and not self._telling.done()

    async def words_read(self) -> None:
        """Wait until its view has its last words, should it have fallen."""
        if self._telling is not None and not self._telling.done():
            await asyncio.wait([self._telling])

    async def _tell_with_last_words(self) -> None:
        """Tell the head how it fell, with the end of its log, if the disk has that in time."""
        launch = self._launch
        if launch is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                reading = self._loop.run_in_executor(None, tail, launch.log, launch.log_begin)
                words = await asyncio.wait_for(reading, TAIL_TIMEOUT_S)
                if launch is self._launch:  # else it runs again
                    self.view.log_tail = words
        self._standing.tell()

    def _stop_checking(self) -> None:
        if self._checking is not None:
            self._checking.cancel()
            self._checking = None

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
        """Stop what there is of it; then start it again after ``pause`` seconds, or let go of what it held."""
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
        if not self._outcome.survivors:
            self._site.trees.leave(self.name)
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
        await self.words_read()  # that it fell is told before that it runs again
        if not self._wanted or self._site.closing:
            return False
        self.view.restarts += 1
        launch = self.launch()
        await self._site.starter.start([launch], self._relaunched)
        if launch.leader is None:
            if launch.failure and self._wanted and not self._site.closing:
                self._standing.become(WorkerState.FAILED, f"not restarted: {launch.failure}")
            return False
        if launch.failure:
            log.error("%s runs again, but %s", self.name, launch.failure)
        if not self._wanted and self._winding_up is None and self.view.state in LIVE_STATES:
            self._begin_stop()  # it was stopped while it was being started, and has not ended meanwhile
        self._site.reap()
        return True

    def _let_go(self) -> None:
        """Nothing of it runs any more: its ports, scratch and socket are free. Survivors keep theirs."""
        survivors = self._outcome.survivors
        if self._stopped or self.view.state is WorkerState.RESTARTING:
            how = " (killed: it outlived its grace)" if self._outcome.killed and not survivors else ""
            self._standing.become(WorkerState.STOPPED, f"stopped{how}")
        if survivors:
            self._standing.become(self.view.state, f"would not die: {'; '.join(survivors)}")
        else:
            self.discard()
        self._winding_up = None

    def ended_after_all(self) -> None:
        """What would not die is gone: the kernel has ended it, with all else that was started here."""
        if self._outcome.survivors:
            self._outcome.survivors.clear()
            self._standing.become(self.view.state, "stopped (killed with the node's namespace)")
            self.discard()

    def discard(self) -> None:
        """Give back what ``prepare`` took."""
        self._site.ports.release(self.name)
        if self._outfit and self._outfit.notify:
            self._outfit.notify.close()
        if left := self._site.scratch.set_aside(self.name):
            self._loop.run_in_executor(None, remove, left)

    async def stop(self, grace: float | None = None, bound: float = KILL_BOUND_S) -> StopResult:
        """Stop it with all that it started; returns when nothing of it is left, or would die.

        ``grace`` is in place of its own; a second stop may only shorten the first.
        """
        begun = self._loop.time()
        self._wanted = False
        self._unwanted.set()
        self.call_off()
        if grace is not None:
            self._grace = grace if self._grace is None else min(grace, self._grace)
        if self._in_hand is not None:
            patience = (self.order.stop.grace if grace is None else grace) + bound
            await asyncio.wait([self._in_hand], timeout=patience)
        if self._winding_up is None and self.view.state in LIVE_STATES:
            log.info("%s: stopping", self.name)
            self._begin_stop()
        await asyncio.sleep(0)  # let a task that was just made begin
        if self._stopping is not None and grace is not None:
            self._stopping.hasten(grace, bound)
        while self._winding_up is not None and not self._winding_up.done():  # another, if it was being started again
            await asyncio.shield(self._winding_up)
        hangs = ["its start hangs, in the file system of its program, log or journal"] if self._in_hand else []
        return StopResult(
            worker=self.name,
            exit_status=self.view.exit_status,
            seconds=round(self._loop.time() - begun, 4),
            killed=self._outcome.killed,
            survivors=[*self._outcome.survivors, *hangs],
        )

    def _begin_stop(self) -> None:
        self._stop_checking()
        self._stopped = True
        self._begin_winding_up(None, self._grace)

    def signal(self, signum: int) -> bool:
        """Signal the worker's own process; False if it has none."""
        return self._leader is not None and send(self._leader, signum)

    def catches(self, signum: int) -> bool:
        """Whether its process has a handler for this signal."""
        return self._leader is not None and bool(caught(self._leader.pid) >> (signum - 1) & 1)

    def never_started(self, state: WorkerState, reason: str, status: int | None = None) -> WorkerView:
        """Its start was taken back; returns how that is to be told."""
        self.view.state, self.view.reason, self.view.ended = state, reason, time.time()
        self.view.exit_status = status
        return self.view


def _log_fault(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("a worker could not be wound up", exc_info=error)
