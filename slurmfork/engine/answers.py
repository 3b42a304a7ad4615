"""The answers to one caller: which of its calls are under way, what was answered and has not arrived, and sending.

An answer is kept until the caller says that it has it: a call that comes again after a lost connection gets the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from slurmfork.engine import wire
from slurmfork.engine.channel import Channel
from slurmfork.engine.codec import Packed, pack, pack_pickle
from slurmfork.engine.failures import pack_failure
from slurmfork.engine.hosted import Running
from slurmfork.errors import CodecError

REMEMBERED = 8192


class Answers:
    """``begin``, ``give_up`` and ``received`` are for the loop, the rest for any thread. ``channel``: the caller's."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self._running: dict[int, Running] = {}
        self._kept: dict[int, wire.Frame] = {}
        self._past: dict[int, None] = {}  # those that have arrived: a copy of such a call may still be on its way

    def begin(self, number: int, credit: int = 0) -> Running | None:
        """A new call; None for one that came before, which then gets what it would have got."""
        if number in self._running or number in self._past:
            return None
        if (kept := self._kept.get(number)) is not None:
            if self.channel is not None and not kept.lent:
                self.channel.send(kept)
            return None
        running = self._running[number] = Running(number, credit)
        return running

    def running(self, number: int) -> Running | None:
        """A call that is under way."""
        return self._running.get(number)

    def received(self, numbers: Iterable[int]) -> None:
        """These have arrived."""
        for number in numbers:
            if self._kept.pop(number, None) is not None:
                self._past[number] = None
        while len(self._past) > REMEMBERED:
            del self._past[next(iter(self._past))]

    def give_up(self, number: int) -> None:
        """Nobody waits for this one any more."""
        running = self._running.pop(number, None)
        self._kept.pop(number, None)
        if running is None:
            return
        with running.lock:
            running.cancelled = True
            go_on, running.more = running.more, None
        if running.task is not None:
            running.task.cancel()
        elif go_on is not None:
            go_on()  # so that the generator is closed, in its own thread

    def give_up_all(self) -> None:
        """The caller does not come back."""
        for number in list(self._running):
            self.give_up(number)
        self._kept.clear()

    # --- sending

    def result(self, running: Running, message: wire.Call, value: Any, *, later: bool = False) -> None:
        """What the method has returned; raises CodecError. ``later``: with others, in the loop's turn."""
        frame = self.frame(wire.Result(message.id, message.pickled), packed(message, value))
        self.answer(running, frame, later=later)

    def item(self, message: wire.Call, value: Any) -> None:
        """The next of a stream; raises CodecError."""
        self._send(self.frame(wire.Item(message.id, message.pickled), packed(message, value)))

    def fail(self, running: Running, error: BaseException, *, later: bool = False) -> None:
        """Why there is no result."""
        self.answer(running, self.frame(wire.Failure(running.id), pack_failure(error)), later=later)

    def answer(self, running: Running, frame: wire.Frame, *, later: bool = False) -> None:
        """Send a call's last word, and keep it."""
        if running.cancelled:
            return
        self._kept[running.id] = frame
        self._running.pop(running.id, None)
        self._send(frame, later=later)

    def frame(self, message: wire.Message, value: Packed) -> wire.Frame:
        """A frame for where the caller is."""
        channel = self.channel
        if channel is None:
            return wire.frame(message, value)
        return wire.frame(message, value, channel.lender, channel.memory)

    def _send(self, frame: wire.Frame, *, later: bool = False) -> None:
        channel = self.channel
        if channel is not None:
            channel.post(frame) if later else channel.send(frame)


def packed(message: wire.Call, value: Any) -> Packed:
    """A value in the way that the caller asked for; raises CodecError, which names the method."""
    try:
        return pack_pickle(value) if message.pickled else pack(value)
    except CodecError as error:
        raise CodecError(f"what {message.method} of {message.worker} returned: {error}") from None
