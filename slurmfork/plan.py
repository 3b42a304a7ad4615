"""The plan: which worker runs on which node, with which GPUs and ranks; and what to ask the backend for.

Pure functions of a spec and nodes, so that a plan can be printed without a cluster. Roles with devices of
their own are packed by ``slurmfork.packing``, colocated ones go where their targets are, which is for
``slurmfork.colocation``. Nothing here depends on the order of the roles in the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slurmfork.colocation import colocate
from slurmfork.errors import PlanError
from slurmfork.packing import Demand, Room, in_order, pack
from slurmfork.placement import Node, Placement, Seat, numbered
from slurmfork.shortage import MOST_NODES, explain, fewest, too_large
from slurmfork.spec.model import Role, Spec
from slurmfork.spec.shape import Shape, node_shape

__all__ = ["Node", "Placement", "Request", "colocate", "node_shape", "plan", "request"]

USUAL_GPUS = 8  # of a node, where neither the spec nor its options say


@dataclass(frozen=True)
class Request:
    """What to ask the backend for: so many nodes, all alike."""

    nodes: int
    gpus_per_node: int
    cpus_per_node: int


# --- plan --------------------------------------------------------------------------------------------------


def plan(spec: Spec, nodes: Sequence[Node]) -> list[Placement]:
    """Every worker of the roles that start by themselves or have devices of their own, targets before what is beside.

    Within a role indices, which are the ranks, grow with the nodes. Roles that no GPU and no CPU limits are
    spread evenly. Raises PlanError, with the arithmetic, where no place is found for all.
    """
    if not nodes:
        raise PlanError("there is no node to put the roles on")
    order = _by_dependency(spec)
    demands = in_order(_demands(spec, order))
    rooms = [Room(node.gpus, node.cpus) for node in nodes]
    counts = pack(demands, rooms)
    if counts is None:
        raise PlanError(explain(demands, rooms))
    seated: dict[str, list[Placement]] = {}
    used = [0] * len(nodes)
    for demand in demands:
        role = spec.roles[demand.role]
        seats = _seats(role.gpus or 0, [count * demand.workers for count in counts[demand.role]], nodes, used)
        seated[demand.role] = numbered(demand.role, seats, _weight(role))
    for name in order:
        if name not in seated:
            role = spec.roles[name]
            seated[name] = colocate(name, role, seated[role.strategy.target or ""], replicas=role.replicas)
    return [placement for group in seated.values() for placement in group]


def _seats(gpus: int, counts: Sequence[int], nodes: Sequence[Node], used: list[int]) -> list[Seat]:
    """Seats of one role, each with the next free GPUs of its node; ``used`` is moved on."""
    seats = []
    for i, count in enumerate(counts):
        for _ in range(count):
            seats.append(Seat(nodes[i].name, tuple(range(used[i], used[i] + gpus))))
            used[i] += gpus
    return seats


def _weight(role: Role) -> int:
    return (role.gpus or 0) if role.cpus is None else role.cpus


# --- what the roles ask for --------------------------------------------------------------------------------


def _by_dependency(spec: Spec) -> list[str]:
    """The roles that are planned, by name, each after its target."""
    waiting = {name: role for name, role in sorted(spec.roles.items()) if role.autostart or not role.colocated}
    order: list[str] = []
    done: set[str] = set()
    while waiting:
        free = [n for n, role in waiting.items() if not role.colocated or role.strategy.target in done]
        if not free:
            shown = ", ".join(f"{name} beside {role.strategy.target}" for name, role in waiting.items())
            raise PlanError(f"no order to start these in, each waits for its target: {shown}")
        order += free
        done.update(free)
        waiting = {name: role for name, role in waiting.items() if name not in done}
    return order


def _demands(spec: Spec, order: Iterable[str]) -> list[Demand]:
    children: dict[str, list[str]] = {}
    primary = []
    for name in order:
        role = spec.roles[name]
        if role.colocated:
            children.setdefault(role.strategy.target or "", []).append(name)
        else:
            primary.append(name)
    return [_demand(name, spec.roles[name], spec.roles, children) for name in primary]


def _demand(name: str, role: Role, roles: Mapping[str, Role], children: Mapping[str, list[str]]) -> Demand:
    count = role.per_node or role.replicas or 1
    gpus = role.gpus or 0
    total = count if role.per_node is None else 0  # with per_node the number of nodes is not known here
    workers, extra = _piece(name, gpus, total, roles, children)
    if count % workers:  # colocate() will say so; here it must only not get in the way
        workers, extra = 1, 0
    cpus = workers * (role.cpus or 0) + extra
    return Demand(name, count // workers, workers * gpus, cpus, role.per_node is not None, workers, extra)


def _piece(
    name: str, gpus: int, count: int, roles: Mapping[str, Role], children: Mapping[str, list[str]]
) -> tuple[int, int]:
    """How many workers must share a node for what goes beside them, and the CPUs that this declares."""
    parts = []
    for child in children.get(name, ()):
        role = roles[child]
        group = role.gpus // gpus if role.gpus and gpus and role.gpus % gpus == 0 else 1
        groups = count // group
        each = role.replicas // groups if role.replicas and groups and role.replicas % groups == 0 else 1
        own = gpus if role.gpus is None else role.gpus
        inner, extra = _piece(child, own, groups * each, roles, children)
        parts.append((group * inner // math.gcd(inner, each), each / group, (role.cpus or 0) + extra / inner))
    workers = math.lcm(*(unit for unit, _, _ in parts))
    return workers, round(sum(workers * ratio * cpus for _, ratio, cpus in parts))


# --- request -----------------------------------------------------------------------------------------------


def request(spec: Spec) -> Request:
    """What to ask the backend for; ``plan`` succeeds on nodes like that. Raises PlanError if none would do.

    Nodes: the spec's, or the fewest that hold the roles. GPUs of a node: what the spec or its options say; or
    as few as will do on so many nodes, where without ``nodes`` one node is tried first, then nodes of at most
    8 GPUs (or what one worker needs, if that is more). CPUs: the most that the workers of one node count for,
    declared or one per GPU; colocated workers that declare none count for none, and later forks do not count.
    """
    shape = node_shape(spec)
    demands = in_order(_demands(spec, _by_dependency(spec)))
    nodes, gpus = _size(demands, shape)
    imagined = [Node(f"node{number}", gpus, shape.cpus) for number in range(nodes)]
    weights = dict.fromkeys((node.name for node in imagined), 0)
    for placement in plan(spec, imagined):
        weights[placement.node] += placement.cpus
    return Request(nodes, gpus, shape.cpus or max(1, *weights.values()))


def _size(demands: Sequence[Demand], shape: Shape) -> tuple[int, int]:
    """Nodes and GPUs of each, with what is not given found."""
    if shape.nodes is not None and shape.gpus is not None:
        return shape.nodes, shape.gpus
    everywhere = sum(d.gpus * d.pieces for d in demands if d.per_node)
    moving = [d for d in demands if not d.per_node]
    total = sum(d.gpus * d.pieces for d in moving)
    least = everywhere + max((d.gpus for d in moving), default=0)
    if shape.nodes is not None:
        return shape.nodes, _fewest_gpus(demands, shape.nodes, least, everywhere + total, shape.cpus)
    if shape.gpus is not None:
        return _fewest_nodes(demands, shape.gpus, shape.cpus), shape.gpus
    nodes = _fewest_nodes(demands, max(least, min(USUAL_GPUS, everywhere + total)), shape.cpus)
    return nodes, _fewest_gpus(demands, nodes, least, everywhere + total, shape.cpus)


def _fewest_nodes(demands: Sequence[Demand], gpus: int, cpus: int | None) -> int:
    room = Room(gpus, cpus)
    if reason := too_large(demands, [room]):
        raise PlanError(reason)
    moving = [d for d in demands if not d.per_node]
    free = gpus - sum(d.gpus * d.pieces for d in demands if d.per_node)
    low = max(1, -(-sum(d.gpus * d.pieces for d in moving) // max(free, 1)))
    high = min(max(low, sum(d.pieces for d in moving)), MOST_NODES)
    if low > high:
        raise PlanError(f"the roles need at least {low:,} nodes of {gpus} GPUs; {high:,} is the most")
    found = fewest(low, high, lambda count: pack(demands, [room] * count) is not None)
    if found is None:
        raise PlanError(explain(demands, [room] * high))
    return found


def _fewest_gpus(demands: Sequence[Demand], nodes: int, low: int, high: int, cpus: int | None) -> int:
    everywhere = sum(d.gpus * d.pieces for d in demands if d.per_node)
    low = max(low, everywhere + -(-(high - everywhere) // nodes))
    found = fewest(low, max(low, high), lambda gpus: pack(demands, [Room(gpus, cpus)] * nodes) is not None)
    if found is None:
        raise PlanError(explain(demands, [Room(max(low, high), cpus)] * nodes))
    return found
