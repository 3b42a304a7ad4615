"""The workers of a run, started, stopped and signalled across nodes; what an order needs is known here.

Used by the run's own start and by the fork RPC alike. Knows placements and orders; decides neither what may be
forked nor how the run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import msgspec

from slurmfork import names
from slurmfork.errors import Refused, SlurmforkError
from slurmfork.head.members import Members
from slurmfork.head.orders import Rendezvous, order, pending_view
from slurmfork.head.table import Table
from slurmfork.messages import (
    PortsReply,
    PortsRequest,
    SignalReply,
    SignalRequest,
    StopReply,
    StopRequest,
    StopResult,
    WorkerView,
)
from slurmfork.names import LIVE_STATES, OVER_STATES, RunState, WorkerState, split_target
from slurmfork.orders import Order, ReserveOrder, SignalOrder, StartOrder, StopOrder
from slurmfork.plan import Placement
from slurmfork.rundir import RunDir
from slurmfork.spec import Role, Spec

STOP_MARGIN = 20.0  # seconds that an agent gets beyond a worker's grace before it counts as hung
START_PATIENCE = 90.0  # the same for a start: an agent gives a slow disk 30 s for each of two writes


class Workers:
    """Starts, forks, stops and signals workers through the agents.

    ``roles`` are the spec's, and those that a fork brought along; ``forking`` holds those of which a fork is
    under way. ``unwanted`` are workers whose stop could not be verified: should they be seen, they are stopped
    again. ``extra``, secrets among it, goes into the environment of workers and nowhere else. ``kept`` are the places
    of roles that a fork starts on devices of their own.
    """

    def __init__(
        self,
        spec: Spec,
        table: Table,
        members: Members,
        rundir: RunDir,
        *,
        cwd: str,
        extra: Mapping[str, str],
    ) -> None:
        self.roles: dict[str, Role] = dict(spec.roles)
        self.adhoc: set[str] = set()
        self.spec = spec
        self.forking: set[str] = set()
        self.unwanted: set[str] = set()
        self.kept: dict[str, list[Placement]] = {}
        self._table = table
        self._members = members
        self._rundir = rundir
        self._cwd = cwd
        self._base = {**spec.env, **extra}
        self._rendezvous = Rendezvous(members)
        self._placements: dict[str, Placement] = {}
        self._orders: dict[str, Order] = {}
        self._starts = 0

    # --- the run's own start

    async def start_all(self, placements: Sequence[Placement]) -> None:
        """Start the plan: separate roles at once, each colocated role when its target is up; until all are up.

        Raises Refused where a worker cannot be started, or ends or fails before it is up.
        """
        by_role: dict[str, list[Placement]] = {}
        for placement in placements:
            by_role.setdefault(placement.role, []).append(placement)
        self.kept = {role: by_role.pop(role) for role in list(by_role) if not self.roles[role].autostart}
        placements = [placement for group in by_role.values() for placement in group]
        self.expect(placements)
        first = [p for role, group in by_role.items() if not self.roles[role].colocated for p in group]
        await self.start(first)
        later = [self._start_beside(role, group) for role, group in by_role.items() if self.roles[role].colocated]
        await asyncio.gather(*later)
        await self.until_up([placement.worker for placement in placements])

    async def _start_beside(self, role: str, group: Sequence[Placement]) -> None:
        await self.until_up([target for placement in group for target in placement.targets])
        await self.start([p for p in group if self._table.workers[p.worker].state is WorkerState.PENDING])

    # --- what is known of them

    def expect(self, placements: Sequence[Placement]) -> None:
        """Have these in the table, as pending."""
        for placement in placements:
            self._placements[placement.worker] = placement
            devices = self._table.nodes[placement.node].devices
            self._table.update_worker(pending_view(placement, devices, self._rundir))

    def adopt(self, name: str, role: Role) -> None:
        """A role that a fork starts: the spec's, or one of the fork's own."""
        self.roles[name] = role
        if name not in self.spec.roles:
            self.adhoc.add(name)

    def forget(self, role: str) -> None:
        """Drop a role that is over, so that its name is free again."""
        for view in self._table.of_role(role):
            self._placements.pop(view.worker, None)
            self._orders.pop(view.worker, None)
        self._table.forget_role(role)
        self._rendezvous.close(role)

    def placement(self, worker: str) -> Placement:
        """Where a worker is."""
        return self._placements[worker]

    def views(self, workers: Iterable[str]) -> list[WorkerView]:
        """How these stand; who is not in the table is left out."""
        return [self._table.workers[name] for name in workers if name in self._table.workers]

    def find(self, target: str) -> list[WorkerView]:
        """The workers that ``role`` or ``role/index`` names; raises Refused with the nearest name."""
        role, index = split_target(target)
        views = self._table.of_role(role)
        if index is not None:
            views = [view for view in views if view.index == index]
        if not views:
            names = {view.role for view in self._table.workers.values()}
            near = difflib.get_close_matches(role, names - {role}, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {some(sorted(names))}" if names else ""
            raise Refused(f"no worker {target!r} in this run{hint}", "unknown")
        return views

    def ignores(self, role: str) -> bool:
        """Whether a failure in this role leaves the run alone."""
        return role in self.adhoc or (role in self.roles and self.roles[role].on_failure == "ignore")

    def longest_grace(self) -> float:
        """Seconds that the slowest role may take to stop."""
        return max((role.stop.grace for role in self.roles.values()), default=0.0)

    # --- start

    async def start(
        self,
        placements: Sequence[Placement],
        *,
        command: Sequence[str] | None = None,
        extra: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        """One order a node, all nodes at once; raises Refused with the views of all that failed."""
        self.unwanted.difference_update(placement.worker for placement in placements)
        orders = await self._orders_for(placements, command=command, extra=extra)
        patience = START_PATIENCE if timeout is None else min(START_PATIENCE, timeout)
        await self._order(orders, patience)

    async def _orders_for(
        self,
        placements: Sequence[Placement],
        *,
        command: Sequence[str] | None,
        extra: Mapping[str, str] | None,
    ) -> list[Order]:
        orders = []
        for placement in placements:
            first = next(p for p in placements if p.role == placement.role)
            meeting = await self._rendezvous.open(placement.role, first.node)
            role = self.roles[placement.role]
            environment = {**self._base, **self._inherited(placement.target), **role.env, **(extra or {})}
            cwd = self._orders[placement.target].cwd if placement.target in self._orders else self._cwd
            made = order(role, placement, meeting, cwd=cwd, environment=environment, command=command)
            self._orders[placement.worker] = made
            orders.append(made)
        return orders

    def _inherited(self, target: str | None) -> dict[str, str]:
        """A colocated worker has its target's environment, but for the ranks."""
        if target is None or target not in self._orders:
            return {}
        return {name: value for name, value in self._orders[target].env.items() if name not in names.RANKS}

    async def _order(self, orders: Sequence[Order], patience: float) -> None:
        self._starts += 1
        request_id = f"start-{self._starts}"
        bodies: dict[str, StartOrder] = {}
        for entry in orders:
            node = self._placements[entry.worker].node
            bodies.setdefault(node, StartOrder(request_id=request_id, orders=[])).orders.append(entry)
        answers = await self._members.ask_each("start", bodies, list[WorkerView], timeout=patience)
        failed: list[WorkerView] = []
        messages: list[str] = []
        for answer in answers.values():
            if isinstance(answer, SlurmforkError):
                messages.append(str(answer))
                failed += views_of(answer)
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

    async def until_up(
        self, workers: Sequence[str], timeout: float | None = None, *, taken: float = 0.0, beside: Sequence[str] = ()
    ) -> None:
        """Wait until all are up; raises Refused as soon as one cannot be any more, or after ``timeout``.

        ``taken``: seconds of the timeout that their start has taken already. ``beside``: workers that must not end
        meanwhile.
        """

        def gone() -> list[str]:
            return [view.worker for view in self.views(beside) if view.state in OVER_STATES]

        def settled() -> bool:
            stopping = self._table.state is RunState.STOPPING
            return stopping or bool(gone() or self._fallen(workers)) or not self._awaited(workers)

        try:
            if not settled():
                rest = None if timeout is None else max(0.0, timeout - taken)
                await asyncio.wait_for(self._table.until(settled), rest)
        except asyncio.TimeoutError:
            late = self._awaited(workers)
            raise Refused(f"not ready within {timeout:g} s: {some(late)}", "timeout", self.views(late)) from None
        if ended := gone():
            raise Refused(f"the target ended during the fork: {some(ended)}", "not_running")
        if fallen := self._fallen(workers):
            message = "; ".join(f"{view.worker}: {view.reason}" for view in fallen[:3])
            raise Refused(message, "start_failed", fallen)
        if self._table.state is RunState.STOPPING:
            raise Refused("the run is stopping", "stopping")

    def _awaited(self, workers: Sequence[str]) -> list[str]:
        """Those that are still to come up; one that is over, and whose end fells nothing, is not waited for."""
        late = [name for name in workers if not self._table.all_up([name])]
        over = {view.worker for view in self.views(late) if view.state in OVER_STATES and not self._fells(view)}
        return [name for name in late if name not in over]

    def _fells(self, view: WorkerView) -> bool:
        """Whether its end is the failure of what is being started.

        A child's is that of its fork. Else one that was stopped was stopped by somebody, and a failure counts
        unless the spec says to ignore it.
        """
        if view.role in self.forking:
            return view.state in (WorkerState.FAILED, WorkerState.STOPPED)
        return view.state is WorkerState.FAILED and not self.ignores(view.role)

    def _fallen(self, workers: Sequence[str]) -> list[WorkerView]:
        return [view for view in self.views(workers) if self._fells(view)]

    # --- stop, signal, ports

    async def stop(self, request: StopRequest) -> StopReply:
        """Stop a role or a worker with all below it; raises Refused if there is no such worker."""
        names = [view.worker for view in self.find(request.target)]
        reply = await self.end(names, grace=request.grace, forget=False)
        for view in self.views(names):
            if view.state is WorkerState.PENDING:  # its turn had not come, and does not any more
                self._table.update_worker(msgspec.structs.replace(view, state=WorkerState.STOPPED, reason="stopped"))
        return reply

    async def end(self, workers: Sequence[str], *, grace: float | None, forget: bool) -> StopReply:
        """Stop these, side by side; who was not verified to be gone is a survivor. ``forget``: free their names."""
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

    async def stop_unwanted(self, node: str, worker: str) -> None:
        """Stop a worker that an agent told of, and that the head does not want."""
        order = StopOrder(workers=[worker], forget=True)
        with contextlib.suppress(SlurmforkError):  # told again when the agent joins again
            await self._members.ask(node, "stop", order, list[StopResult], timeout=None)
            self.unwanted.discard(worker)

    def _by_node(self, workers: Iterable[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in workers:
            groups.setdefault(self._placements[name].node, []).append(name)
        return groups

    async def signal(self, request: SignalRequest) -> SignalReply:
        """Send a signal to a role's workers or to one."""
        names = [view.worker for view in self.find(request.target) if view.state in LIVE_STATES]
        bodies = {
            node: SignalOrder(workers=group, signal=request.signal) for node, group in self._by_node(names).items()
        }
        answers = await self._members.ask_each("signal", bodies, list[str], timeout=STOP_MARGIN)
        for answer in answers.values():
            if isinstance(answer, SlurmforkError):
                raise answer
        return SignalReply(signalled=sorted(n for answer in answers.values() for n in cast("list[str]", answer)))

    async def ports(self, request: PortsRequest) -> PortsReply:
        """Reserve further ports on a worker's node; they go with it."""
        view = self.find(request.worker)[0]
        order = ReserveOrder(owner=view.worker, count=request.count)
        ports = await self._members.ask(view.node or "", "reserve", order, list[int], timeout=STOP_MARGIN)
        return PortsReply(ports=ports)


def views_of(error: SlurmforkError) -> list[WorkerView]:
    """The workers that an agent's refusal is about."""
    detail = getattr(error, "detail", None)
    if isinstance(detail, msgspec.Raw):
        try:
            return msgspec.json.decode(detail, type=list[WorkerView])
        except msgspec.DecodeError:
            return []
    return list(detail) if isinstance(detail, list) else []


def some(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
