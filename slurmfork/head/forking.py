"""The fork RPC: children started beside each target, or a role on devices kept for it; all of them or none.

Decides what may be forked, and where. Starting and stopping are ``head.workers``'; what a failure means for the run
is ``head.ending``'s.
"""

from __future__ import annotations

import asyncio
import difflib

import msgspec

from slurmfork import plan
from slurmfork.errors import Refused, SlurmforkError
from slurmfork.head.table import Table
from slurmfork.head.workers import Workers, views_of
from slurmfork.messages import ForkReply, ForkRequest
from slurmfork.names import OVER_STATES, UP_STATES, RunState, WorkerState
from slurmfork.plan import Placement
from slurmfork.spec import Role, Strategy


class Forks:
    """Serves fork requests, one at a time for each role."""

    def __init__(self, table: Table, workers: Workers) -> None:
        self._table = table
        self._workers = workers

    async def fork(self, request: ForkRequest) -> ForkReply:
        """Start children beside each target; all of them or none. Raises Refused with the reason."""
        self._refuse_if_stopping()
        role, command = self._role(request)
        held = [view for view in self._table.of_role(request.role) if view.state not in OVER_STATES]
        if held or request.role in self._workers.forking:
            how = "is about to start" if held and held[0].state is WorkerState.PENDING else "runs already"
            raise Refused(
                f"role {request.role} {how}; `slurmfork stop` it first, or fork under another name",
                "in_use",
            )
        targets = self._targets(request.target or role.strategy.target) if role.colocated else []
        self._workers.forking.add(request.role)
        try:
            return await self._fork(request, role, command, targets)
        finally:
            self._workers.forking.discard(request.role)

    async def _fork(
        self, request: ForkRequest, role: Role, command: list[str] | None, targets: list[Placement]
    ) -> ForkReply:
        placements = self._places(request, role, targets)
        self._workers.forget(request.role)
        self._workers.adopt(request.role, role)
        self._workers.expect(placements)
        names = [placement.worker for placement in placements]
        try:
            await self._bring_up(request, placements, command, [target.worker for target in targets])
        except BaseException as error:
            await asyncio.shield(self._roll_back(request.role, names, error))
            raise
        return ForkReply(workers=self._workers.views(names))

    async def _bring_up(
        self, request: ForkRequest, placements: list[Placement], command: list[str] | None, targets: list[str]
    ) -> None:
        names = [placement.worker for placement in placements]
        begun = asyncio.get_running_loop().time()
        await self._workers.start(placements, command=command, extra=request.env, timeout=request.timeout)
        taken = asyncio.get_running_loop().time() - begun
        await self._workers.until_up(names, request.timeout, taken=taken, beside=targets)

    async def _roll_back(self, role: str, workers: list[str], error: BaseException) -> None:
        """Stop those that did start, and leave the name free; what failed is told by the error."""
        if isinstance(error, Refused):
            error.detail = [msgspec.structs.replace(view) for view in views_of(error)]
        self._table.event("fork", state="failed", message=f"{role}: {error}")
        if self._table.state is RunState.STOPPING:
            return  # the end of the run stops them
        reply = await self._workers.end(workers, grace=None, forget=True)
        left = {result.worker: result.survivors for result in reply.results if result.survivors}
        if not left:
            self._workers.forget(role)
        for view in self._workers.views(left):  # who may still be there stays in sight, and is stopped when seen
            self._workers.unwanted.add(view.worker)
            reason = "; ".join(left[view.worker])
            self._table.update_worker(msgspec.structs.replace(view, state=WorkerState.FAILED, reason=reason))

    # --- what is asked for

    def _places(self, request: ForkRequest, role: Role, targets: list[Placement]) -> list[Placement]:
        if not role.colocated:
            return self._workers.kept[request.role]
        try:
            return plan.colocate(request.role, role, targets, count=request.count, replicas=_replicas(role, request))
        except SlurmforkError as error:
            raise Refused(str(error), "misfit") from None

    def _role(self, request: ForkRequest) -> tuple[Role, list[str] | None]:
        """The role to fork, from the spec or made up for this fork, and the command that replaces its own."""
        role = self._workers.spec.roles.get(request.role)
        if role is None:
            if request.command is None:
                near = difflib.get_close_matches(request.role, self._workers.spec.roles, 1)
                hint = f"did you mean {near[0]!r}?" if near else "it is not in the spec: give a command after --"
                raise Refused(f"unknown role {request.role!r}; {hint}", "unknown")
            strategy = Strategy(type="colocation", target=request.target)
            return Role(command=list(request.command), strategy=strategy), None
        if not role.colocated and role.autostart:
            raise Refused(f"role name {request.role} is in use: it is one of the spec's own, not forked", "in_use")
        if not role.colocated and (request.target is not None or request.count > 1):
            raise Refused(f"{request.role} has devices of its own: it takes neither a target nor a count", "misfit")
        if not role.colocated and request.role not in self._workers.kept:
            raise Refused("the run is still starting: nodes are not planned yet", "not_running")
        if role.engine is not None and request.command is not None:
            raise Refused(f"{request.role} hosts an engine: no command can replace that", "misfit")
        if role.shared and request.env:
            raise Refused(f"{request.role} lives in its target's processes, whose environment is theirs", "misfit")
        return role, request.command

    def _targets(self, target: str | None) -> list[Placement]:
        """Placements of the workers that a fork goes beside; all must be up."""
        if target is None:
            raise Refused("no target: say beside which role with --target", "unknown")
        views = self._workers.find(target)
        if down := [view for view in views if view.state not in UP_STATES]:
            states = ", ".join(f"{view.worker} is {view.state}" for view in down[:4])
            raise Refused(f"the target is not running: {states}", "not_running")
        return [self._workers.placement(view.worker) for view in views]

    def _refuse_if_stopping(self) -> None:
        if self._table.state not in (RunState.STARTING, RunState.READY):
            raise Refused(f"the run is {self._table.state}: nothing can be started in it", "stopping")


def _replicas(role: Role, request: ForkRequest) -> int | None:
    """The spec's number of children holds, unless the request names one target or a count of its own."""
    partial = request.target is not None and request.target != role.strategy.target
    return None if partial or request.count > 1 else role.replicas
