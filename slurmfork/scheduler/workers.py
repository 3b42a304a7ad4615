"""Workers by role: created beside each other or on devices of their own, waited for, found by name, deleted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slurmfork.engine.failures import worker_failed
from slurmfork.errors import (
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
from slurmfork.names import LIVE_STATES, OVER_STATES, UP_STATES, WorkerState, split_target
from slurmfork.run import Run
from slurmfork.scheduler.allocation import Allocation

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


class Workers(Allocation):
    """The workers of a run, whatever they do."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._deleted: set[tuple[str, float | None]] = set()  # by name and start: those that have failed, too

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
        if declared.strategy.target is not None:
            self._views_of(declared.strategy.target)
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
        self._forget(role)
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

        ``role`` may be one worker, as role/index. What was forked beside them lives on, unless it lives in their
        processes. Raises WorkerNotFound; StillAlive, naming what would not die.
        """
        if role is None:
            self._delete_all(grace)
            return
        views = self._views_of(role)
        reply = self.run.stop(role, grace=grace)
        self._deleted |= {(view.worker, view.started) for view in views}
        self._forget(split_target(role)[0])
        if reply.survivors:
            left = [line for result in reply.results for line in result.survivors]
            raise StillAlive(f"{reply.survivors} processes of {role} would not die: {'; '.join(left)}")

    def _delete_all(self, grace: float | None) -> None:
        left = []
        roles = dict.fromkeys(view.role for view in self._views() if view.state in LIVE_STATES)
        for role in sorted(roles, key=self._depth, reverse=True):
            try:
                self.delete_workers(role, grace=grace)
            except WorkerNotFound:  # with its target, or by itself
                continue
            except StillAlive as error:  # of which the others' end must not depend
                left.append(str(error))
        if left:
            raise StillAlive("; ".join(left))

    def allocate_ports(self, worker: str, count: int = 1) -> list[int]:
        """Reserve further ports on a worker's node; they are its own until it ends. Raises PortAllocationError."""
        self._view(worker)
        try:
            return self.run.ports(worker, count)
        except Refused as error:
            if error.kind == "unknown":
                raise WorkerNotFound(worker, str(error)) from error
            raise PortAllocationError(worker, count, str(error)) from error
        except (UsageError, Unreachable) as error:
            raise PortAllocationError(worker, count, str(error)) from error

    # --- finding

    def _views_of(self, key: str) -> list[WorkerView]:
        """The workers that ``role`` or ``role/index`` names; raises WorkerNotFound unless they were created.

        What was deleted counts as never created, a worker that has failed does not.
        """
        try:
            role, index = split_target(key)
        except (ValueError, TypeError):
            raise WorkerNotFound(key, f"{key!r} is neither a role nor a worker (role/index)") from None
        there = [view for view in self._views(role) if view.state is not WorkerState.STOPPED]
        there = [
            view for view in there if (view.worker, view.started) not in self._deleted or view.state in LIVE_STATES
        ]
        views = [view for view in there if index in (None, view.index)]
        if not views:
            declared = " (it is declared: create_workers makes it)" if role in self._spec.roles and not there else ""
            raise WorkerNotFound(key, f"run {self.run.run_id} has no worker {key!r}{declared}")
        return views

    def _view(self, worker: str) -> WorkerView:
        """The one that ``role/index`` names; raises WorkerNotFound, of a role too."""
        views = self._views_of(worker)
        if "/" not in worker:
            raise WorkerNotFound(worker, f"{worker!r} is a role: name one worker of it, as {worker}/0")
        return views[0]

    def _depth(self, role: str) -> int:
        """How many roles stand between a role and devices of its own; 1 more for one that the spec does not have."""
        declared = self._spec.roles.get(role)
        if declared is None:
            return len(self._spec.roles)
        return 1 + self._depth(declared.strategy.target or "") if declared.colocated else 0

    def _forget(self, role: str) -> None:
        """The workers of a role are not those that they were."""


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
