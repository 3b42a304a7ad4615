"""Orders: from placements to what an agent is told to start, the rank variables that torchrun sets included."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from slurmfork.head.members import Members
from slurmfork.messages import WorkerView
from slurmfork.names import WorkerState
from slurmfork.orders import EngineOrder, Order
from slurmfork.plan import Placement
from slurmfork.rundir import RunDir
from slurmfork.spec import Role


class Rendezvous:
    """Where the workers of each role meet: a port on the node of its rank 0, kept for the role's life."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._taken: dict[str, tuple[str, int]] = {}

    async def open(self, role: str, node: str) -> tuple[str, int]:
        """(address, port) for ``role``; the same for as long as it is not closed."""
        if role not in self._taken:
            self._taken[role] = (node, await self._members.take_port(node))
        node, port = self._taken[role]
        return self._members.get(node).address, port

    def close(self, role: str) -> None:
        """The role is over: its port may serve another."""
        if taken := self._taken.pop(role, None):
            self._members.return_port(*taken)


def order(
    role: Role,
    placement: Placement,
    meeting: tuple[str, int],
    *,
    cwd: str,
    environment: Mapping[str, str],
    command: Sequence[str] | None = None,
) -> Order:
    """The order for one worker. ``environment``: everything but ranks, the later word already taken."""
    ranks = {
        "RANK": placement.rank,
        "WORLD_SIZE": placement.world_size,
        "LOCAL_RANK": placement.local_rank,
        "LOCAL_WORLD_SIZE": placement.local_world_size,
        "NODE_RANK": placement.node_rank,
        "GROUP_RANK": placement.node_rank,
        "MASTER_ADDR": meeting[0],
        "MASTER_PORT": meeting[1],
    }
    return Order(
        worker=placement.worker,
        command=list(command) if command else role.command or "",
        cwd=str(Path(cwd, role.cwd or "")),
        env={**environment, **{name: str(value) for name, value in ranks.items()}},
        devices=list(placement.gpus),
        target=placement.target,
        rank=placement.rank,
        ports=role.ports,
        ready=role.ready,
        restart=role.restart,
        stop=role.stop,
        engine=_engine(role),
        shared=role.shared,
    )


def _engine(role: Role) -> EngineOrder | None:
    if role.engine is None:
        return None
    signal = role.checkpoint.signal if role.checkpoint else None
    return EngineOrder(path=role.engine, args=role.args, kwargs=role.kwargs, pickle=role.pickle, checkpoint=signal)


def pending_view(placement: Placement, devices: Sequence[int | str], rundir: RunDir) -> WorkerView:
    """How a worker is shown before its agent has said anything of it."""
    return WorkerView(
        worker=placement.worker,
        role=placement.role,
        index=placement.index,
        node=placement.node,
        state=WorkerState.PENDING,
        target=placement.target,
        gpus=[devices[position] for position in placement.gpus if position < len(devices)],
        log=os.fspath(rundir.worker_log(placement.role, placement.index)),
        rank=placement.rank,
    )
