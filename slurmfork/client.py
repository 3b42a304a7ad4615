"""The client: speaks the API to a run's head, over one connection that it holds, under mutual TLS.

Standard library only: it is on the path of every command. A request that was lost with its connection is sent
again only where that is harmless (reads, and requests that carry a request id). While a request may take long, the
head is asked now and then on a second connection whether it lives.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from slurmfork import credentials, silence
from slurmfork.errors import Refused, SlurmforkError, Unreachable
from slurmfork.messages import (
    CancelReply,
    CancelRequest,
    ErrorReply,
    Event,
    ForkReply,
    ForkRequest,
    Health,
    PortsReply,
    PortsRequest,
    SignalReply,
    SignalRequest,
    StatusView,
    StopReply,
    StopRequest,
    WorkersReply,
    WorkerView,
)

T = TypeVar("T")

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 30.0
LONG_TIMEOUT = 7 * 86_400.0  # a fork waits for readiness, a cancel for graces: the head bounds both
SILENCE = 15.0  # seconds without any word after which a head counts as silent
PROBE_INTERVAL = 3.0


class Client:
    """A connection to the head of one run; opened at the first request, closed by ``close`` or ``with``.

    ``addresses`` are tried in order. Raises Unreachable where no head answers, Refused where it says no.
    """

    def __init__(self, addresses: Sequence[str], port: int, directory: Path, run_id: str) -> None:
        self._addresses = list(addresses)
        self._port = port
        self._directory = directory
        self._run_id = run_id
        self._context: ssl.SSLContext | None = None
        self._connection: _OneWrite | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- verbs

    def health(self, timeout: float = READ_TIMEOUT) -> Health:
        """GET /v1/health."""
        return self._ask("GET", "/v1/health", None, Health, timeout=timeout)

    def status(self, *, workers: bool = True, timeout: float = READ_TIMEOUT) -> StatusView:
        """GET /v1/status."""
        return self._ask("GET", "/v1/status" + ("" if workers else "?workers=0"), None, StatusView, timeout=timeout)

    def workers(self) -> list[WorkerView]:
        """GET /v1/workers."""
        return self._ask("GET", "/v1/workers", None, WorkersReply).workers

    def fork(self, request: ForkRequest) -> ForkReply:
        """POST /v1/fork; returns when the children are up. Refused.detail lists the workers that failed."""
        return self._ask("POST", "/v1/fork", request, ForkReply, timeout=LONG_TIMEOUT, repeat=True)

    def stop(self, request: StopRequest) -> StopReply:
        """POST /v1/stop; returns when they are gone."""
        again = request.request_id is not None
        return self._ask("POST", "/v1/stop", request, StopReply, timeout=LONG_TIMEOUT, repeat=again)

    def signal(self, request: SignalRequest) -> list[str]:
        """POST /v1/signal; the names of the workers that were signalled."""
        return self._ask("POST", "/v1/signal", request, SignalReply).signalled

    def ports(self, request: PortsRequest) -> list[int]:
        """POST /v1/ports; the ports that were reserved."""
        return self._ask("POST", "/v1/ports", request, PortsReply).ports

    def cancel(self, request: CancelRequest) -> CancelReply:
        """POST /v1/cancel; returns when nothing of the run is left on any node that could be asked."""
        return self._ask("POST", "/v1/cancel", request, CancelReply, timeout=LONG_TIMEOUT, repeat=True)

    def events(self, since: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """Events after number ``since`` as they happen, until the head goes away.

        Raises TimeoutError when none came for ``timeout`` seconds.
        """
        connection = self._open(timeout or LONG_TIMEOUT)
        try:
            connection.request("GET", f"/v1/events?follow=1&since={since}")
            response = connection.getresponse()
            if response.status != 200:
                raise _refusal(response.status, response.read())
            while line := response.readline():
                yield msgspec.json.decode(line, type=Event)
        except TimeoutError:
            raise TimeoutError from None
        except (OSError, http.client.HTTPException):
            return  # the head is gone: so is the stream
        finally:
            connection.close()

    # --- transport

    def _ask(
        self,
        method: str,
        path: str,
        body: Any,
        kind: type[T],
        *,
        timeout: float = READ_TIMEOUT,
        repeat: bool = False,
    ) -> T:
        data = None if body is None else msgspec.json.encode(body)
        status, answer = self._exchange(method, path, data, timeout, repeat=repeat or method == "GET")
        if status != 200:
            raise _refusal(status, answer)
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.DecodeError as error:  # of another version, perhaps
            raise Refused(f"the answer of the head of run {self._run_id} makes no sense: {error}", "internal") from None

    def _exchange(
        self, method: str, path: str, data: bytes | None, timeout: float, *, repeat: bool
    ) -> tuple[int, bytes]:
        fresh = self._connection is None
        try:
            return self._once(method, path, data, timeout)
        except TimeoutError:
            self.close()
            raise Unreachable(f"the head of run {self._run_id} does not answer") from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if fresh or not repeat:
                raise Unreachable(f"the head of run {self._run_id} cannot be reached: {error}") from None
        return self._exchange(method, path, data, timeout, repeat=False)  # a held connection had gone stale

    def _once(self, method: str, path: str, data: bytes | None, timeout: float) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = self._open(timeout)
        tls = self._connection.sock
        assert tls is not None
        tls.settimeout(timeout)
        self._connection.request(method, path, body=data)
        response = self._answer(self._connection, patient=timeout > READ_TIMEOUT)
        answer = response.read()
        if response.will_close:
            self.close()
        return response.status, answer

    def _answer(self, connection: _OneWrite, *, patient: bool) -> http.client.HTTPResponse:
        """The beginning of the answer. ``patient``: it may take long, and meanwhile the head is asked whether it lives.

        Raises TimeoutError once it gives no sign of life on another connection either.
        """
        connection.flush()
        heard = time.monotonic()
        while patient and not select.select([connection.sock], [], [], PROBE_INTERVAL)[0]:
            with Client(self._addresses, self._port, self._directory, self._run_id) as probe:
                try:
                    probe.health(timeout=max(0.1, heard + SILENCE - time.monotonic()))
                    heard = time.monotonic()
                except SlurmforkError:
                    if time.monotonic() + PROBE_INTERVAL >= heard + SILENCE:
                        raise TimeoutError from None
        return connection.getresponse()

    def _open(self, timeout: float) -> _OneWrite:
        if self._context is None:
            self._context = credentials.client_context(self._directory)
        name = credentials.server_name(self._run_id)
        failure: OSError | None = None
        for address in self._addresses:
            try:
                raw = socket.create_connection((address, self._port), min(timeout, CONNECT_TIMEOUT))
            except OSError as error:
                failure = error
                continue
            silence.notice(raw, int(SILENCE))
            raw.settimeout(min(timeout, SILENCE))
            try:
                tls = self._context.wrap_socket(raw, server_hostname=name)
            except BaseException:
                raw.close()
                raise
            tls.settimeout(timeout)
            connection = _OneWrite(name, self._port)
            connection.sock = tls
            return connection
        raise failure or OSError("the head has no address")


class _OneWrite(http.client.HTTPConnection):
    """Sends head and body of a request together: apart they wake the other side twice."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self._unsent = b""

    def send(self, data: Any) -> None:
        """Keep it until the answer is asked for."""
        self._unsent += data

    def flush(self) -> None:
        """Send what was kept."""
        unsent, self._unsent = self._unsent, b""
        if unsent:
            self.sock.sendall(unsent)

    def getresponse(self) -> http.client.HTTPResponse:
        """Send what was kept, and read the beginning of the answer."""
        self.flush()
        return super().getresponse()


def _refusal(status: int, body: bytes) -> Refused:
    with contextlib.suppress(msgspec.DecodeError):
        reply = msgspec.json.decode(body, type=ErrorReply)
        return Refused(reply.error, reply.kind, reply.workers)
    return Refused(f"the head answered {status}: {body[:200].decode(errors='replace')}", "internal")
