"""The transport to this machine: commands are started here, without SSH."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from slurmfork.errors import TransportError


class LocalChannel:
    """A command that runs on this machine."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        assert child.stdout
        assert child.stderr
        self._selector = selectors.DefaultSelector()
        for stream in (child.stdout, child.stderr):
            self._selector.register(stream, selectors.EVENT_READ, stream is child.stdout)

    def send(self, data: bytes) -> None:
        assert self._child.stdin
        self._child.stdin.write(data)
        self._child.stdin.flush()

    def end_input(self) -> None:
        assert self._child.stdin
        self._child.stdin.close()

    def receive(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        while self._selector.get_map():
            found = {True: b"", False: b""}
            ready = self._selector.select(timeout)
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                if data := os.read(key.fd, 65_536):
                    found[key.data] = data
                else:
                    self._selector.unregister(key.fileobj)
            if found[True] or found[False]:
                return found[True], found[False]
        return b"", b""

    def wait(self, timeout: float | None = None) -> int:
        try:
            status = self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        return status if status >= 0 else 128 - status

    def close(self) -> None:
        self._selector.close()
        for stream in (self._child.stdin, self._child.stdout, self._child.stderr):
            assert stream
            with contextlib.suppress(BrokenPipeError):  # what was not taken any more
                stream.close()


class LocalTransport:
    """This machine."""

    def __init__(self, name: str = "this machine") -> None:
        self.name = name

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> LocalChannel:
        words = [sys.executable if word == "python" and place == 0 else word for place, word in enumerate(argv)]
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **(env or {})},
                cwd=os.path.expanduser("~"),  # noqa: PTH111
                start_new_session=True,
            )
        except OSError as error:
            raise TransportError(f"{self.name}: cannot run {argv[0]}: {error.strerror}") from None
        return LocalChannel(child)

    def connect(self, host: str, port: int, timeout: float = 10.0) -> socket.socket:
        try:
            return socket.create_connection((host, port), timeout)
        except OSError as error:
            raise TransportError(f"{self.name}: cannot reach {host}:{port}: {error}") from None

    def close(self) -> None:
        pass
