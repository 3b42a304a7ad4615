"""The workers of a run, started and stopped across nodes: all that are asked for at once, or none of them.

Used by the run's own start and by the fork RPC alike. Knows placements and orders; decides nothing about the
end of the run.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from slurmfork import plan
from slurmfork.errors import Refused, SlurmforkError
from slurmfork.head.members import Members
from slurmfork.head.orders import RANK_VARIABLES, Rendezvous, order, pending_view
from slurmfork.head.table import Table
from slurmfork.messages import (
    ForkReply,
    ForkRequest,
    Order,
    PortsRequest,
    ReserveOrder,
    SignalOrder,
    SignalRequest,
    StartOrder,
    StopOrder,
    StopReply,
    StopRequest,
    StopResult,
    WorkerView,
)
from slurmfork.names import LIVE_STATES, OVER_STATES, UP_STATES, RunState, WorkerState, split_target
from slurmfork.plan import Placement
from slurmfork.rundir import RunDir
from slurmfork.spec import Role, Spec, Strategy

STOP_MARGIN = 20.0  # seconds that an agent gets beyond a worker's grace before it counts as hung


class Workers:
    """Starts, forks, stops and signals workers through the agents.

    ``roles`` are the spec's, and those that a fork brought along. ``secrets`` go into the environment of workers
    and nowhere else.
    """

    def __init__(
        self,
        spec: Spec,
        table: Table,
        members: Members,
        rundir: RunDir,
        *,
        cwd: str,
        secrets: Mapping[str, str],
    ) -> None:
        self.roles: dict[str, Role] = dict(spec.roles)
        self.adhoc: set[str] = set()
        self._spec = spec
        self._table = table
        self._members = members
        self._rundir = rundir
        self._cwd = cwd
        self._base = {**spec.env, **secrets}
        self._rendezvous = Rendezvous(members)
        self._placements: dict[str, Placement] = {}
        self._orders: dict[str, Order] = {}
        self._forking: set[str] = set()
        self._starts = 0

    # --- the run's own start

    async def start_all(self, placements: Sequence[Placement]) -> None:
        """Start the plan: separate roles at once, each colocated role when its target is up; until all are up.

        Raises Refused where a worker cannot be started, or ends or fails before it is up.
        """
        by_role: dict[str, list[Placement]] = {}
        for placement in placements:
            by_role.setdefault(placement.role, []).append(placement)
            self._expect(placement)
        first = [p for role, group in by_role.items() if not self.roles[role].colocated for p in group]
        await self._start(await self._orders_for(first))
        later = [self._start_beside(role, group) for role, group in by_role.items() if self.roles[role].colocated]
        await asyncio.gather(*later)
        await self._until_up([placement.worker for placement in placements])

    async def _start_beside(self, role: str, group: Sequence[Placement]) -> None:
        await self._until_up([target for placement in group for target in placement.targets])
        await self._start(await self._orders_for(group))

    def _expect(self, placement: Placement) -> None:
        self._placements[placement.worker] = placement
        devices = self._table.nodes[placement.node].devices
        self._table.update_worker(pending_view(placement, devices, self._rundir))

    async def _orders_for(
        self,
        placements: Sequence[Placement],
        *,
        command: Sequence[str] | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> list[Order]:
        orders = []
        for placement in placements:
            first = next(p for p in placements if p.role == placement.role)
            meeting = await self._rendezvous.open(placement.role, first.node)
            role = self.roles[placement.role]
            environment = {**self._base, **self._inherited(placement.target), **role.env, **(extra or {})}
            made = order(role, placement, meeting, cwd=self._cwd, environment=environment, command=command)
            self._orders[placement.worker] = made
            orders.append(made)
        return orders

    def _inherited(self, target: str | None) -> dict[str, str]:
        """A colocated worker has its target's environment, but for the ranks."""
        if target is None or target not in self._orders:
            return {}
        return {name: value for name, value in self._orders[target].env.items() if name not in RANK_VARIABLES}

    async def _start(self, orders: Sequence[Order]) -> None:
        """One order a node, all nodes at once; raises Refused with the views of all that failed."""
        self._starts += 1
        request_id = f"start-{self._starts}"
        bodies: dict[str, StartOrder] = {}
        for entry in orders:
            node = self._placements[entry.worker].node
            bodies.setdefault(node, StartOrder(request_id=request_id, orders=[])).orders.append(entry)
        answers = await self._members.ask_each("start", bodies, list[WorkerView])
        failed: list[WorkerView] = []
        messages: list[str] = []
        for answer in answers.values():
            if isinstance(answer, SlurmforkError):
                messages.append(str(answer))
                failed += _views_of(answer)
                continue
            for view in answer:
                # A notice about the same worker may have overtaken this answer, and knows more.
                if self._table.workers[view.worker].state is WorkerState.PENDING:
                    self._table.update_worker(view)
        if messages:
            for view in failed:
                self._table.update_worker(view)
            kind = "stopping" if self._table.state is RunState.STOPPING else "start_failed"
            raise Refused("; ".join(dict.fromkeys(messages)), kind, failed)

    async def _until_up(self, workers: Sequence[str], timeout: float | None = None) -> None:
        """Wait until all are up; raises Refused as soon as one cannot be any more."""

        def settled() -> bool:
            stopping = self._table.state is RunState.STOPPING
            return stopping or bool(self._fallen(workers)) or not self._awaited(workers)

        try:
            await asyncio.wait_for(self._table.until(settled), timeout)
        except asyncio.TimeoutError:
            late = self._awaited(workers)
            raise Refused(f"not ready within {timeout:g} s: {_some(late)}", "timeout", self._views(late)) from None
        if fallen := self._fallen(workers):
            message = "; ".join(f"{view.worker}: {view.reason}" for view in fallen[:3])
            raise Refused(message, "start_failed", fallen)
        if self._table.state is RunState.STOPPING:
            raise Refused("the run is stopping", "stopping")

    def _awaited(self, workers: Sequence[str]) -> list[str]:
        """Those that are still to come up; one whose failure is ignored is not waited for."""
        late = [name for name in workers if not self._table.all_up([name])]
        ignored = {view.worker for view in self._views(late) if self._is_gone(view) and not self._counts(view)}
        return [name for name in late if name not in ignored]

    @staticmethod
    def _is_gone(view: WorkerView) -> bool:
        return view.state in (WorkerState.FAILED, WorkerState.STOPPED)

    def _counts(self, view: WorkerView) -> bool:
        """Whether its failure is one of what is being started; within a fork every child's is."""
        return view.role in self._forking or not self.ignores(view.role)

    def _fallen(self, workers: Sequence[str]) -> list[WorkerView]:
        """Those that failed or were stopped. With ``on_failure: ignore`` a failure holds nothing up."""
        return [view for view in self._views(workers) if self._is_gone(view) and self._counts(view)]

    def ignores(self, role: str) -> bool:
        """Whether a failure in this role leaves the run alone."""
        return role in self.adhoc or (role in self.roles and self.roles[role].on_failure == "ignore")

    def forking(self, role: str) -> bool:
        """Whether a fork of this role is under way: then its failure is the fork's own affair."""
        return role in self._forking

    def longest_grace(self) -> float:
        """Seconds that the slowest role may take to stop."""
        return max((role.stop.grace for role in self.roles.values()), default=0.0)

    def _views(self, workers: Iterable[str]) -> list[WorkerView]:
        return [self._table.workers[name] for name in workers if name in self._table.workers]

    # --- the fork RPC

    async def fork(self, request: ForkRequest) -> ForkReply:
        """Start children beside each target; all of them or none. Raises Refused with the reason."""
        self._refuse_if_stopping()
        role, command = self._forked_role(request)
        if request.role in self._forking or any(v.state in LIVE_STATES for v in self._table.of_role(request.role)):
            raise Refused(
                f"role {request.role} runs already; `slurmfork stop` it first, or fork under another name",
                "in_use",
            )
        targets = self._targets(request.target or role.strategy.target)
        self._forking.add(request.role)
        try:
            return await self._fork(request, role, command, targets)
        finally:
            self._forking.discard(request.role)

    async def _fork(
        self, request: ForkRequest, role: Role, command: list[str] | None, targets: list[Placement]
    ) -> ForkReply:
        try:
            placements = plan.colocate(
                request.role, role, targets, count=request.count, replicas=_replicas(role, request)
            )
        except SlurmforkError as error:
            raise Refused(str(error), "misfit") from None
        self._forget(request.role)
        known = request.role in self._spec.roles
        self.roles[request.role] = role
        if not known:
            self.adhoc.add(request.role)
        for placement in placements:
            self._expect(placement)
        names = [placement.worker for placement in placements]
        try:
            await self._start(await self._orders_for(placements, command=command, extra=request.env))
            await self._until_up(names, request.timeout)
            self._refuse_if_gone(targets)
        except BaseException as error:
            await asyncio.shield(self._roll_back(request.role, names, error))
            raise
        return ForkReply(workers=self._views(names))

    async def _roll_back(self, role: str, workers: list[str], error: BaseException) -> None:
        """Stop those that did start, and leave the name free; what failed is told by the error."""
        if isinstance(error, Refused):
            error.detail = [msgspec.structs.replace(view) for view in _views_of(error)]
        self._table.event("fork", state="failed", message=f"{role}: {error}")
        if self._table.state is not RunState.STOPPING:  # otherwise the end of the run stops them
            await self._stop(workers, grace=None, forget=True)
            self._forget(role)

    def _forked_role(self, request: ForkRequest) -> tuple[Role, list[str] | None]:
        """The role to fork, from the spec or made up for this fork, and the command that replaces its own."""
        role = self._spec.roles.get(request.role)
        if role is None:
            if request.command is None:
                near = difflib.get_close_matches(request.role, self._spec.roles, 1)
                hint = f"did you mean {near[0]!r}?" if near else "it is not in the spec: give a command after --"
                raise Refused(f"unknown role {request.role!r}; {hint}", "unknown")
            strategy = Strategy(type="colocation", target=request.target)
            return Role(command=list(request.command), strategy=strategy), None
        if not role.colocated:
            raise Refused(f"role name {request.role} is in use: it is one of the spec's own, not forked", "in_use")
        return role, request.command

    def _targets(self, target: str | None) -> list[Placement]:
        """Placements of the workers that a fork goes beside; all must be up."""
        if target is None:
            raise Refused("no target: say beside which role with --target", "unknown")
        views = self._find(target)
        if down := [view for view in views if view.state not in UP_STATES]:
            states = ", ".join(f"{view.worker} is {view.state}" for view in down[:4])
            raise Refused(f"the target is not running: {states}", "not_running")
        return [self._placements[view.worker] for view in views]

    def _refuse_if_gone(self, targets: Sequence[Placement]) -> None:
        gone = [target.worker for target in targets if self._table.workers[target.worker].state in OVER_STATES]
        if gone:
            raise Refused(f"the target ended during the fork: {_some(gone)}", "not_running")

    def _refuse_if_stopping(self) -> None:
        if self._table.state not in (RunState.STARTING, RunState.READY):
            raise Refused(f"the run is {self._table.state}: nothing can be started in it", "stopping")

    def _forget(self, role: str) -> None:
        for view in self._table.of_role(role):
            self._placements.pop(view.worker, None)
            self._orders.pop(view.worker, None)
        self._table.forget_role(role)
        self._rendezvous.close(role)

    # --- stop, signal, ports

    async def stop(self, request: StopRequest) -> StopReply:
        """Stop a role or a worker with all below it; raises Refused if there is no such worker."""
        views = self._find(request.target)
        return await self._stop([view.worker for view in views], grace=request.grace, forget=False)

    async def _stop(self, workers: Sequence[str], *, grace: float | None, forget: bool) -> StopReply:
        known = [name for name in workers if name in self._placements]
        bodies = {
            node: StopOrder(workers=group, grace=grace, forget=forget) for node, group in self._by_node(known).items()
        }
        longest = max((self.roles[split_target(name)[0]].stop.grace for name in known), default=0.0)
        patience = (longest if grace is None else grace) + STOP_MARGIN
        answers = await self._members.ask_each("stop", bodies, list[StopResult], timeout=patience)
        results: list[StopResult] = []
        for node, answer in answers.items():
            if isinstance(answer, SlurmforkError):
                lost = [f"not verified: {answer}"]
                results += [StopResult(worker=name, survivors=lost) for name in self._by_node(known)[node]]
            else:
                results += answer
        survivors = sum(len(result.survivors) for result in results)
        return StopReply(
            stopped=[result.worker for result in results if not result.survivors],
            survivors=survivors,
            results=results,
        )

    def _by_node(self, workers: Iterable[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in workers:
            groups.setdefault(self._placements[name].node, []).append(name)
        return groups

    async def signal(self, request: SignalRequest) -> dict[str, list[str]]:
        """Send a signal to a role's workers or to one."""
        names = [view.worker for view in self._find(request.target) if view.state in LIVE_STATES]
        bodies = {
            node: SignalOrder(workers=group, signal=request.signal) for node, group in self._by_node(names).items()
        }
        answers = await self._members.ask_each("signal", bodies, list[str], timeout=STOP_MARGIN)
        return {"signalled": sorted(name for answer in answers.values() for name in _or_raise(answer))}

    async def ports(self, request: PortsRequest) -> dict[str, list[int]]:
        """Reserve further ports on a worker's node; they go with it."""
        view = self._find(request.worker)[0]
        order = ReserveOrder(owner=view.worker, count=request.count)
        return {"ports": await self._members.ask(view.node or "", "reserve", order, list[int], timeout=STOP_MARGIN)}

    def _find(self, target: str) -> list[WorkerView]:
        """The workers that ``role`` or ``role/index`` names; raises Refused with the nearest name."""
        role, index = split_target(target)
        views = self._table.of_role(role)
        if index is not None:
            views = [view for view in views if view.index == index]
        if not views:
            names = {view.role for view in self._table.workers.values()}
            near = difflib.get_close_matches(role, names - {role}, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {_some(sorted(names))}" if names else ""
            raise Refused(f"no worker {target!r} in this run{hint}", "unknown")
        return views


class Once:
    """Remembers requests by their id, so that one that is asked twice is done once."""

    def __init__(self, kept: int = 4096) -> None:
        self._kept = kept
        self._seen: dict[str, tuple[object, asyncio.Future[object]]] = {}

    async def run(self, request_id: str, request: object, work: Callable[[], object]) -> object:
        """The result of ``work()``, which is begun only the first time; raises Refused for another's id."""
        if request_id in self._seen:
            first, future = self._seen[request_id]
            if first != request:
                raise Refused(f"request id {request_id} was used for another request", "conflict")
        else:
            future = asyncio.ensure_future(work())  # type: ignore[call-overload]
            self._seen[request_id] = (request, future)
            while len(self._seen) > self._kept:
                self._seen.pop(next(iter(self._seen)))
        return await asyncio.shield(future)


def _replicas(role: Role, request: ForkRequest) -> int | None:
    """The spec's number of children holds, unless the request names one target or a count of its own."""
    partial = request.target is not None and request.target != role.strategy.target
    return None if partial or request.count > 1 else role.replicas


def _views_of(error: SlurmforkError) -> list[WorkerView]:
    detail = getattr(error, "detail", None)
    if isinstance(detail, msgspec.Raw):
        try:
            return msgspec.json.decode(detail, type=list[WorkerView])
        except msgspec.DecodeError:
            return []
    return list(detail) if isinstance(detail, list) else []


def _or_raise(answer: list[str] | SlurmforkError) -> list[str]:
    if isinstance(answer, SlurmforkError):
        raise Refused(str(answer), "unreachable")
    return answer


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
