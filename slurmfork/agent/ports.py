"""Free TCP ports, reserved among all agents of this user on this host by a locked file each.

From a range below the kernel's own, so that no outgoing connection takes one; a lock goes with the agent.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
from pathlib import Path

from slurmfork.errors import Refused

PREFERRED = (20_000, 32_768)
_ENOUGH = 1_000


def port_range() -> range:
    """The ports to choose from: none that the kernel gives to outgoing connections, if others are enough."""
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        low, high = PREFERRED[1], 60_999
    choices = (range(PREFERRED[0], low), range(10_000, low), range(high + 1, 65_536))
    return next((choice for choice in choices if len(choice) >= _ENOUGH), range(*PREFERRED))


class Ports:
    """Reservations of one agent. ``directory`` is shared by this user's agents on this host."""

    def __init__(self, directory: Path, choices: range | None = None) -> None:
        self._directory = directory
        self._choices = choices or port_range()
        self._held: dict[int, int] = {}
        self._owned: dict[str, list[int]] = {}

    def reserve(self, owner: str, count: int) -> list[int]:
        """Reserve ``count`` more ports for ``owner``; raises Refused, with none reserved, if they do not do."""
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

    def _drop(self, ports: list[int]) -> None:
        for port in ports:
            os.close(self._held.pop(port))

    def _take(self, port: int) -> bool:
        if port in self._held:
            return False
        path = self._directory / str(port)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOENT, errno.EACCES, errno.ENOSPC):
                raise Refused(f"ports cannot be reserved in {self._directory}: {error.strerror}", "no_ports") from None
            return False
        if _lock(descriptor, path) and _is_free(port):
            self._held[port] = descriptor
            return True
        os.close(descriptor)
        return False


def _lock(descriptor: int, path: Path) -> bool:
    """Lock the file, and see that it is still the one of that name: who tidies /tmp may have removed it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


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
