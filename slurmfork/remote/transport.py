"""What a transport is: it starts commands on a machine, this one or another, and reaches ports from there.

Only shapes live here, and what every transport gets from them. A command is a list of words, never shell text: who
needs a shell on the way (SSH does) quotes for it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from slurmfork.errors import TransportError

RUN_S = 60.0


class Done(NamedTuple):
    """A command that came to its end. ``status`` is its exit status; 128 and the signal where one ended it."""

    status: int
    output: bytes
    errors: bytes

    @property
    def words(self) -> str:
        """What it said on standard error, in one line."""
        return "; ".join(line.strip() for line in self.errors.decode(errors="replace").splitlines() if line.strip())


class Channel(Protocol):
    """A command that runs over there. Methods raise ConnectionLost once the connection is lost; over a connection that
    is shared with OpenSSH only ``wait`` can tell, after the end of the output."""

    def send(self, data: bytes) -> None:
        """Write to its standard input, all of it; BrokenPipeError where it does not read any more."""

    def end_input(self) -> None:
        """No more input comes; harmless when repeated."""

    def receive(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """What it has written since, on standard output and error, as soon as there is any of either.

        Two empty ones: both are at their end. Raises TimeoutError when ``timeout`` seconds brought nothing.
        """

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; raises TimeoutError. To be called when ``receive`` says that both are at their end."""

    def close(self) -> None:
        """Let go of it: its input ends, and what it writes is not read. It gets SIGHUP where SSH gives one."""


class Transport(Protocol):
    """A way to one machine. ``name`` says which, in messages. Opened at its first use, then kept."""

    name: str

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Channel:
        """Start a command; raises TransportError in one line that says what to do, ConnectionLost if that may pass.

        ``env``: what it has beyond the environment that a login gives it; no place for secrets, for others can see
        the command line by which it gets there. A word that holds a line break is a UsageError over SSH: no way of
        quoting it suits all login shells.
        """

    def connect(self, host: str, port: int, timeout: float = 10.0) -> socket.socket:
        """A connection to a port, as seen from over there; raises TransportError, TimeoutError.

        A plain socket of this process, whatever carries it.
        """

    def close(self) -> None:
        """End the connection, and with it what still runs on its channels; harmless when repeated."""


def run(
    transport: Transport,
    argv: Sequence[str],
    *,
    input: bytes = b"",
    env: Mapping[str, str] | None = None,
    timeout: float = RUN_S,
) -> Done:
    """Run a command to its end. Raises TransportError, and TimeoutError after ``timeout`` seconds in all."""
    from slurmfork.remote.running import communicate

    return communicate(transport.start(argv, env=env), input, timeout)


__all__ = ["Channel", "Done", "Transport", "TransportError", "run"]
