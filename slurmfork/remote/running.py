"""Running a command over a transport to its end: input in, output and errors out, within a time."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from slurmfork.errors import TransportError
from slurmfork.remote.transport import Channel, Done


def communicate(channel: Channel, data: bytes, timeout: float) -> Done:
    """Write ``data``, read all that comes, wait for the end; the channel is closed whatever happens."""
    deadline = time.monotonic() + timeout
    feeding = threading.Thread(target=_feed, args=(channel, data), daemon=True)
    feeding.start()  # apart: a command that writes before it reads must not wait for us, nor we for it
    output, errors = bytearray(), bytearray()
    try:
        while True:
            out, err = channel.receive(_left(deadline))
            if not out and not err:
                return Done(channel.wait(_left(deadline)), bytes(output), bytes(errors))
            output += out
            errors += err
    finally:
        channel.close()


def _feed(channel: Channel, data: bytes) -> None:
    with suppress(BrokenPipeError, TransportError, OSError):
        if data:
            channel.send(data)
        channel.end_input()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
