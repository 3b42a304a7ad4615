"""The agent's own door: the API for the workers of this node, on a Unix socket that only this user can open.

All but `/v1/health` goes to the head as it came, with the name of the worker that asked. The HTTP library is
imported when somebody first knocks: most nodes never need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from slurmfork.errors import Refused, Unreachable
from slurmfork.orders import ApiAnswer, ApiCall
from slurmfork.serving import JSON, Answer, read_body, refusal, response, server

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger(__name__)

_BACKLOG = 128
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

AskHead = Callable[[ApiCall], Awaitable[ApiAnswer]]


class Server:
    """Serves on ``path``. ``ask`` passes a call to the head, ``worker_of`` tells whose process a PID is."""

    def __init__(
        self, path: Path, *, ask: AskHead, worker_of: Callable[[int], str | None], health: Callable[[], Any]
    ) -> None:
        self._path = path
        self._ask = ask
        self._worker_of = worker_of
        self._health = health
        self._listening: socket.socket | None = None
        self._http: web.Server | None = None
        self._opening: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def open(self) -> None:
        """Begin to listen; raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listening.bind(str(self._path))
            self._path.chmod(0o600)
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
        self._listening = listening
        asyncio.get_running_loop().add_reader(listening, self._knocked)

    def _knocked(self) -> None:
        """Let who is at the door in; the first one waits until the library is there."""
        assert self._listening is not None
        loop = asyncio.get_running_loop()
        if self._http is None:
            loop.remove_reader(self._listening)
            self._opening = asyncio.ensure_future(self._import())
            return
        with contextlib.suppress(OSError):
            connection, _ = self._listening.accept()
            if self._is_ours(connection):
                connection.setblocking(False)
                self._keep(asyncio.ensure_future(loop.connect_accepted_socket(self._http, connection)))

    async def _import(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, importlib.import_module, "aiohttp.web")
        self._http = server(self._handle)
        if self._listening is not None:
            loop.add_reader(self._listening, self._knocked)

    @staticmethod
    def _is_ours(connection: socket.socket) -> bool:
        pid, uid, _ = _peer(connection)
        if uid == os.geteuid():
            return True
        log.warning("a process of user id %d (pid %d) was turned away from the agent's socket", uid, pid)
        connection.close()
        return False

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "GET" and request.path == "/v1/health":
            body = {**self._health(), "pid": self._peer_pid(request)}
            return response(Answer(200, msgspec.json.encode(body), {"Content-Type": JSON}))
        worker = self._caller(request)
        asked = f"{worker or 'a process'}: {request.method} {request.path_qs}"
        try:
            text = (await read_body(request)).decode()
        except UnicodeDecodeError as error:
            return response(refusal(error, asked))
        except Refused as error:
            answer = response(refusal(error, asked))
            answer.force_close()  # the rest of it may still come
            return answer
        call = ApiCall(method=request.method, path=request.path_qs, body=text, worker=worker)
        return response(await self._pass_on(call, asked))

    async def _pass_on(self, call: ApiCall, asked: str) -> Answer:
        try:
            answer = await self._ask(call)
        except Unreachable as error:
            return refusal(Unreachable(f"the head cannot be reached: {error}"), asked)
        except Exception as error:
            return refusal(error, asked)
        return Answer(answer.status, answer.body.encode(), answer.headers)

    def _caller(self, request: web.BaseRequest) -> str | None:
        pid = self._peer_pid(request)
        return self._worker_of(pid) if pid is not None else None

    @staticmethod
    def _peer_pid(request: web.BaseRequest) -> int | None:
        """Who asks, by the PID that the agent sees, which is not the asker's own where it is in a namespace."""
        connection = request.transport and request.transport.get_extra_info("socket")
        return _peer(connection)[0] if connection else None

    async def close(self) -> None:
        """Close the door; calls that are under way are given up."""
        loop = asyncio.get_running_loop()
        if self._opening is not None:
            self._opening.cancel()
        if self._listening is not None:
            loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        if self._http is not None:
            await self._http.shutdown(0.5)


def _peer(connection: Any) -> tuple[int, int, int]:
    """(pid, uid, gid) of who is at the other end, by the kernel's word."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(data)
    return pid, uid, gid
