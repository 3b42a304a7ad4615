"""The scheduler API, which a training controller programs against: the same on every backend.

    with slurmfork.Scheduler("loop.yaml", backend="slurm") as scheduler:
        scheduler.create_workers("rollout")
        scheduler.fork_workers("eval", "rollout")
        scheduler.create_engine("rollout/0", "package.module:Class", "policy", seed=7)
        scheduler.call_engine("rollout/0", "generate", prompts, engine="policy")

A scheduler is one run, and the run is the allocation: its spec declares every role that has devices of its own, with
``autostart: false`` for those that are created when the controller asks, in any order, deleted, and created again.
What is forked beside a role takes no devices, and need not be declared. Raises, beside SlurmforkError's other kinds:
WorkerCreationError, WorkerFailed (exit status, end of the log), WorkerTimeout, WorkerNotFound, PortAllocationError,
and EngineError with those below it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slurmfork.engine.failures import worker_failed
from slurmfork.engine.handle import Codec, up
from slurmfork.engine.handle import Worker as Handle
from slurmfork.engine.role import Role, packages_of
from slurmfork.errors import (
    EngineError,
    PortAllocationError,
    Refused,
    StillAlive,
    Unreachable,
    UsageError,
    WorkerCreationError,
    WorkerNotFound,
    WorkerTimeout,
)
from slurmfork.messages import WorkerView
from slurmfork.names import LIVE_STATES, OVER_STATES, UP_STATES, RunState, WorkerState, split_target
from slurmfork.run import Run
from slurmfork.spec.model import Spec

if TYPE_CHECKING:
    from slurmfork.messages import CancelReply

ENVIRONMENT = "slurmfork.environment"  # the engine by which set_worker_env reaches a process
_BARE = "slurmfork.engine.bare:Bare"
_LOOK_S = 0.05


@dataclass(frozen=True)
class Worker:
    """A worker that is up. ``id`` is ``role/index``, ``address`` its node's IP address.

    ``ports`` are those of the role's spec, ``gpus`` the node's numbers of its devices, ``target`` beside whom it is.
    """

    id: str
    role: str
    index: int
    node: str
    address: str
    pid: int | None
    ports: tuple[int, ...]
    gpus: tuple[int | str, ...]
    target: str | None


class Scheduler:
    """The workers of one run, created, called and deleted by role. May be used from any thread.

    ``spec`` is the path of a spec, or a Spec; the other arguments are those of ``slurmfork.submit``. As a context
    manager it ends the run, and raises StillAlive if anything of it is left.
    """

    def __init__(
        self,
        spec: Spec | str | os.PathLike[str] | None = None,
        *,
        backend: str | None = None,
        root: str | os.PathLike[str] | None = None,
        overrides: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        run: Run | None = None,
    ) -> None:
        if (spec is None) == (run is None):
            raise UsageError("a scheduler is of a spec, which it submits, or of a run that was submitted: give one")
        if run is None:
            from slurmfork.submission import submit

            assert spec is not None
            run = submit(spec, backend=backend, root=root, overrides=overrides, environment=environment)
        self.run = run
        self._spec = run.spec()
        self._packages = packages_of(self._spec)
        self._handles: dict[str, Handle] = {}
        self._lock = threading.Lock()
        self._allocated = False

    def __repr__(self) -> str:
        return f"<scheduler of run {self.run.run_id}>"

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reply = self.close()
        if reply.survivors and error is None:
            raise StillAlive(f"{reply.survivors} processes of run {self.run.run_id} are left: {reply.details}")

    def close(self) -> CancelReply:
        """End the run, and verify: ``survivors`` counts what is left. A run that is over is left as it is."""
        self._handles.clear()
        return self.run.cancel("its controller is done")

    # --- the allocation

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the nodes are there and all that starts by itself is up, however long the queue takes.

        Every other method does so by itself, without a limit. Raises WorkerTimeout, WorkerCreationError.
        """
        if self._allocated:
            return
        try:
            status = self.run.wait("ready", timeout)
        except TimeoutError as error:
            raise WorkerTimeout(self.run.run_id, timeout or 0.0, str(error)) from None
        if status.state is not RunState.READY:
            failed = [view for view in self._views() if view.exit_status]
            raise WorkerCreationError(f"run {self.run.run_id}", status.reason, kind=str(status.state), workers=failed)
        self._allocated = True

    @property
    def n_gpus_per_node(self) -> int:
        """GPUs of each node of the allocation; the fewest, where they differ."""
        self.wait()
        return min((len(node.devices) for node in self.run.status().nodes), default=0)

    # --- workers

    def create_workers(
        self, role: str, *, env: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> list[str]:
        """Create the workers of a role of the spec, all or none; their ids, once they are up.

        A role with ``strategy: {type: colocation}`` goes beside its target. One that starts by itself is waited for.
        """
        declared = self._spec.roles.get(role)
        if declared is None:
            raise WorkerNotFound(role, f"the spec has no role {role!r}: there are {', '.join(self._spec.roles)}")
        self.wait()
        if declared.autostart and env is None and any(view.state in LIVE_STATES for view in self._views(role)):
            return [worker.id for worker in self.get_workers(role, timeout)]
        return self._create(role, env=env, timeout=timeout)

    def fork_workers(
        self,
        role: str,
        target: str,
        *,
        command: Sequence[str] | None = None,
        count: int = 1,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> list[str]:
        """Create ``count`` workers of ``role`` beside each worker of ``target`` (a role, or role/index); their ids.

        They share the target's devices and have its environment, and a process of their own, unless the spec says
        ``fork: false``. ``command``: of a role that the spec does not have, or in place of its own.
        """
        self.wait()
        self._views_of(target)
        return self._create(role, target=target, command=command, count=count, env=env, timeout=timeout)

    def _create(self, role: str, *, timeout: float | None, **how: Any) -> list[str]:
        try:
            views = self.run.fork(role, timeout=timeout, **how)
        except Refused as error:
            failed = error.detail if isinstance(error.detail, list) else []
            if error.kind == "timeout":
                raise WorkerTimeout(role, timeout or 0.0, str(error)) from error
            raise WorkerCreationError(role, str(error), kind=error.kind, workers=failed) from error
        with self._lock:
            for view in views:
                self._handles.pop(view.worker, None)
        return [view.worker for view in views]

    def get_workers(self, role: str, timeout: float | None = None) -> list[Worker]:
        """The workers of a role, once all of them are up: those that restart are waited for, ``timeout`` seconds.

        Raises WorkerNotFound, WorkerFailed for one that has ended, WorkerTimeout.
        """
        self.wait(timeout)
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            views = self._views_of(role)
            if over := [view for view in views if view.state in OVER_STATES]:
                raise worker_failed(over[0])
            if all(view.state in UP_STATES for view in views):
                break
            if until is not None and time.monotonic() >= until:
                late = ", ".join(f"{view.worker} is {view.state}" for view in views if view.state not in UP_STATES)
                raise WorkerTimeout(role, timeout or 0.0, f"not up within {timeout:g} s: {late}")
            time.sleep(_LOOK_S)
        addresses = {node.node: node.address for node in self.run.status().nodes}
        return [_worker(view, addresses.get(view.node or "", "")) for view in views]

    def delete_workers(self, role: str | None = None, *, grace: float | None = None) -> None:
        """Stop the workers of a role (or of all roles, what is forked first) with all below them; gone on return.

        What was forked beside them lives on, unless it lives in their processes. Raises WorkerNotFound; StillAlive,
        naming what would not die.
        """
        if role is None:
            roles = dict.fromkeys(view.role for view in self._views() if view.state in LIVE_STATES)
            for one in sorted(roles, key=self._depth, reverse=True):
                self.delete_workers(one, grace=grace)
            return
        self._views_of(role)
        reply = self.run.stop(role, grace=grace)
        with self._lock:
            for worker in [name for name in self._handles if split_target(name)[0] == split_target(role)[0]]:
                del self._handles[worker]
        if reply.survivors:
            left = [line for result in reply.results for line in result.survivors]
            raise StillAlive(f"{reply.survivors} processes of {role} would not die: {'; '.join(left)}")

    def _depth(self, role: str) -> int:
        """How many roles stand between a role and devices of its own; 1 more for one that the spec does not have."""
        declared = self._spec.roles.get(role)
        if declared is None:
            return len(self._spec.roles)
        return 1 + self._depth(declared.strategy.target or "") if declared.colocated else 0

    # --- what a worker has

    def set_worker_env(self, worker: str, env: Mapping[str, str]) -> None:
        """Set variables in the process of a worker that hosts engines, for the engines that are created after.

        What a process reads when it begins is given by ``env`` of ``create_workers``. A restart forgets it.
        """
        handle = self._handle(worker)
        with suppress(EngineError):
            handle.create_engine(ENVIRONMENT, _BARE)
        handle.call("set_environment", dict(env), engine=ENVIRONMENT)

    def allocate_ports(self, worker: str, count: int = 1) -> list[int]:
        """Reserve further ports on a worker's node; they are its own until it ends. Raises PortAllocationError."""
        self._views_of(worker)
        try:
            return self.run.ports(worker, count)
        except Refused as error:
            if error.kind == "unknown":
                raise WorkerNotFound(worker, str(error)) from error
            raise PortAllocationError(worker, count, str(error)) from error
        except (UsageError, Unreachable) as error:
            raise PortAllocationError(worker, count, str(error)) from error

    # --- engines

    def create_engine(self, worker: str, path: str, name: str, *args: Any, **kwargs: Any) -> None:
        """Make an object of ``package.module:Class`` in a worker's process, to be called by ``engine=name``.

        Raises what its making raised, with the remote traceback as the cause, ImportError included.
        """
        with self._lock:
            self._packages |= {path.partition(":")[0].partition(".")[0]}
            self._handles.pop(worker, None)  # its results may hold what is of that package
        self._handle(worker).create_engine(name, path, *args, **kwargs)

    def remove_engine(self, worker: str, name: str) -> None:
        """Have an engine close itself, and forget it; raises EngineNotFound."""
        self._handle(worker).remove_engine(name)

    def call_engine(
        self,
        worker: str,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> Any:
        """Call a method of a worker's engine (left out: its role's own) and return its result. It is sent once."""
        return self._handle(worker).call(method, *args, engine=engine, timeout=timeout, codec=codec, **kwargs)

    async def async_call_engine(
        self,
        worker: str,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> Any:
        """The same for a program with an event loop; cancelling it cancels the call."""
        import asyncio

        handle = await asyncio.get_running_loop().run_in_executor(None, self._handle, worker)
        return await handle.acall(method, *args, engine=engine, timeout=timeout, codec=codec, **kwargs)

    def submit_call(
        self,
        worker: str,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> Future[Any]:
        """Begin a call; its future, whose ``cancel`` reaches the engine."""
        return self._handle(worker).submit(method, *args, engine=engine, timeout=timeout, codec=codec, **kwargs)

    def role(self, role: str) -> Role:
        """All workers of a role as one: calls on all, scattered, awaited, streamed."""
        self.wait()
        self._views_of(role)
        return Role(self.run, role, self._packages)

    def health(self, worker: str, timeout: float | None = 10.0) -> dict[str, Any]:
        """What a worker's engines are doing, and since when; answered while a method runs, or hangs."""
        return self._handle(worker).health(timeout)

    # --- looking

    def _views(self, role: str | None = None) -> list[WorkerView]:
        return self.run.workers(role)

    def _views_of(self, key: str) -> list[WorkerView]:
        """The workers that ``role`` or ``role/index`` names; raises WorkerNotFound unless they were created.

        What was deleted counts as never created, a worker that has failed does not.
        """
        try:
            role, index = split_target(key)
        except ValueError:
            raise WorkerNotFound(key, f"{key!r} is neither a role nor a worker (role/index)") from None
        views = [view for view in self._views(role) if index in (None, view.index)]
        if all(view.state is WorkerState.STOPPED for view in views):
            declared = " (it is declared: create_workers makes it)" if role in self._spec.roles else ""
            raise WorkerNotFound(key, f"run {self.run.run_id} has no worker {key!r}{declared}")
        return views

    def _handle(self, worker: str) -> Handle:
        found = self._handles.get(worker)
        if found is not None:
            return found
        self.wait()
        views = self._views_of(worker)
        if "/" not in worker:
            raise WorkerNotFound(worker, f"{worker!r} is a role: calls go to one worker, as {worker}/0")
        with self._lock:
            handle = self._handles[worker] = Handle(self.run, up(views[0]), self._packages)
        return handle


def _worker(view: WorkerView, address: str) -> Worker:
    return Worker(
        id=view.worker,
        role=view.role,
        index=view.index,
        node=view.node or "",
        address=address,
        pid=view.pid,
        ports=tuple(view.ports),
        gpus=tuple(view.gpus),
        target=view.target,
    )
