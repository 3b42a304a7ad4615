"""A command on a channel of an SSH connection, and a tunnel on another as a plain socket."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import threading

import paramiko

from slurmfork.errors import ConnectionLost
from slurmfork.remote.wire import fate_of

_CHUNK = 1 << 18


class SshChannel:
    """A command that runs over there. ``name`` says where, for messages."""

    def __init__(self, channel: paramiko.Channel, name: str) -> None:
        self._channel = channel
        self._name = name
        self._sending = threading.Lock()
        self._ready = select.poll()
        self._ready.register(channel.fileno(), select.POLLIN)  # a pipe of paramiko's: readable when anything is

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        with self._sending:
            while rest:
                if fate_of(self._channel).deaf:
                    raise BrokenPipeError("the command does not read any more")
                rest = rest[self._send_some(bytes(rest[:_CHUNK])) :]

    def _send_some(self, data: bytes) -> int:
        try:
            sent = self._channel.send(data)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise self._not_sent() from error
        if sent == 0:
            raise self._not_sent()
        return sent

    def _not_sent(self) -> Exception:
        if fate_of(self._channel).orderly or self._channel.eof_sent:
            return BrokenPipeError("the command does not read any more")
        return self._lost()

    def end_input(self) -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.shutdown_write()

    def receive(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        channel = self._channel
        if not self._ready.poll(None if timeout is None else max(0.0, timeout * 1000)):
            raise TimeoutError
        try:
            output = channel.recv(_CHUNK) if channel.recv_ready() else b""
            errors = channel.recv_stderr(_CHUNK) if channel.recv_stderr_ready() else b""
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise self._lost() from error
        if not output and not errors and not fate_of(channel).orderly:
            raise self._lost()
        return output, errors

    def wait(self, timeout: float | None = None) -> int:
        if not self._channel.status_event.wait(timeout):
            raise TimeoutError
        if self._channel.exit_status >= 0:
            return self._channel.exit_status
        name = fate_of(self._channel).signal
        if name is None:
            raise self._lost()
        return 128 + getattr(signal, f"SIG{name}", 0)

    def close(self) -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.close()

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"the connection to {self._name} was lost while a command ran there")


def as_socket(channel: paramiko.Channel) -> socket.socket:
    """A tunnel as a plain socket, which two threads feed, one for each direction; closing it closes the tunnel."""
    ours, theirs = socket.socketpair()

    def inward() -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while data := channel.recv(_CHUNK):
                theirs.sendall(data)
        with contextlib.suppress(OSError):  # lost: nothing can go the other way either
            theirs.shutdown(socket.SHUT_WR if fate_of(channel).orderly else socket.SHUT_RDWR)

    def outward() -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while data := theirs.recv(_CHUNK):
                channel.sendall(data)
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            channel.shutdown_write()
        end = select.poll()
        end.register(theirs, 0)
        end.poll()  # until both directions are at their end: POLLHUP needs no asking for
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            channel.close()
        theirs.close()

    for carry in (inward, outward):
        threading.Thread(target=carry, name=f"slurmfork-tunnel-{carry.__name__}", daemon=True).start()
    return ours
