"""A large array to a worker of another node, beside what one bare TLS stream between the same two addresses carries.

``python across.py CREDENTIALS ADDRESS BYTES`` is the bare stream's other end: it prints its port, reads so many bytes
into memory that it has, says so, and again, until nobody sends any more.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurmfork import credentials

MEBIBYTES = 256
ROUNDS = 9


def main(directory: str, address: str, size: int) -> None:
    room = memoryview(bytearray(size))
    with socket.create_server((address, 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        connection, _ = listening.accept()
    with credentials.engine_context(Path(directory)).wrap_socket(connection, server_side=True) as stream:
        while True:
            rest = room
            while rest:
                count = stream.recv_into(rest)
                if not count:
                    return
                rest = rest[count:]
            stream.sendall(b"!")


@contextlib.contextmanager
def bare_stream(run: Any, address: str, size: int) -> Iterator[ssl.SSLSocket]:
    """A blocking TLS stream with the run's certificates to a process on the same address."""
    directory = run.credentials_directory
    argv = [sys.executable, __file__, str(directory), address, str(size)]
    other = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    port = int(other.stdout.readline())
    context = credentials.client_context(directory)
    name = credentials.engine_name(run.run_id)
    try:
        with (
            socket.create_connection((address, port)) as plain,
            context.wrap_socket(plain, server_hostname=name) as stream,
        ):
            yield stream
    finally:
        other.wait(30)


def rates(run: Any, role: str) -> tuple[list[float], list[float]]:
    """MiB a second: of the array as an argument of a call by TLS, and of the bare stream, by turns."""
    import numpy

    worker = run.role(role).worker(0)
    by_tls = [endpoint for endpoint in worker.view.endpoints if endpoint.startswith("tls://")]
    worker.view.endpoints[:] = by_tls  # as of a worker on another machine
    address = by_tls[0].removeprefix("tls://").rpartition(":")[0].strip("[]")
    array = numpy.ones(MEBIBYTES << 20, numpy.uint8)
    ours, bare = [], []
    with bare_stream(run, address, array.nbytes) as stream:
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            worker.call("take", array)
            between = time.perf_counter()
            stream.sendall(memoryview(array))
            stream.recv(1)
            ours.append(MEBIBYTES / (between - began))
            bare.append(MEBIBYTES / (time.perf_counter() - between))
    return ours[1:], bare[1:]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
