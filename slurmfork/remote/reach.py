"""Reaching a host: its address, a connection to it (through others if need be), its key, and the login.

Every step has its time limit. A step that went well is told to whoever listens; one that did not ends the way in one
line that says what to do. What is not the user's fault and did nothing yet (a server that hangs up before the login)
is tried again.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import paramiko

from slurmfork.errors import ConnectionLost, NotOpened, NotReached, TransportError, one_line
from slurmfork.remote.auth import KeyRing, Login
from slurmfork.remote.sshconfig import Settings, SshConfig
from slurmfork.remote.terminal import Terminal
from slurmfork.remote.trust import ShownKey, Trust, UnknownHost
from slurmfork.remote.wire import Wire

HANDSHAKE_S = 15.0
CHANNEL_S = 15.0
_PAUSES = (0.3, 1.0)  # before another try
_JUMPS = 8
Tell = Callable[[str, str], None]
Accept = Callable[[Settings, ShownKey], bool]


class _Dropped(NotOpened):
    """A server hung up before it knew who we are: to try again does no harm, and busy ones do this."""


@dataclass
class Way:
    """What goes for all hops of one way, and what it holds: closing it ends all of them."""

    config: SshConfig
    terminal: Terminal
    ring: KeyRing
    profile: str | None = None
    tell: Tell = lambda step, detail: None
    accept: Accept = lambda settings, key: False  # asked of an unknown host key; True: it is known now
    handshake_s: float = field(default_factory=lambda: HANDSHAKE_S)
    wires: list[Wire] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def to(self, settings: Settings, *, log_in: bool = True) -> Wire:
        """A wire to a host, logged in unless told otherwise; raises TransportError, ConnectionLost."""
        for pause in (*_PAUSES, None):
            try:
                return self._hop(settings, log_in=log_in, depth=0)
            except _Dropped:
                self.close()
                if pause is None:
                    raise
                time.sleep(pause)
            except BaseException:
                self.close()
                raise
        raise AssertionError

    def close(self) -> None:
        """Hang up, the farthest first."""
        while self.wires:
            hang_up(self.wires.pop())
        while self.processes:
            process = self.processes.pop()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(2.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _hop(self, settings: Settings, *, log_in: bool, depth: int) -> Wire:
        trust = Trust.read(settings, self.profile)
        stream = self._stream(settings, depth)
        wire = Wire(stream, first=trust.first_kinds(), certificates=trust.has_authority)
        self.wires.append(wire)
        who = self._name(settings)
        try:
            wire.shake_hands(self.handshake_s)
        except TimeoutError:
            raise NotReached(
                f"{who} takes connections but does not answer: no SSH greeting within {self.handshake_s:.0f} s"
            ) from None
        except (EOFError, OSError) as error:
            raise _Dropped(f"{who} hung up before the login ({_reason(error)})") from error
        except paramiko.SSHException as error:
            if isinstance(error.__context__, (EOFError, ConnectionError)):  # while its greeting was read
                raise _Dropped(f"{who} hung up before the login") from error
            raise TransportError(f"cannot agree with {who} on how to talk: {one_line(str(error))}") from error
        self._check_key(wire, trust)
        if log_in:
            how = Login(wire, settings, who=who, terminal=self.terminal, ring=self.ring).run()
            self.tell("login", f"{settings.user}@{who} by {how}")
            wire.keep_alive()
        return wire

    def _check_key(self, wire: Wire, trust: Trust) -> None:
        key = ShownKey.of(wire.get_remote_server_key())
        try:
            where = trust.check(key)
        except UnknownHost:
            if not self.accept(trust.settings, key):
                raise
            where = "you, just now"
        self.tell("host key", f"{key.words}, known by {where}")

    # --- the stream

    def _stream(self, settings: Settings, depth: int) -> Any:
        if settings.jumps:
            return self._through(settings, depth)
        if settings.proxy_command is not None:
            return self._proxied(settings)
        deadline = time.monotonic() + settings.connect_s
        stream = _first_that_answers(_addresses(settings, self.tell), deadline, self._name(settings))
        self.tell("connection", f"{settings.host} port {settings.port}")
        _watch_over(stream)
        return stream

    def _through(self, settings: Settings, depth: int) -> Any:
        """By the jump hosts, one after another; only the first may have jump hosts of its own, as with ssh."""
        if depth >= _JUMPS:
            raise TransportError(f"the jump hosts of {settings.alias} lead in a circle: see ProxyJump in ~/.ssh/config")
        *before, last = settings.jumps
        jump = self.config.settings(last, agent=settings.agent)
        if before:
            jump = replace(jump, jumps=tuple(before), proxy_command=None)
        wire = self._hop(jump, log_in=True, depth=depth + 1)
        try:
            stream = open_tunnel(wire, settings.host, settings.port, settings.connect_s + CHANNEL_S)
        except (TransportError, TimeoutError) as error:
            raise NotReached(f"cannot reach {self._name(settings)} by {self._name(jump)}: {error}") from error
        self.tell("connection", f"{settings.host} port {settings.port} by {self._name(jump)}")
        return stream

    def _proxied(self, settings: Settings) -> socket.socket:
        assert settings.proxy_command is not None
        ours, theirs = socket.socketpair()
        with theirs:
            command = ["/bin/sh", "-c", "exec " + settings.proxy_command]
            self.processes.append(subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno()))
        self.tell("connection", f"by the ProxyCommand of {settings.alias}")
        return ours

    def _name(self, settings: Settings) -> str:
        return settings.host if settings.port == 22 else f"{settings.host}:{settings.port}"


def open_tunnel(wire: Wire, host: str, port: int, timeout: float) -> paramiko.Channel:
    """A channel to a port, as seen from the other side; raises TransportError, ConnectionLost, TimeoutError."""
    try:
        return wire.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout)
    except paramiko.ChannelException as error:
        if error.code == 1:
            raise TransportError(f"its sshd forbids connections to {host}:{port} (AllowTcpForwarding)") from error
        raise TransportError(f"no connection to {host}:{port} from there: {one_line(error.text)}") from error
    except (EOFError, OSError, paramiko.SSHException) as error:
        if "Timeout" in str(error):
            raise TimeoutError(f"{host}:{port} did not answer in time") from error
        raise ConnectionLost(f"the connection was lost ({_reason(error)})") from error


def hang_up(wire: Wire) -> None:
    """Close a wire at once: its reader is woken, not waited for."""
    with contextlib.suppress(OSError, EOFError):
        wire.sock.shutdown(socket.SHUT_RDWR)
    wire.close()


def _addresses(settings: Settings, tell: Tell) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NotReached(
            f"{settings.host!r} has no address ({_reason(error)}): "
            "check `host` in the profile, and HostName in ~/.ssh/config"
        ) from error
    tell("address", ", ".join(dict.fromkeys(str(address[0]) for *_, address in found)))
    return [(family, address) for family, _, _, _, address in found]


def _first_that_answers(addresses: list[tuple[int, Any]], deadline: float, who: str) -> socket.socket:
    problem: OSError | None = None
    for family, address in addresses:
        stream = socket.socket(family, socket.SOCK_STREAM)
        stream.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            stream.connect(address)
        except OSError as error:
            stream.close()
            problem = problem or error
            continue
        return stream
    if isinstance(problem, TimeoutError):
        raise NotReached(f"{who} does not answer: is the network (or VPN) up, and the port right?") from problem
    raise NotReached(f"cannot connect to {who}: {_reason(problem)}") from problem


def _watch_over(stream: socket.socket) -> None:
    """Have the kernel notice when the other side is gone."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)


def _reason(error: BaseException | None) -> str:
    told = getattr(error, "strerror", None) or (str(error) if error else "")
    return one_line(str(told)) or "it said no more"
