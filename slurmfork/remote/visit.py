"""A visit: a verb is run over there by the door, and what it prints comes here, whatever the connection goes through.

A connection that is lost is made anew; what was asked is done once, and nothing is shown twice. Code that a submit
needs goes first.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from slurmfork.errors import ConnectionLost, NotOpened, NotReached, SlurmforkError, TransportError, one_line
from slurmfork.remote.frames import PROTOCOL, Exit, Frame, Hello, Kind, Mark, Request, Unpacker, pack
from slurmfork.remote.transport import Channel, Transport
from slurmfork.version import __version__

if TYPE_CHECKING:
    from slurmfork.remote.upload import Upload

HELLO_S = 60.0
PATIENCE_S = 120.0  # for a connection to come back
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)
STOOD_S = 10.0  # what stood so long and is lost then is another loss, which has the whole patience to itself
EARLY = 2  # further tries where nothing was asked yet


class OtherVersion(SlurmforkError):
    """The slurmfork over there is another version; nothing was asked of it."""


class NotThere(TransportError):
    """There is no slurmfork over there, or not where the profile says."""


class GaveUp(Exception):
    """The far side could not take the code, and has said why; ``status`` is what the verb would have exited with."""

    def __init__(self, status: int) -> None:
        self.status = status


class Ear(NamedTuple):
    """Who hears what comes: output, errors, and words about the connection."""

    out: Callable[[bytes], None]
    err: Callable[[bytes], None]
    say: Callable[[str], None]


class Show(Enum):
    """When output is shown: as it comes; when a mark says that a repeat will not bring it again; or at the end."""

    AT_ONCE = auto()
    AT_MARKS = auto()
    AT_END = auto()


class Visit:
    """One verb run over there. ``transport`` makes a fresh way to the login node, ``python`` begins a command there."""

    def __init__(
        self,
        transport: Callable[[], Transport],
        python: Sequence[str],
        request: Request,
        ear: Ear,
        *,
        show: Show = Show.AT_ONCE,
        check: Callable[[Hello], None] = lambda hello: None,
        upload: Upload | None = None,
    ) -> None:
        self._connect, self._python, self._request, self._ear = transport, python, request, ear
        self._show_when, self._check, self._upload = show, check, upload
        self._welcomed: float | None = None  # when, this time
        self._asked = False  # whether the far side may have the request
        self._begun = False  # whether it is worth some patience
        self._channel: Channel | None = None
        self._output = _Output(show, ear.out)
        self._interrupted = False
        self._unsent: deque[int] = deque()  # signals

    def run(self) -> int:
        """Run it to its end; returns its exit status. Raises TransportError where that could not be had.

        KeyboardInterrupt: it only looks, was interrupted, and the connection is lost.
        """
        tries, limit, before = 0, 0.0, self._progress
        while True:
            try:
                return self._try()
            except (ConnectionLost, NotReached) as error:
                if self._interrupted and not self._request.once:
                    raise KeyboardInterrupt from None
                if not tries or self._progress != before or self._stood() > STOOD_S:
                    tries, limit, before = 0, time.monotonic() + PATIENCE_S, self._progress
                if not self._is_worth_a_try(error, tries, limit):
                    raise self._final(error) from None
                self._ear.say(f"{error}; trying again")
                time.sleep(PAUSES[min(tries, len(PAUSES) - 1)] * random.uniform(0.8, 1.2))  # noqa: S311
                tries += 1
            except TransportError as error:
                raise self._final(error) from None

    def interrupt(self, number: int) -> bool:
        """Send the verb a signal over there, from a signal handler or another thread.

        False: it waits for the connection to come back.
        """
        self._interrupted = True
        if (channel := self._channel) is None:
            self._unsent.append(number)
            return False
        data = pack(Kind.SIGNAL, str(number).encode())  # in a thread: this one may be about to send, too
        threading.Thread(target=_send_quietly, args=(channel, data), daemon=True).start()
        return True

    @property
    def under_way(self) -> bool:
        """Whether the far side may have the request, and so has to be told of a signal."""
        return self._asked and (self._request.once or self._channel is not None)

    def _is_worth_a_try(self, error: TransportError, tries: int, limit: float) -> bool:
        if self._begun:
            return time.monotonic() < limit
        return isinstance(error, ConnectionLost) and not isinstance(error, NotOpened) and tries < EARLY

    def _stood(self) -> float:
        """How long the connection that was lost had stood."""
        return 0.0 if self._welcomed is None else time.monotonic() - self._welcomed

    @property
    def _progress(self) -> tuple[object, ...]:
        taken = self._upload.taken if self._upload is not None else 0
        return (self._asked, self._request.seen, self._request.mark, taken)

    def _final(self, error: TransportError) -> TransportError:
        if not (self._asked and self._request.once):
            return error
        lost = isinstance(error, (ConnectionLost, NotReached))
        return TransportError(f"{error}{', and does not come back' if lost else ''}; what was asked goes on over there")

    def _try(self) -> int:
        self._welcomed = None
        with self._opened() as (channel, frames):
            self._welcomed = time.monotonic()
            if self._upload is not None and not self._asked:  # then it is there, whatever became of the request
                self._begun = True
                try:
                    self._request.code = self._upload.send(channel, self._but_errors(frames))
                except GaveUp as error:
                    return error.status
            self._asked = self._begun = True
            self._output.begin()
            send(channel, pack(Kind.REQUEST, msgspec.msgpack.encode(self._request)))
            self._channel = channel
            try:
                while self._unsent:
                    self.interrupt(self._unsent.popleft())
                for frame in frames:
                    if frame.kind is Kind.EXIT:
                        self._output.end()
                        with contextlib.suppress(TransportError, OSError):
                            channel.send(pack(Kind.THANKS, b""))
                            channel.end_input()
                        return msgspec.json.decode(frame.data, type=Exit).status
                    self._take(frame)
            finally:
                self._channel = None
        raise ConnectionLost("the door over there closed")

    def _but_errors(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in frames:
            if frame.kind is Kind.ERRORS:
                self._ear.err(frame.data)
            else:
                yield frame

    def _take(self, frame: Frame) -> None:
        out, err = self._request.seen
        if frame.kind is Kind.OUTPUT:
            self._output.take(frame.data)
            self._request.seen = (out + len(frame.data), err)
        elif frame.kind is Kind.ERRORS:
            self._request.seen = (out, err + len(frame.data))
            self._ear.err(frame.data)
        elif frame.kind is Kind.MARK:
            for line in frame.data.splitlines():
                self._output.mark(msgspec.json.decode(line, type=Mark))
            self._request.mark = self._output.reached

    @contextmanager
    def _opened(self) -> Iterator[tuple[Channel, Iterator[Frame]]]:
        transport = self._connect()
        try:
            channel = transport.start([*self._python, "-I", "-m", "slurmfork.remote.door"])
            try:
                frames = self._frames(channel, transport.name)
                self._greet(frames)
                yield channel, frames
            finally:
                channel.close()
        finally:
            transport.close()

    def _greet(self, frames: Iterator[Frame]) -> None:
        frame = next(frames, None)
        if frame is None or frame.kind is not Kind.HELLO:
            raise ConnectionLost("the door over there closed before it said a word")
        hello = msgspec.json.decode(frame.data, type=Hello)
        if hello.protocol != PROTOCOL:
            raise OtherVersion(f"slurmfork {hello.version} over there speaks another protocol than {__version__} here")
        self._check(hello)

    def _frames(self, channel: Channel, name: str) -> Iterator[Frame]:
        unpacker, errors, heard = Unpacker(greeted=True), b"", False
        while True:
            try:
                out, err = channel.receive(None if heard else HELLO_S)
            except TimeoutError:
                raise NotOpened(f"{name}: Python did not answer within {HELLO_S:.0f} s") from None
            if not out and not err:
                break
            if heard:
                self._ear.err(err) if err else None
            else:
                errors += err
            for frame in unpacker.feed(out):
                heard = True
                yield frame
        if not heard:
            raise _no_door(name, self._python[-1], channel.wait(HELLO_S), unpacker.noise, errors)


class _Output:
    """What was printed over there, held back for as long as a repeat might bring it again."""

    def __init__(self, show: Show, out: Callable[[bytes], None]) -> None:
        self._show, self._out = show, out
        self._held = bytearray()
        self._shown = 0
        self._marks: deque[Mark] = deque()
        self.reached = ""

    def begin(self) -> None:
        """A first or another try, which begins at ``reached``."""
        if self._show is not Show.AT_ONCE:
            self._held.clear()
            self._shown = 0
            self._marks.clear()

    def take(self, data: bytes) -> None:
        if self._show is Show.AT_ONCE:
            self._out(data)
            return
        self._held += data
        self._pass()

    def mark(self, mark: Mark) -> None:
        self._marks.append(mark)
        self._pass()

    def _pass(self) -> None:
        """Show what lies before the last mark that was reached."""
        while self._marks and self._marks[0].output <= self._shown + len(self._held):
            mark = self._marks.popleft()
            self._release(mark.output - self._shown)
            self.reached = mark.text

    def end(self) -> None:
        self._release(len(self._held))

    def _release(self, size: int) -> None:
        if size > 0:
            self._out(bytes(self._held[:size]))
            del self._held[:size]
            self._shown += size


def _no_door(name: str, python: str, status: int, noise: bytes, errors: bytes) -> TransportError:
    said = one_line((errors or noise).decode(errors="replace"))[-300:]
    if status in (126, 127) or "No module named" in said or "No such file" in said:
        return NotThere(f"{name}: slurmfork is not there: no {python} that has it")
    return ConnectionLost(f"{name}: the door did not open (status {status}{': ' + said if said else ''})")


def send(channel: Channel, data: bytes) -> None:
    """Send to the door, which reads for as long as it lives."""
    try:
        channel.send(data)
    except BrokenPipeError:
        raise ConnectionLost("the door over there closed") from None


def _send_quietly(channel: Channel, data: bytes) -> None:
    with contextlib.suppress(TransportError, OSError):
        channel.send(data)
