"""The door of a host: where callers come in, by a Unix socket of this user or by TCP with the run's certificates.

The TLS context is made when the first one knocks at the TCP port, as most hosts never need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import weakref
from pathlib import Path

from slurmfork.engine import wire
from slurmfork.engine.channel import Channel, abandon
from slurmfork.engine.hosted import Engines
from slurmfork.engine.hosting import TLS, UNIX, Hosting
from slurmfork.engine.inbox import Arrived
from slurmfork.engine.session import Session
from slurmfork.engine.tls import TlsChannel
from slurmfork.engine.unix import UnixChannel, peer_uid
from slurmfork.errors import CodecError

log = logging.getLogger(__name__)

LINGER_S = 30.0  # for which a caller whose connection was lost may come back
_BACKLOG = 512


class Door:
    """Lets callers in, and keeps their sessions."""

    def __init__(self, hosting: Hosting, engines: Engines) -> None:
        self._hosting = hosting
        self._engines = engines
        self._sessions: dict[str, Session] = {}
        self._loop = asyncio.get_running_loop()
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._tcp: socket.socket | None = None
        self._opening: asyncio.Task[None] | None = None
        self._server: asyncio.Server | None = None
        self._closed = False
        self._visits: set[_Visit] = set()
        disown = weakref.WeakMethod(self._disown)
        os.register_at_fork(after_in_child=lambda: (found := disown()) and found())

    def open(self) -> list[str]:
        """Begin to listen; the endpoints, the quickest first. Raises OSError."""
        path = self._hosting.socket
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108 (of an earlier start of this worker)
        umask = os.umask(0o177)
        try:
            self._unix.bind(path)
        finally:
            os.umask(umask)
        self._unix.listen(_BACKLOG)
        self._unix.setblocking(False)
        self._loop.add_reader(self._unix, self._knocked)
        endpoints = [UNIX + path]
        address = self._hosting.address
        if address:
            self._tcp = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
            self._tcp.bind((address, 0))
            self._tcp.listen(_BACKLOG)
            self._tcp.setblocking(False)
            self._loop.add_reader(self._tcp, self._knocked_at_tcp)
            shown = f"[{address}]" if ":" in address else address
            endpoints.append(f"{TLS}{shown}:{self._tcp.getsockname()[1]}")
        return endpoints

    def _knocked(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._unix.accept()
            if peer_uid(connection) != os.geteuid():
                log.warning("a process of user id %d was turned away", peer_uid(connection))
                connection.close()
                return
            visit = _Visit(self)
            visit.channel = UnixChannel(connection, visit.take, visit.lost)
            self._visits.add(visit)

    def _knocked_at_tcp(self) -> None:
        assert self._tcp is not None
        self._loop.remove_reader(self._tcp)
        self._opening = asyncio.ensure_future(self._open_tcp(self._tcp))

    async def _open_tcp(self, listening: socket.socket) -> None:
        from slurmfork import credentials

        directory = Path(self._hosting.run_dir) / "credentials"
        context = await self._loop.run_in_executor(None, credentials.engine_context, directory)

        def let_in(channel: TlsChannel) -> None:
            if (who := credentials.holder(channel.fact("ssl_object"))) != credentials.CLIENT:
                log.warning("turned away: the peer's certificate is of %r, not of a client", who)
                channel.close()

        def made() -> TlsChannel:
            visit = _Visit(self)
            channel = visit.channel = TlsChannel(visit.take, visit.lost, let_in)
            self._visits.add(visit)
            return channel

        self._server = await self._loop.create_server(made, sock=listening, ssl=context, ssl_handshake_timeout=60)

    def enter(self, visit: _Visit, hello: wire.Hello) -> Session:
        """Somebody said who it is; raises CodecError if it means another run."""
        if hello.run_id != self._hosting.run_id:
            raise CodecError(f"a caller of run {hello.run_id} has come")
        session = self._sessions.get(hello.session)
        if session is None:
            session = self._sessions[hello.session] = Session(self._engines)
        assert visit.channel is not None
        session.join(visit.channel)
        visit.channel.send(wire.frame(wire.Welcome(self._hosting.worker, os.getpid())))
        return session

    def left(self, visit: _Visit, name: str) -> None:
        """A connection is gone: its session waits for another for a while."""
        self._visits.discard(visit)
        session = self._sessions.get(name)
        if session is not None and visit.channel is not None and session.leave(visit.channel):
            self._loop.call_later(LINGER_S if visit.channel.lender is None else 0, self._forget, name, session)

    def _forget(self, name: str, session: Session) -> None:
        if session.deserted and self._sessions.get(name) is session:
            del self._sessions[name]
            session.close()

    def _disown(self) -> None:
        """What an engine forks (a loader, say) must not keep callers from hearing that this process has ended."""
        abandon(self._unix, self._tcp)
        for visit in self._visits:
            if visit.channel is not None:
                visit.channel.disown()

    def close(self) -> None:
        """Let nobody in any more, and see those out who are in; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._unix)
        self._unix.close()
        with contextlib.suppress(OSError):
            os.unlink(self._hosting.socket)  # noqa: PTH108
        if self._opening is not None:
            self._opening.cancel()
        elif self._tcp is not None:
            self._loop.remove_reader(self._tcp)
        if self._server is not None:
            self._server.close()
        if self._tcp is not None:
            self._tcp.close()
        for visit in list(self._visits):
            if visit.channel is not None:
                visit.channel.close()


class _Visit:
    """One connection, whose first word must be ``Hello``."""

    def __init__(self, door: Door) -> None:
        self.channel: Channel | None = None
        self._door = door
        self._name = ""
        self._session: Session | None = None

    def take(self, arrived: Arrived) -> None:
        if self._session is not None:
            self._session.take(arrived)
        elif isinstance(arrived.message, wire.Hello):
            self._name = arrived.message.session
            self._session = self._door.enter(self, arrived.message)
        else:
            raise CodecError("a caller says hello first")

    def lost(self, why: str) -> None:
        log.debug("a caller is gone: %s", why)
        self._door.left(self, self._name)
