"""Colocation: places of children beside workers that are placed already, for the plan and for the fork RPC.

Pure, and the same for both: a child gets exactly the devices of its target, or a part, or those of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from slurmfork.errors import PlanError
from slurmfork.placement import Placement, Seat, numbered
from slurmfork.shortage import counted


class Asks(Protocol):
    """What ``colocate`` looks at of a role."""

    @property
    def gpus(self) -> int | None: ...

    @property
    def cpus(self) -> int | None: ...


class Beside(Protocol):
    """What ``colocate`` looks at of a target: a placement, or what is known of a worker that runs."""

    @property
    def worker(self) -> str: ...

    @property
    def node(self) -> str: ...

    @property
    def gpus(self) -> Sequence[int]: ...


def colocate(
    role_name: str, role: Asks, targets: Sequence[Beside], *, count: int = 1, replicas: int | None = None
) -> list[Placement]:
    """Children beside ``targets`` (in order of their index): each beside one, or beside a group on one node.

    ``role.gpus`` None: exactly the target's devices; 0: none; fewer than a target's: children of one target
    cycle over slices of its devices; k times a target's: one group for every k targets of a node. ``count``
    children for each group; or ``replicas`` in all, times ``count``. The children are a world of their own.
    Raises PlanError where groups or replicas do not come out even.
    """
    if not targets:
        raise PlanError(f"there is nothing to start {role_name} beside")
    groups = _groups(role_name, role.gpus, targets)
    each = count
    if replicas is not None:
        if replicas % len(groups):
            what = "targets" if len(groups) == len(targets) else f"groups of {len(groups[0])} targets"
            raise PlanError(
                f"{role_name} has replicas: {replicas}, and {len(groups)} {what} to go beside, which does "
                f"not come out even; use a multiple of {len(groups)}, or leave replicas out"
            )
        each = count * (replicas // len(groups))
    seats = []
    for group in groups:
        devices = tuple(device for target in group for device in target.gpus)
        names = tuple(target.worker for target in group)
        seats += [Seat(group[0].node, _slice(devices, role.gpus, child), names) for child in range(each)]
    return numbered(role_name, seats, role.cpus or 0)


def _slice(devices: tuple[int, ...], gpus: int | None, child: int) -> tuple[int, ...]:
    if gpus is None or gpus == len(devices):
        return devices
    if gpus == 0:
        return ()
    start = child % (len(devices) // gpus) * gpus
    return devices[start : start + gpus]


def _groups(role: str, gpus: int | None, targets: Sequence[Beside]) -> list[list[Beside]]:
    """The targets in groups that have the devices for one child (or more, in slices) each."""
    by_node: dict[str, list[Beside]] = {}
    for target in targets:
        by_node.setdefault(target.node, []).append(target)
    if not gpus:
        return [[target] for group in by_node.values() for target in group]
    return [made for node, group in by_node.items() for made in _groups_on(role, gpus, node, group)]


def _groups_on(role: str, gpus: int, node: str, targets: Sequence[Beside]) -> list[list[Beside]]:
    groups: list[list[Beside]] = []
    open_: list[Beside] = []
    devices: set[int] = set()
    for target in targets:
        if not target.gpus:
            raise PlanError(f"{role} asks {counted(gpus, 'GPU')}, but {target.worker}, which it goes beside, has none")
        if not devices.isdisjoint(target.gpus):
            raise PlanError(
                f"{role} asks {counted(gpus, 'GPU')}, more than {target.worker} has, and the next share those"
            )
        open_.append(target)
        devices.update(target.gpus)
        if len(devices) >= gpus:
            if len(open_) > 1 and len(devices) > gpus:
                break
            groups.append(open_)
            open_, devices = [], set()
    if open_:
        raise PlanError(_uneven(role, gpus, node, targets))
    return groups


def _uneven(role: str, gpus: int, node: str, targets: Sequence[Beside]) -> str:
    size = len(targets[0].gpus)
    kind = targets[0].worker.rpartition("/")[0]
    if gpus % size:
        return f"{role} asks {counted(gpus, 'GPU')}, which is no multiple of the {size} of each worker of {kind}"
    group = gpus // size
    return (
        f"{role} asks {gpus} GPUs, those of {group} workers of {kind} on one node; "
        f"{node} has {len(targets)} of them: {len(targets) % group or len(targets)} left over"
    )
