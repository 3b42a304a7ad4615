"""A process that stays outside of the agent's user namespace, to look at what the agent then may not.

An agent that made itself a user namespace may not read the environment of this user's other processes any more. What
earlier runs left here is known by that, so a fork of the agent that was made before looks for it, once, when asked.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from slurmfork import prctl

if TYPE_CHECKING:
    from slurmfork.orders import Finding

_LIMIT_S = 30.0


class Outside:
    """The process, made while this one has one thread; it ends with this object's process, or when it has answered."""

    def __init__(self, close: Iterable[int]) -> None:
        self._socket, other = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self._socket.close()
            for descriptor in close:
                os.close(descriptor)
            _serve(other)
        other.close()
        self._socket.settimeout(_LIMIT_S)

    def sweep(self, run_id: str) -> list[Finding]:
        """What ``leftovers.sweep`` does and finds, there; raises OSError where nobody answers."""
        import msgspec

        from slurmfork.orders import Finding

        self._socket.sendall(run_id.encode())
        self._socket.shutdown(socket.SHUT_WR)
        with self._socket.makefile("rb") as answer:
            data = answer.read()
        if not data:
            raise OSError("the process that looks for leftovers has ended")
        return msgspec.json.decode(data, type=list[Finding])

    def close(self) -> None:
        """Let it go."""
        self._socket.close()


def _serve(asked: socket.socket) -> NoReturn:
    status = 1
    try:
        prctl.rename("slurmfork-look")
        with asked.makefile("rb") as question:
            run_id = question.read().decode()
        if run_id:
            import msgspec

            from slurmfork.agent import leftovers

            with suppress(OSError):
                asked.sendall(msgspec.json.encode(leftovers.sweep(run_id)))
        status = 0
    except Exception as error:
        print(f"slurmfork: leftovers could not be looked for: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)
