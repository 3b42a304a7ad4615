"""SSH as a transport, by paramiko: one connection, opened at its first use, kept, and shared by all that is done.

A connection that was lost is opened anew by the next use; what was under way on it is lost, and is the caller's to
ask for again.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence

import paramiko

from slurmfork.errors import ConnectionLost, TransportError, one_line
from slurmfork.remote import reach
from slurmfork.remote.auth import KeyRing
from slurmfork.remote.quoting import command_line
from slurmfork.remote.sshchannel import SshChannel, as_socket
from slurmfork.remote.sshconfig import Hop, Settings, SshConfig
from slurmfork.remote.terminal import Terminal
from slurmfork.remote.wire import Wire


class SshTransport:
    """A machine reached by SSH.

    ``name`` is for messages; ``profile`` is the name by which `slurmfork cluster trust` knows it. What is given here
    goes before what ~/.ssh/config says of ``host``. ``tell`` hears of each step of the way that was made; ``accept``
    is asked of a host key that is not known.
    """

    def __init__(
        self,
        host: str,
        *,
        user: str | None = None,
        port: int | None = None,
        identity_file: str | None = None,
        proxy_jump: str | None = None,
        name: str | None = None,
        profile: str | None = None,
        terminal: Terminal | None = None,
        tell: reach.Tell = lambda step, detail: None,
        accept: reach.Accept = lambda settings, key: False,
    ) -> None:
        self.name = name or host
        self._hop = Hop(host, user, port)
        self._given = {"identity_file": identity_file, "proxy_jump": proxy_jump}
        self._terminal = terminal or Terminal()
        self._ring = KeyRing(self._terminal)
        self._profile = profile
        self._tell = tell
        self._accept = accept
        self._opening = threading.Lock()
        self._way: reach.Way | None = None
        self._wire: Wire | None = None

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> SshChannel:
        command = command_line(argv, env)
        wire = self.open()
        channel = self._session(wire)
        limit = threading.Timer(reach.CHANNEL_S, channel.close)  # paramiko's wait for the answer has no other end
        limit.daemon = True
        limit.start()
        try:
            channel.exec_command(command)
        except (EOFError, OSError, paramiko.SSHException) as error:
            channel.close()
            if not wire.is_active():
                raise ConnectionLost(f"the connection to {self.name} was lost") from error
            raise TransportError(
                f"{self.name} does not run commands for this account ({one_line(str(error))}): ask the site"
            ) from error
        finally:
            limit.cancel()
        return SshChannel(channel, self.name)

    def _session(self, wire: Wire) -> paramiko.Channel:
        try:
            return wire.open_session(timeout=reach.CHANNEL_S)
        except paramiko.ChannelException as error:
            raise TransportError(
                f"{self.name} allows no further command on the connection ({one_line(error.text)}: MaxSessions)"
            ) from error
        except (EOFError, OSError, paramiko.SSHException) as error:
            raise ConnectionLost(f"the connection to {self.name} was lost") from error

    def connect(self, host: str, port: int, timeout: float = 10.0) -> socket.socket:
        try:
            return as_socket(reach.open_tunnel(self.open(), host, port, timeout))
        except ConnectionLost as error:
            raise ConnectionLost(f"{self.name}: {error}") from error
        except TransportError as error:
            raise TransportError(f"{self.name}: {error}") from error

    def open(self) -> Wire:
        """The connection, made if there is none; raises TransportError, ConnectionLost."""
        with self._opening:
            if self._wire is None or not self._wire.is_active():
                self._hang_up()
                self._wire = self._new_way().to(self.settings())
            return self._wire

    def look_at_key(self) -> None:
        """Go as far as the host key, which ``accept`` is asked of if it is not known, and not beyond."""
        with self._opening:
            way = self._new_way()
            way.to(self.settings(), log_in=False)
            self._hang_up()

    def settings(self) -> Settings:
        """How the host is reached, by what was given and by ~/.ssh/config."""
        return self._config().settings(self._hop, agent=os.environ.get("SSH_AUTH_SOCK"), **self._given)

    def _config(self) -> SshConfig:
        return SshConfig()

    def _new_way(self) -> reach.Way:
        self._way = reach.Way(
            config=self._config(),
            terminal=self._terminal,
            ring=self._ring,
            profile=self._profile,
            tell=self._tell,
            accept=self._accept,
        )
        return self._way

    def close(self) -> None:
        with self._opening:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._way is not None:
            self._way.close()
        self._way = self._wire = None
