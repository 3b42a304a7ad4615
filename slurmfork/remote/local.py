"""This machine as a transport: commands are child processes, connections are plain ones."""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from slurmfork.errors import ConnectionLost, TransportError

_CHUNK = 1 << 16
_GRACE_S = 2.0


class ProcessChannel:
    """A child process seen as a channel; the local transport's, and that of an ssh client's process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._input: IO[bytes] = process.stdin
        self._outputs: tuple[IO[bytes], IO[bytes]] = (process.stdout, process.stderr)
        self._sending = threading.Lock()
        self._awake, self._waker = socket.socketpair()  # closing it ends the waits of other threads
        self._selector = selectors.DefaultSelector()
        for number, output in enumerate(self._outputs):
            os.set_blocking(output.fileno(), False)
            self._selector.register(output, selectors.EVENT_READ, number)
        self._open_outputs = len(self._outputs)
        self._selector.register(self._awake, selectors.EVENT_READ, None)
        os.set_blocking(self._input.fileno(), False)
        self._writable = select.poll()
        self._writable.register(self._input, select.POLLOUT)
        self._writable.register(self._awake, select.POLLIN)

    def send(self, data: bytes) -> None:
        with self._sending:
            rest = memoryview(data)
            while rest:
                if self._input.closed:
                    raise BrokenPipeError("its input was ended")
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(self._input.fileno(), rest) :]
                if rest and any(fd == self._awake.fileno() for fd, _ in self._writable.poll()):
                    raise BrokenPipeError("the channel was closed")

    def end_input(self) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._input.close()

    def receive(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._open_outputs:
            ready = self._selector.select(None if deadline is None else max(0.0, deadline - time.monotonic()))
            found = [b"", b""]
            for key, _ in ready:
                if key.data is None:
                    raise ConnectionLost("the channel was closed")
                found[key.data] = self._read(self._outputs[key.data])
            if any(found):
                return found[0], found[1]
            if not ready and deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError
        return b"", b""

    def _read(self, output: IO[bytes]) -> bytes:
        try:
            data = os.read(output.fileno(), _CHUNK)
        except BlockingIOError:
            return b""
        if not data:
            self._selector.unregister(output)
            self._open_outputs -= 1
        return data

    def wait(self, timeout: float | None = None) -> int:
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        return status if status >= 0 else 128 - status

    def close(self) -> None:
        if self._process.poll() is None:
            self._signal(signal.SIGHUP)
        self._waker.close()
        self.end_input()
        for output in self._outputs:
            output.close()

    def end(self) -> None:
        """Close, and make sure that the process is gone, and waited for."""
        self.close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    @property
    def over(self) -> bool:
        """Whether the process has ended, and was waited for."""
        return self._process.poll() is not None

    def _signal(self, number: signal.Signals) -> None:
        """To its whole session: it has one of its own, whose id is taken as long as we have not waited for it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def popen(
    argv: Sequence[str], env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process with three pipes, in a session of its own."""
    return subprocess.Popen(
        list(argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **env} if env else None,
        pass_fds=pass_fds,
        start_new_session=True,
        bufsize=0,
    )


class LocalTransport:
    """This machine, without SSH."""

    def __init__(self, name: str = "this machine") -> None:
        self.name = name
        self._channels: list[ProcessChannel] = []

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> ProcessChannel:
        self._channels = [channel for channel in self._channels if not channel.over]
        try:
            channel = ProcessChannel(popen(argv, env))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TransportError(f"cannot start {argv[0]!r} on {self.name}: {reason}") from error
        self._channels.append(channel)
        return channel

    def connect(self, host: str, port: int, timeout: float = 10.0) -> socket.socket:
        try:
            connection = socket.create_connection((host, port), timeout)
        except TimeoutError:
            raise
        except OSError as error:
            raise TransportError(f"cannot connect from {self.name} to {host}:{port}: {error.strerror}") from error
        connection.settimeout(None)
        return connection

    def close(self) -> None:
        while self._channels:
            self._channels.pop().end()
