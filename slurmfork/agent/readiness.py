"""When a worker is ready: it says so on its notify socket, or its port answers. Judges nothing else of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from slurmfork.errors import RunDirError
from slurmfork.notify import ENDPOINTS
from slurmfork.spec.model import Ready

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 0.5
PROBE_TIMEOUT_S = 10.0
_MAX_DATAGRAM = 8192


class NotReady(Exception):
    """A worker was not ready in time; the message is the reason."""


class Notify:
    """A worker's notify socket (systemd's protocol). ``told(status)`` hears each STATUS line.

    Bound for the worker's life, over its restarts; ``forget`` before each start.
    """

    def __init__(self, path: Path, told: Callable[[str], None]) -> None:
        self.path = path
        self.ready = asyncio.Event()
        self.endpoints: list[str] = []  # where the worker says that it listens
        self.extended = 0.0  # the loop's time until which the worker asked to be waited for
        self._told = told
        self._moved = asyncio.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            self._socket.bind(str(path))
            path.chmod(0o600)
        except OSError as error:
            self._socket.close()
            raise RunDirError(f"cannot make the notify socket {path}: {error.strerror}") from None
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    def close(self) -> None:
        """Stop listening; harmless when repeated."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            with contextlib.suppress(OSError):
                self.path.unlink()

    def forget(self) -> None:
        """Before a start: what an earlier process of this worker said counts no more."""
        self._read(deaf=True)
        self.ready.clear()
        self.extended = 0.0
        self.endpoints = []

    async def wait(self, timeout: float) -> None:
        """Wait for READY=1, as long as the worker asks to be waited for; raises asyncio.TimeoutError."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while not self.ready.is_set():
            self._moved.clear()
            rest = max(begun + timeout, self.extended) - loop.time()
            if rest <= 0:
                raise asyncio.TimeoutError
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._moved.wait(), rest)

    def _read(self, *, deaf: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := self._socket.recv(_MAX_DATAGRAM):
                if not deaf:
                    for line in data.decode(errors="replace").splitlines():
                        self._take(line)

    def _take(self, line: str) -> None:
        key, _, value = line.partition("=")
        if key == "READY" and value == "1":
            self.ready.set()
        elif key == "EXTEND_TIMEOUT_USEC" and value.isascii() and value.isdigit():
            self.extended = asyncio.get_running_loop().time() + min(int(value) / 1e6, 31_536_000)
        elif key == ENDPOINTS:
            self.endpoints = value.split()
        elif key == "STATUS":
            self._told("".join(char if char.isprintable() else " " for char in value)[:300].strip())
        self._moved.set()


async def until_ready(ready: Ready, *, notify: Notify | None, port: int | None, hosts: Sequence[str]) -> None:
    """Wait until a worker is ready; raises NotReady. ``hosts`` are tried in turn on its first port."""
    try:
        if notify is not None:
            await notify.wait(ready.timeout)
        elif port is not None:
            await asyncio.wait_for(_until_answered(ready, port, hosts), ready.timeout)
        else:
            raise NotReady("the readiness check needs a port: give the role `ports: 1`")
    except asyncio.TimeoutError:
        raise NotReady(f"not ready within {ready.timeout:g} s") from None


async def _until_answered(ready: Ready, port: int, hosts: Sequence[str]) -> None:
    async def probe(host: str) -> bool:
        if ready.http is None:
            return await accepts(host, port)
        return await answers(host, port, ready.http)

    await _backing_off(probe, hosts)


async def _backing_off(probe: Callable[[str], Awaitable[bool]], hosts: Sequence[str]) -> None:
    pause = FIRST_PAUSE_S
    while True:
        for host in hosts:
            if await probe(host):
                return
        await asyncio.sleep(pause)
        pause = min(pause * 1.3, LONGEST_PAUSE_S)


async def accepts(host: str, port: int) -> bool:
    """Whether the port accepts a connection."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), PROBE_TIMEOUT_S)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True


async def answers(host: str, port: int, path: str) -> bool:
    """Whether a GET of ``path`` is answered by 2xx or 3xx. Reads no more than the status line."""
    try:
        return await asyncio.wait_for(_get(host, port, path), PROBE_TIMEOUT_S)
    except (OSError, ValueError, asyncio.TimeoutError):
        return False


async def _get(host: str, port: int, path: str) -> bool:
    reader, writer = await asyncio.open_connection(host, port, limit=_MAX_DATAGRAM)
    try:
        shown = f"[{host}]" if ":" in host else host
        lines = (f"GET {path} HTTP/1.1", f"Host: {shown}:{port}", "User-Agent: slurmfork", "Accept: */*")
        writer.write("\r\n".join((*lines, "Connection: close", "", "")).encode())
        words = (await reader.readline()).split()
        return len(words) >= 2 and words[0].startswith(b"HTTP/1.") and words[1][:1] in (b"2", b"3")
    finally:
        writer.close()


def probe_hosts(address: str) -> list[str]:
    """Where a worker may listen: on this machine's loopback, the node's address, or IPv6's loopback."""
    hosts = ["127.0.0.1", address] if address and address != "127.0.0.1" else ["127.0.0.1"]
    return [*hosts, "::1"] if os.path.exists("/proc/net/if_inet6") else hosts  # noqa: PTH110 (light)
