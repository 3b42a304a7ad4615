"""The door: the process on a login node through which verbs are run from elsewhere, over one stream.

``python -m slurmfork.remote.door`` reads requests on standard input and tells on standard output what came of them,
in frames. It serves who could log in, and nobody else; it listens on nothing. A verb that changes something is done
once, whatever becomes of the connection; one that only looks ends with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from slurmfork import installation, names
from slurmfork.errors import SlurmforkError
from slurmfork.remote import errand, spool
from slurmfork.remote.frames import MAGIC, PROTOCOL, Exit, Frame, Hello, Kind, Request, Unpacker, pack
from slurmfork.remote.spool import Spool
from slurmfork.version import __version__

if TYPE_CHECKING:
    from slurmfork.remote.reception import Reception

POLL_S = (0.02, 0.2)  # between two looks at the files of an errand: the longer it has been quiet, the longer
QUIET = 0.05  # of the time that it has been quiet
PIECE = 65_536
ABANDONED_S = 300.0  # without a client, what was to be followed (`run`) is told that its terminal is gone
LOGIN_S = 15.0
ATTENDED = frozenset({"run"})


class Gone(Exception):
    """The client is not there any more."""


class Door:
    """One client's. Descriptors 0 and 1 are the stream."""

    def __init__(self) -> None:
        self._frames = Unpacker(greeted=False)
        self._signals: list[int] = []
        self._thanked = False
        self._reception: Reception | None = None
        self._closed = False  # to code: an attempt to take it in has failed

    def serve(self) -> None:
        """Serve requests, one after the other, until the client leaves."""
        try:
            self._serve()
        finally:
            if self._reception is not None:
                self._reception.close()

    def _serve(self) -> None:
        hello = Hello(protocol=PROTOCOL, version=__version__, python=sys.version.split()[0], host=socket.gethostname())
        self._write(MAGIC + pack(Kind.HELLO, msgspec.json.encode(hello)))
        while True:
            request = self._next()
            try:
                status = self._once(request) if request.once else self._look(request)
            except SlurmforkError as error:
                self._say(str(error))
                status = error.exit_code
            except OSError as error:
                where = f" ({error.filename})" if error.filename else ""
                self._say(f"`{request.args[0]}` cannot begin on {socket.gethostname()}: {error.strerror}{where}")
                status = 1
            self._tell(Kind.EXIT, msgspec.json.encode(Exit(status=status)))
            if request.once:
                self._settle(request)

    def _next(self) -> Request:
        request: Request | None = None
        while request is None:
            for frame in self._read():
                if frame.kind is Kind.REQUEST:
                    request = msgspec.msgpack.decode(frame.data, type=Request)
                elif frame.kind in (Kind.ASK, Kind.PIECE):
                    self._take_in(frame)
                self._note(frame.kind, frame.data)  # a signal may come with the request
        return request

    def _take_in(self, frame: Frame) -> None:
        """Code comes before the request that it is for. What fails is told once; the client hears it and leaves."""
        if self._closed:
            return
        if self._reception is None:
            from slurmfork.remote.reception import Reception

            self._reception = Reception(self._tell)
        try:
            self._reception.take(frame)
        except SlurmforkError as error:
            self._closed = True
            self._say(str(error))
            self._tell(Kind.EXIT, msgspec.json.encode(Exit(status=error.exit_code)))

    def _settle(self, request: Request) -> None:
        """Forget an errand once the client has said that it has it all; it may come back for it otherwise."""
        self._thanked = False
        while not self._thanked:
            for frame in self._read():
                self._note(frame.kind, frame.data)
        with contextlib.suppress(OSError, SlurmforkError):
            Spool(request.request_id).remove()

    # --- verbs that look: they end with the connection

    def _look(self, request: Request) -> int:
        with contextlib.ExitStack() as stack:
            place = Path("/")
            if request.files:  # without, a home that is full or cannot be written to does no harm
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=spool.LOOK, dir=spool.home())))
                spool.lay_down(place, request.files)
            (out, out_w), (err, err_w), (marks, marks_w) = os.pipe(), os.pipe(), os.pipe()
            for descriptor in (out, err, marks):
                stack.callback(os.close, descriptor)
            own = errand.Ends(out_w, err_w, marks_w, others=(out, err, marks))
            pid = errand.fork(request, place, own)
            for descriptor in (out_w, err_w, marks_w):
                os.close(descriptor)
            try:
                self._relay(pid, out, err, marks)
            except Gone:
                _end(pid)
                raise
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code < 0:
            self._say(f"`{request.args[0]}` was ended over there by signal {-code}")
            return 128 - code
        return code

    def _relay(self, pid: int, out: int, err: int, marks: int) -> None:
        """Pass on what the errand says until all of its pipes are at their end."""
        kinds = {out: Kind.OUTPUT, err: Kind.ERRORS, marks: Kind.MARK}
        self._pass_on(pid)
        while kinds:
            ready, _, _ = select.select([0, *kinds], [], [])
            for descriptor in ready:
                if descriptor == 0:
                    self._hear(pid)
                elif data := os.read(descriptor, PIECE):
                    self._tell(kinds[descriptor], data)
                else:
                    del kinds[descriptor]

    # --- verbs that change something: they are done once

    def _once(self, request: Request) -> int:
        place = Spool(request.request_id)
        if place.begin():
            self._begin(request, place)
        try:
            with place.watched():  # says to a door whose client was lost that another one has come
                status = self._follow(request, place)
        except Gone:
            if request.args[0] in ATTENDED:
                _attend(place)
            raise
        if place.was_killed():
            self._say(f"`{request.args[0]}` was killed over there: it is not known how much of it was done")
        return status

    def _begin(self, request: Request, place: Spool) -> None:
        try:
            directory = place.lay_down(request.files)
            out, err = place.open("out"), place.open("err")
            errand.fork(request, directory, errand.Ends(out, err), first=place.note_pid, last=place.finish)
            os.close(out)
            os.close(err)
        except BaseException:
            place.remove()
            raise
        finally:
            place.let_go()

    def _follow(self, request: Request, place: Spool) -> int:
        at = dict(zip(("out", "err"), request.seen, strict=True))
        kinds = {"out": Kind.OUTPUT, "err": Kind.ERRORS}
        heard = time.monotonic()
        while True:
            status = place.status()
            for name, kind in kinds.items():
                while data := place.read(name, at[name]):
                    at[name] += len(data)
                    self._tell(kind, data)
                    heard = time.monotonic()
            if status is not None:
                _reap()
                return status
            pause = min(max(QUIET * (time.monotonic() - heard), POLL_S[0]), POLL_S[1])
            if select.select([0], [], [], pause)[0]:
                for frame in self._read():
                    self._note(frame.kind, frame.data)
            if self._signals and (pid := place.pid()) is not None:
                self._pass_on(pid)

    # --- the stream

    def _hear(self, pid: int) -> None:
        """What the client says in the meantime."""
        for frame in self._read():
            self._note(frame.kind, frame.data)
        self._pass_on(pid)

    def _pass_on(self, pid: int) -> None:
        taken, self._signals = self._signals, []
        for number in taken:
            _signal(pid, number)

    def _note(self, kind: Kind, data: bytes) -> None:
        if kind is Kind.THANKS:
            self._thanked = True
        elif kind is Kind.SIGNAL and data.isdigit() and int(data) in errand.SIGNALS:
            self._signals.append(int(data))

    def _read(self) -> Iterator[Frame]:
        data = os.read(0, PIECE)
        if not data:
            raise Gone
        return self._frames.feed(data)

    def _say(self, line: str) -> None:
        self._tell(Kind.ERRORS, f"slurmfork: {line}\n".encode())

    def _tell(self, kind: Kind, data: bytes) -> None:
        self._write(pack(kind, data))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(1, view) :]
        except OSError:
            raise Gone from None


def _signal(pid: int | None, number: int) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _end(pid: int) -> None:
    """An errand that only looked, and for whom nobody looks any more."""
    if pid:
        _signal(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _attend(place: Spool) -> None:
    """Wait for a client to come back for what runs in its foreground; else tell it that its terminal is gone."""
    until = time.monotonic() + ABANDONED_S
    while place.status() is None and time.monotonic() < until:
        if place.is_watched():
            return
        time.sleep(1.0)
    _signal(place.pid(), signal.SIGHUP)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def settle() -> None:
    """Have the environment that verbs have when they are typed there; what goes for verbs of ours is said here."""
    _as_at_login()
    for name in [name for name in os.environ if name.startswith("SLURMFORK_") and name != names.ROOT]:
        del os.environ[name]


def _as_at_login() -> None:
    """Have Slurm's commands on PATH: many sites put them there for login shells alone, which SSH's commands are not."""
    if shutil.which("sbatch") is not None:
        return
    for entry in os.fsdecode(_environment_at_login()).split("\0"):
        name, equals, value = entry.partition("=")
        name = name.rpartition("\n")[2]  # before the first one there may be what the shell says at login
        if equals and names.ENV_PATTERN.fullmatch(name) and (name == "PATH" or name not in os.environ):
            os.environ[name] = value


def _environment_at_login() -> bytes:
    shell = os.environ.get("SHELL") or "/bin/sh"
    name, question = f"-{Path(shell).name}", "env -0"  # the dash makes it a login shell, whatever options it knows
    asked = [] if name.endswith("csh") else ["-c", question]  # with -c, csh would read no .login
    try:
        return subprocess.run(
            [name, *asked],
            executable=shell,
            input=b"" if asked else f"{question}\n".encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=LOGIN_S,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired as late:  # what was started at login may hold on to the pipe
        return late.stdout or b""
    except OSError:
        return b""


def main() -> int:
    """Serve one client."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # that the client is gone is heard by the end of the stream
    installation.settle()
    settle()
    with contextlib.suppress(OSError, SlurmforkError):
        spool.remove_old()
    with contextlib.suppress(Gone):
        Door().serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
