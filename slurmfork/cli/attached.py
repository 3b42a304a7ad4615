"""A run in the foreground: its logs on stdout, its states on stderr, and Ctrl-C as its end.

SIGTERM and SIGHUP mean the same as Ctrl-C, and so does output that nobody reads any more: whoever closes the
terminal or the pipe wants nothing left behind.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from slurmfork import hints
from slurmfork.cli import failure, logview, output, progress
from slurmfork.errors import SlurmforkError
from slurmfork.logs import Merged
from slurmfork.messages import CancelReply
from slurmfork.names import RunState
from slurmfork.run import Run

LOOK_STARTING = 1.0  # seconds between two looks at the state, while it is about to change
LOOK_READY = 5.0
ASKING = 1.0  # seconds in which a cancel has surely been asked for


class Told(BaseException):
    """A signal that ends this command."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def submit_and_follow(submit: Callable[[], Run], *, prefix: bool) -> int:
    """Submit, print the logs of the run to its end, and return the exit status for the command."""
    with _ear() as ear:
        run = submit()
        screen = _Screen(run, ear, prefix=prefix)
        try:
            ear.raise_from_now_on()
            screen.say(*run.notes, name_line(run))
            return _to_the_end(run, screen)
        except Told as told:
            _cancel(run, screen)
            return 128 + told.number


def name_line(run: Run) -> str:
    """What a run is called, by us and by the scheduler, and where it is."""
    job = f"job {run.job_id}" if run.record.backend == "slurm" else f"{run.record.backend} job {run.job_id}"
    return f"{run.run_id}  {job}  {run.rundir.path}"


class _Ear:
    """Hears the signals that end this command; until the submission is made it only remembers them."""

    def __init__(self) -> None:
        self._heard: int | None = None
        self._raises = False

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        repeated = number == signal.SIGHUP and self._heard is not None  # a terminal that closes says so more than once
        self._heard = number
        if self._raises and not repeated:
            raise Told(number)

    def raise_from_now_on(self) -> None:
        self._raises = True
        if self._heard is not None:
            raise Told(self._heard)


@contextmanager
def _ear() -> Iterator[_Ear]:
    ear = _Ear()
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
    for number in (int(signal.SIGINT), int(signal.SIGTERM), int(signal.SIGHUP)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup: stays ignored
            before[number] = signal.signal(number, ear.hear)
    try:
        yield ear
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Screen:
    """All that is shown. Should it be lost, the ear hears that as a SIGHUP, and the rest goes nowhere."""

    def __init__(self, run: Run, ear: _Ear, *, prefix: bool) -> None:
        self._ear = ear
        self._logs = Merged(run.rundir)
        self._printer = logview.Printer(prefix=prefix)

    @property
    def lines(self) -> int:
        return self._printer.lines

    def say(self, *lines: str) -> None:
        with self.watched():
            for line in lines:
                output.complain(line)

    def look(self, *, final: bool = False) -> None:
        with self.watched():
            for source, line in self._logs.new(final=final):
                self._printer.line(source, line)
            sys.stdout.buffer.flush()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """For whatever prints."""
        failed = False
        try:
            yield
        except OSError:
            failed = True
        if output.give_up_lost() or failed:
            self._ear.hear(signal.SIGHUP)


def _to_the_end(run: Run, screen: _Screen) -> int:
    shown, told = progress.Plain(), set[str]()
    due, ended = 0.0, False
    while True:
        now = time.monotonic()
        if now >= due or (not ended and run.rundir.end.exists()):
            ended = run.rundir.end.exists()  # which need not be the end: Slurm may have yet to say why, or requeue it
            status = run.settled(run.status())
            if status.over:
                break
            with screen.watched():
                shown.show(status)
            new = [line for line in progress.notes(status) if line not in told]
            screen.say(*new)
            told.update(new)
            due = now + (LOOK_READY if status.state is RunState.READY else LOOK_STARTING)
        screen.look()
        time.sleep(logview.POLL)
    screen.look(final=True)
    with screen.watched():
        failure.explain(run, status, tails=not screen.lines)
        if failure.exit_status(status) == 0:
            output.complain(f"{run.run_id} is {status.state}")
    return failure.exit_status(status)


def _cancel(run: Run, screen: _Screen) -> None:
    """End the run while its last words are still printed; leaves at once if told again."""
    outcome: list[CancelReply | SlurmforkError] = []

    def work() -> None:
        try:
            outcome.append(run.cancel("interrupted"))
        except SlurmforkError as error:
            outcome.append(error)

    worker = threading.Thread(target=work, daemon=True)  # daemon: it must not hold us up when told again
    worker.start()  # before anything is said: there may be nobody to hear it
    begun = time.monotonic()
    try:
        screen.say(f"cancelling {run.run_id}; Ctrl-C again leaves without waiting for its end")
        while worker.is_alive():
            screen.look()
            worker.join(logview.POLL)
        screen.look(final=True)
    except Told:
        worker.join(max(0.0, begun + ASKING - time.monotonic()))
        screen.say(f"not waiting; the cancel goes on, {hints.command('cancel', run.run_id)} waits until it is done")
        return
    screen.say(_outcome(run, outcome[0]) if outcome else f"the cancel of {run.run_id} broke off; repeat it")


def _outcome(run: Run, outcome: CancelReply | SlurmforkError) -> str:
    if isinstance(outcome, SlurmforkError):
        return f"{outcome}; {hints.command('cancel', run.run_id)} tries again"
    return "; ".join([cancelled_line(run, outcome), *outcome.notes])


def cancelled_line(run: Run, reply: CancelReply) -> str:
    """How a cancelled run ended, in a line."""
    line = f"{run.run_id}: {reply.state}, {output.plural(reply.survivors, 'survivor')}"
    if reply.unverified:
        line += f", could not verify {', '.join(reply.unverified)}"
    return line
