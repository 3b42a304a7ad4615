"""What a worker knows of itself, and asks of its run: ``slurmfork.current()``.

Standard library and msgspec only: it is imported into the user's own program. Everything is asked of the agent of
this node, over the Unix socket that only this user can open; nothing is cached.
"""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from slurmfork import names
from slurmfork.errors import Refused, Unreachable, UsageError
from slurmfork.messages import (
    ErrorReply,
    ForkReply,
    PortsReply,
    PortsRequest,
    StatusView,
    StopReply,
    StopRequest,
    WorkersReply,
    WorkerView,
    checked,
    fork_request,
    new_request_id,
)
from slurmfork.notify import notify

if TYPE_CHECKING:
    from slurmfork.engine.role import Role
    from slurmfork.run import Run

T = TypeVar("T")

ANSWER_TIMEOUT_S = 60.0
LONGEST_WAIT_S = 7 * 86_400.0  # for what the head bounds itself: readiness of children, graces of workers
_MARGIN_S = 60.0


def current() -> CurrentWorker:
    """The worker that this process is, or belongs to; raises UsageError where it belongs to none."""
    missing = [name for name in (names.WORKER, names.AGENT, names.RUN_ID) if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"this process is not a worker of a run ({missing[0]} is not set): "
            "slurmfork.current() works in what a role's command starts; elsewhere use slurmfork.Run.load(RUN)"
        )
    return CurrentWorker(os.environ)


class CurrentWorker:
    """A worker from the inside. Methods that ask raise Refused (with the reason), Unreachable, UsageError."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.name = environment[names.WORKER]
        self.run_id = environment[names.RUN_ID]
        role, index = names.split_target(self.name)
        self.role = role
        self.index = index or 0

    def __repr__(self) -> str:
        return f"<worker {self.name} of run {self.run_id}>"

    # --- what it was given

    @property
    def node(self) -> str:
        """The node that it runs on."""
        return self._environment.get(names.NODE, "")

    @property
    def run_dir(self) -> str:
        """The run directory, shared by all nodes."""
        return self._environment.get(names.RUN_DIR, "")

    @property
    def target(self) -> str | None:
        """The worker beside which this one was forked; None where it was not."""
        return self._environment.get(names.TARGET) or None

    @property
    def rank(self) -> int:
        """Its rank in its role, from 0."""
        return int(self._environment.get("RANK", "0"))

    @property
    def world_size(self) -> int:
        """Workers of its role in all."""
        return int(self._environment.get("WORLD_SIZE", "1"))

    @property
    def local_rank(self) -> int:
        """Its rank among those of its role on this node, from 0."""
        return int(self._environment.get("LOCAL_RANK", "0"))

    @property
    def host_pid(self) -> int:
        """The PID of this process as the node sees it, which `ps` shows; in a namespace `os.getpid()` is another."""
        return self._ask("GET", "/v1/health", None, _Answered).pid

    # --- what it can ask

    def fork(
        self,
        role: str,
        *,
        target: str | None = None,
        count: int = 1,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> list[WorkerView]:
        """Start children beside ``target`` (left out: beside this worker); returns them when all are up.

        ``command`` and ``target`` may be left out where the spec's role has them. All are started, or none.
        """
        request = fork_request(role, target=target or self.name, count=count, env=env, command=command, timeout=timeout)
        patience = LONGEST_WAIT_S if timeout is None else timeout + _MARGIN_S
        return self._ask("POST", "/v1/fork", request, ForkReply, timeout=patience).workers

    def stop(self, target: str, *, grace: float | None = None) -> StopReply:
        """Stop a role or a worker (``role/index``) with all that it started; returns when it is gone."""
        request = checked(StopRequest(target=target, request_id=new_request_id(), grace=grace))
        return self._ask("POST", "/v1/stop", request, StopReply, timeout=LONGEST_WAIT_S)

    def ports(self, count: int = 0) -> list[int]:
        """The ports that its role reserves for it; with ``count``, so many further ones, its own until it ends."""
        if count == 0:
            return [int(port) for port in self._environment.get(names.PORTS, "").split(",") if port]
        request = checked(PortsRequest(worker=self.name, count=count))
        return self._ask("POST", "/v1/ports", request, PortsReply).ports

    def status(self) -> StatusView:
        """The whole run as its head sees it."""
        return self._ask("GET", "/v1/status", None, StatusView)

    def workers(self, role: str | None = None) -> list[WorkerView]:
        """All workers of the run, or of one role."""
        views = self._ask("GET", "/v1/workers", None, WorkersReply).workers
        return [view for view in views if role in (None, view.role)]

    def engines(self, role: str) -> Role:
        """The workers of a role that hosts engines, to call their methods; all of them have to be up."""
        from slurmfork.engine.role import Role, packages_of
        from slurmfork.rundir import RunDir
        from slurmfork.spec.model import Spec

        rundir = RunDir(Path(self.run_dir))
        spec = rundir.read_record(rundir.spec, Spec)
        return Role(self, role, packages_of(spec) if spec else frozenset())

    @property
    def run(self) -> Run:
        """Its run as those outside have it, and a controller: ``slurmfork.Scheduler(run=slurmfork.current().run)``."""
        from slurmfork.run import Run

        return Run.load(self.run_id, Path(self.run_dir).parent)

    @property
    def credentials_directory(self) -> Path:
        """Where the run's certificates are."""
        return Path(self.run_dir) / "credentials"

    def engine_views(self, role: str) -> list[WorkerView]:
        """The workers of a role, as they stand now."""
        return self.workers(role)

    def ready(self, status: str = "") -> bool:
        """Say that this worker is ready (and ``status``, a line for people); False where nobody asks for that."""
        text = "READY=1" + (f"\nSTATUS={' '.join(status.split())}" if status else "")
        return notify(text, self._environment)

    # --- transport

    def _ask(self, method: str, path: str, body: Any, kind: type[T], *, timeout: float = ANSWER_TIMEOUT_S) -> T:
        connection = _UnixConnection(self._environment[names.AGENT], timeout)
        data = b"" if body is None else msgspec.json.encode(body)
        try:
            connection.request(method, path, body=data, headers={"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"the agent of this node does not answer: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise _refusal(response.status, answer)
        return msgspec.json.decode(answer, type=kind)


class _Answered(msgspec.Struct):
    """What an agent says of who asks for its health."""

    pid: int


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """As the base class has it, but to a Unix socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _refusal(status: int, body: bytes) -> Refused | Unreachable:
    try:
        reply = msgspec.json.decode(body, type=ErrorReply)
    except msgspec.DecodeError:
        return Refused(f"the agent answered {status}: {body[:200].decode(errors='replace')}", "internal")
    if reply.kind == "unreachable":
        return Unreachable(reply.error)
    return Refused(reply.error, reply.kind, reply.workers)
