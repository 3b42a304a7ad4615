"""Packing: how many pieces of each role go to which node. Only counts: ``slurmfork.plan`` makes workers.

A piece is what has to stay on one node: a worker, or several where a colocated role takes the devices of
several. Deterministic, pure, and bounded: a few orders and rules are tried, then a careful filling by node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_MOST_SIZES = 40  # roles that the careful filling looks at
_MOST_STEPS = 5_000  # combinations that it looks at for one node
_LARGE = 50_000  # roles times nodes, above which only the first two orders are tried


@dataclass(frozen=True)
class Demand:
    """What one role asks for. ``gpus`` and ``cpus`` are of a piece, ``cpus`` only what was declared.

    ``pieces`` counts all of them, or with ``per_node`` those on every node; ``workers`` are in a piece, and
    ``beside`` of its CPUs are for colocated ones.
    """

    role: str
    pieces: int
    gpus: int
    cpus: int = 0
    per_node: bool = False
    workers: int = 1
    beside: int = 0


@dataclass
class Room:
    """What is left on a node. ``cpus`` None: not limited."""

    gpus: int
    cpus: int | None

    def holds(self, demand: Demand) -> int | None:
        """How many pieces fit; None: any number."""
        limits = [self.gpus // demand.gpus] if demand.gpus else []
        if demand.cpus and self.cpus is not None:
            limits.append(self.cpus // demand.cpus)
        return min(limits) if limits else None

    def take(self, demand: Demand, count: int) -> None:
        self.gpus -= count * demand.gpus
        if self.cpus is not None:
            self.cpus -= count * demand.cpus


Counts = dict[str, list[int]]
Choose = Callable[[Sequence[Room]], Sequence[int]]


def in_order(demands: Sequence[Demand]) -> list[Demand]:
    """The order of packing, whatever the order in the file."""
    return sorted(demands, key=lambda d: (not d.per_node, -d.gpus, -d.cpus, d.role))


def pack(demands: Sequence[Demand], rooms: Sequence[Room]) -> Counts | None:
    """Pieces of each role on each room, or None if no way was found. The rooms given stay as they are."""
    everywhere = [demand for demand in demands if demand.per_node]
    others = [demand for demand in in_order(demands) if not demand.per_node]
    left = [Room(room.gpus, room.cpus) for room in rooms]
    for room in left:
        for demand in everywhere:
            room.take(demand, demand.pieces)
        if room.gpus < 0 or (room.cpus or 0) < 0:
            return None
    for attempt in _attempts(others, left):
        if attempt is not None:
            return {**{demand.role: [demand.pieces] * len(rooms) for demand in everywhere}, **attempt}
    return None


def leftover(demands: Sequence[Demand], rooms: Sequence[Room]) -> dict[str, int]:
    """For messages: the pieces that have no place when the rest is packed in plain order."""
    left = [Room(room.gpus, room.cpus) for room in rooms]
    missing = {}
    for demand in in_order(demands):
        wanted = demand.pieces * (len(rooms) if demand.per_node else 1)
        if short := wanted - sum(_place(demand, left, range(len(left)))):
            missing[demand.role] = short
    return missing


def _attempts(demands: list[Demand], rooms: list[Room]) -> Iterator[Counts | None]:
    yield _without_cpu_limits(demands, rooms)
    if len(demands) * len(rooms) > _LARGE:
        yield _fill(demands, rooms, _first)
        return
    orders = [demands, sorted(demands, key=lambda d: (-d.cpus, -d.gpus, d.role)), _by_share(demands)]
    for order in orders:
        for choose in (_first, _fullest):
            yield _fill(order, rooms, choose)
    yield _careful(demands, rooms, _first)
    yield _careful(demands, rooms, _fullest)


def _first(rooms: Sequence[Room]) -> Sequence[int]:
    return range(len(rooms))


def _fullest(rooms: Sequence[Room]) -> Sequence[int]:
    return sorted(range(len(rooms)), key=lambda i: (rooms[i].gpus, rooms[i].cpus or 0, i))


def _by_share(demands: list[Demand]) -> list[Demand]:
    gpus = max((d.gpus for d in demands), default=0) or 1
    cpus = max((d.cpus for d in demands), default=0) or 1
    return sorted(demands, key=lambda d: (-(d.gpus / gpus + d.cpus / cpus), d.role))


def _without_cpu_limits(demands: list[Demand], rooms: list[Room]) -> Counts | None:
    """As if CPUs were free: right if they then suffice, and the same whether or not they are limited."""
    counts = _fill(demands, [Room(room.gpus, None) for room in rooms], _first)
    if counts is None:
        return None
    for index, room in enumerate(rooms):
        used = sum(counts[demand.role][index] * demand.cpus for demand in demands)
        if room.cpus is not None and used > room.cpus:
            return None
    return counts


def _fill(demands: list[Demand], rooms: list[Room], choose: Choose) -> Counts | None:
    """Role by role, each node filled before the next in the chosen order."""
    left = [Room(room.gpus, room.cpus) for room in rooms]
    counts = {}
    for demand in demands:
        counts[demand.role] = _place(demand, left, choose(left))
        if sum(counts[demand.role]) < demand.pieces:
            return None
    return counts


def _place(demand: Demand, rooms: list[Room], order: Sequence[int]) -> list[int]:
    """Place what fits of one role. Pieces that nothing limits are spread evenly over the nodes."""
    placed = [0] * len(rooms)
    if demand.per_node:
        wanted = dict.fromkeys(order, demand.pieces)
    elif unlimited := [i for i in sorted(order) if rooms[i].holds(demand) is None]:
        each, rest = divmod(demand.pieces, len(unlimited))
        wanted = {i: each + (position < rest) for position, i in enumerate(unlimited)}
    else:
        wanted = dict.fromkeys(order, demand.pieces)
    left = sum(wanted.values()) if demand.per_node else demand.pieces
    for i, most in wanted.items():
        fits = rooms[i].holds(demand)
        placed[i] = min(most, left) if fits is None else min(most, left, max(fits, 0))
        rooms[i].take(demand, placed[i])
        left -= placed[i]
        if not left:
            break
    return placed


# --- careful: for each node the combination that leaves the least ------------------------------------------


def _careful(demands: list[Demand], rooms: list[Room], choose: Choose) -> Counts | None:
    """Node by node: the largest piece that fits, with the others that use what is left of the node best."""
    sized = [demand for demand in demands if demand.gpus]
    if len(sized) > _MOST_SIZES:
        return None
    left = [Room(room.gpus, room.cpus) for room in rooms]
    waiting = [demand.pieces for demand in sized]
    counts = {demand.role: [0] * len(rooms) for demand in sized}
    known: dict[tuple[int, ...], list[int]] = {}  # most nodes are alike
    for i in choose(left):
        room = left[i]
        most = [min(count, room.holds(demand) or 0) for demand, count in zip(sized, waiting, strict=True)]
        key = (room.gpus, -1 if room.cpus is None else room.cpus, *most)
        if key not in known:
            known[key] = _best(sized, most, room)
        for number, count in enumerate(known[key]):
            counts[sized[number].role][i] = count
            waiting[number] -= count
            left[i].take(sized[number], count)
    rest = _fill([demand for demand in demands if not demand.gpus], left, _first)
    return None if any(waiting) or rest is None else {**counts, **rest}


def _best(demands: list[Demand], most: Sequence[int], room: Room) -> list[int]:
    """How many pieces of each role, at most ``most``, to put into a room; bounded, the best that was seen."""
    forced = next((number for number, count in enumerate(most) if count), None)
    if forced is None:
        return [0] * len(demands)
    best: tuple[tuple[int, int], list[int]] = ((-1, -1), [0] * len(demands))
    steps = 0

    def search(number: int, left: Room, chosen: list[int]) -> bool:
        nonlocal best, steps
        steps += 1
        if number == len(demands):
            score = (room.gpus - left.gpus, (room.cpus or 0) - (left.cpus or 0))
            best = max(best, (score, list(chosen)), key=lambda pair: pair[0])
            return left.gpus == 0
        high = min(most[number], left.holds(demands[number]) or 0)
        for count in range(high, -1 if number != forced else 0, -1):
            inner = Room(left.gpus, left.cpus)
            inner.take(demands[number], count)
            if search(number + 1, inner, [*chosen, count]) or steps > _MOST_STEPS:
                return True
        return False

    search(0, room, [])
    return best[1]
