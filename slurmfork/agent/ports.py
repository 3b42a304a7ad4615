"""Free TCP ports, reserved among all agents of this user on this host by a lock on a byte each of one file.

From a range below the kernel's own, so that no outgoing connection takes one; a lock goes with the agent.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import struct
from pathlib import Path

from slurmfork.errors import Refused

PREFERRED = (20_000, 32_768)
_ENOUGH = 1_000
_FLOCK = "hhqqi4x"  # struct flock of Linux: type, whence, start, length, pid


def port_range() -> range:
    """The ports to choose from: none that the kernel gives to outgoing connections, if others are enough."""
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        low, high = PREFERRED[1], 60_999
    choices = (range(PREFERRED[0], low), range(10_000, low), range(high + 1, 65_536))
    return next((choice for choice in choices if len(choice) >= _ENOUGH), range(*PREFERRED))


class Ports:
    """Reservations of one agent. ``path`` is the file that this user's agents on this host share.

    The locks are those of an open file (``F_OFD_SETLK``): they end with its last descriptor, and only with that.
    """

    def __init__(self, path: Path, choices: range | None = None) -> None:
        self._path = path
        self._choices = choices or port_range()
        self._file = -1
        self._held: set[int] = set()
        self._owned: dict[str, list[int]] = {}

    def reserve(self, owner: str, count: int) -> list[int]:
        """Reserve ``count`` more ports for ``owner``; raises Refused, with none reserved, if they do not do."""
        self._open()
        found: list[int] = []
        start = random.randrange(len(self._choices))  # noqa: S311 (to spread, not to hide)
        for offset in range(len(self._choices) if count <= len(self._choices) else 0):
            if len(found) == count:
                break
            port = self._choices[(start + offset) % len(self._choices)]
            if self._take(port):
                found.append(port)
        if len(found) < count:
            self._drop(found)
            raise Refused(f"no {count} free ports between {self._choices[0]} and {self._choices[-1]}", "no_ports")
        self._owned.setdefault(owner, []).extend(found)
        return found

    def owned(self, owner: str) -> list[int]:
        """What ``owner`` holds, in the order of reservation."""
        return list(self._owned.get(owner, ()))

    def release(self, owner: str) -> None:
        """Give back all that ``owner`` holds."""
        self._drop(self._owned.pop(owner, []))

    def close(self) -> None:
        """Give back everything; harmless when repeated."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
        self._held.clear()
        self._owned.clear()

    def _open(self) -> None:
        """Have the file of that name open: who tidies /tmp may have removed it, and others lock the new one."""
        try:
            if self._file >= 0:
                try:
                    if os.path.samestat(os.fstat(self._file), os.lstat(self._path)):
                        return
                except FileNotFoundError:
                    pass
            fresh = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Refused(f"ports cannot be reserved by {self._path}: {error.strerror}", "no_ports") from None
        if self._file >= 0:
            os.close(self._file)
        self._file = fresh
        for port in self._held:
            self._lock(port, fcntl.F_WRLCK)

    def _drop(self, ports: list[int]) -> None:
        for port in ports:
            self._held.discard(port)
            self._lock(port, fcntl.F_UNLCK)

    def _take(self, port: int) -> bool:
        if port in self._held or not self._lock(port, fcntl.F_WRLCK):
            return False
        if not _is_free(port):
            self._lock(port, fcntl.F_UNLCK)
            return False
        self._held.add(port)
        return True

    def _lock(self, port: int, kind: int) -> bool:
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, port, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # another agent's
                return False
            raise Refused(f"ports cannot be reserved by {self._path}: {error.strerror}", "no_ports") from None
        return True


def _is_free(port: int) -> bool:
    """Whether nothing listens on the port at any address, IPv4 or IPv6."""
    try:
        probe = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError:
        return _binds(socket.socket(socket.AF_INET, socket.SOCK_STREAM), ("", port))
    try:
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    except OSError:
        probe.close()
        probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    return _binds(probe, ("", port))


def _binds(probe: socket.socket, address: tuple[str, int]) -> bool:
    with probe:
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # no IPv6 on any interface: ask for IPv4 alone
                return False
        else:
            return True
    if probe.family == socket.AF_INET:
        return False
    return _binds(socket.socket(socket.AF_INET, socket.SOCK_STREAM), address)
