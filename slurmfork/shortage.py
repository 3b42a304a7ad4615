"""Why roles do not fit on nodes, in one line with the arithmetic, and what would do. For messages only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from slurmfork.packing import Demand, Room, leftover, pack

MOST_NODES = 100_000
_MOST_ROLES = 6  # named in a message


def too_large(demands: Sequence[Demand], rooms: Sequence[Room]) -> str:
    """The piece that no node can hold, whatever else is there; empty if there is none."""
    for room in rooms:
        if reason := _per_node_too_large([d for d in demands if d.per_node], room):
            return reason
    for demand in demands:
        if not demand.per_node and demand.pieces and not any(room.holds(demand) != 0 for room in rooms):
            return _piece_too_large(demand, rooms)
    return ""


def explain(demands: Sequence[Demand], rooms: Sequence[Room]) -> str:
    """Why ``pack`` found no way."""
    if reason := too_large(demands, rooms):
        return reason
    lacking = _total(demands, rooms, "GPU") or _total(demands, rooms, "CPU") or _pieces(demands, rooms)
    return lacking + _enough(demands, rooms)


def fewest(low: int, high: int, works: Callable[[int], bool]) -> int | None:
    """The smallest number from ``low`` to ``high`` that works, if more works too; None if none does."""
    step, good = 1, low
    while not works(good):
        if good >= high:
            return None
        low, good, step = good + 1, min(good + step, high), step * 2
    while low < good:
        middle = (low + good) // 2
        low, good = (low, middle) if works(middle) else (middle + 1, good)
    return good


def counted(count: int, thing: str) -> str:
    """``1 GPU``, ``2 GPUs``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _per_node_too_large(demands: Sequence[Demand], room: Room) -> str:
    for thing, has in (("GPU", room.gpus), ("CPU", room.cpus)):
        parts = [(d.role, d.pieces, _of(d, thing)) for d in demands if _of(d, thing)]
        need = sum(count * size for _, count, size in parts)
        if has is not None and need > has:
            return f"on every node {_sum(parts, thing)}; a node has {has}: {need - has} too few"
    return ""


def _piece_too_large(demand: Demand, rooms: Sequence[Room]) -> str:
    who = f"a worker of {demand.role} needs"
    if demand.workers > 1:
        who = f"{demand.workers} workers of {demand.role} share a node, for what goes beside them, and need"
    gpus = max(room.gpus for room in rooms)
    if demand.gpus > gpus:
        return f"{who} {counted(demand.gpus, 'GPU')}; the largest node has {gpus}"
    cpus = max(room.cpus or 0 for room in rooms)
    if demand.cpus > cpus and all(room.cpus is not None for room in rooms):
        beside = f" ({demand.beside} of them for what goes beside)" if demand.beside else ""
        return f"{who} {counted(demand.cpus, 'CPU')}{beside}; the largest node has {cpus}"
    return f"{who} {counted(demand.gpus, 'GPU')} and {counted(demand.cpus, 'CPU')}; no node has both"


def _total(demands: Sequence[Demand], rooms: Sequence[Room], thing: str) -> str:
    sizes = [room.gpus if thing == "GPU" else room.cpus for room in rooms]
    known = [size for size in sizes if size is not None]
    parts = [
        (d.role, d.pieces * d.workers * (len(rooms) if d.per_node else 1), _of(d, thing) / d.workers)
        for d in demands
        if _of(d, thing)
    ]
    need = round(sum(count * size for _, count, size in parts))
    if len(known) < len(sizes) or need <= sum(known):
        return ""
    return f"{_sum(parts, thing)}; {_nodes(known)}: {need - sum(known)} too few"


def _pieces(demands: Sequence[Demand], rooms: Sequence[Room]) -> str:
    """The sums would do, the pieces do not."""
    moving = [demand for demand in demands if not demand.per_node and (demand.gpus or demand.cpus)]
    if len(moving) == 1 and len(demands) == 1 and len({(room.gpus, room.cpus) for room in rooms}) == 1:
        only, fits = moving[0], rooms[0].holds(moving[0]) or 0
        size = f"{counted(rooms[0].gpus, 'GPU')}" + (f" and {rooms[0].cpus} CPUs" if only.cpus else "")
        return (
            f"{only.role} has {_workers(only, only.pieces)} of {_size(only)}; {_workers(only, fits)} fit "
            f"on a node of {size}, so {counted(len(rooms), 'node')} hold {fits * only.workers * len(rooms)}: "
            f"{(only.pieces - fits * len(rooms)) * only.workers} too few"
        )
    missing = leftover(demands, rooms)
    named = {demand.role: demand for demand in demands}
    lost = ", ".join(
        f"{_workers(named[role], count)} of {role} ({_size(named[role])})" for role, count in missing.items()
    )
    have = _nodes([room.gpus for room in rooms])
    return f"there is enough in all ({have} GPUs), but not in pieces of the right sizes: no place for {lost}"


def _enough(demands: Sequence[Demand], rooms: Sequence[Room]) -> str:
    """How many nodes like these would do."""
    if len({(room.gpus, room.cpus) for room in rooms}) != 1:
        return ""
    most = min(MOST_NODES, len(rooms) + sum(demand.pieces for demand in demands))
    count = fewest(len(rooms) + 1, most, lambda n: pack(demands, [rooms[0]] * n) is not None)
    return f"; {counted(count, 'such node')} would do" if count else ""


def _of(demand: Demand, thing: str) -> int:
    return demand.gpus if thing == "GPU" else demand.cpus


def _size(demand: Demand) -> str:
    sizes = [(demand.gpus, "GPU"), (demand.cpus, "CPU")]
    return " and ".join(counted(size // demand.workers, thing) for size, thing in sizes if size)


def _workers(demand: Demand, pieces: int) -> str:
    return counted(pieces * demand.workers, "worker")


def _sum(parts: Sequence[tuple[str, int, float]], thing: str) -> str:
    """``a needs 16 x 1 GPU and b 16 x 2 = 48 GPUs``."""
    (role, count, size), *others = parts
    words = [f"{role} needs {count} × {size:g} {thing if size == 1 else thing + 's'}"]
    words += [f"{role} {count} × {size:g}" for role, count, size in others]
    if len(words) > _MOST_ROLES:
        words = [*words[:_MOST_ROLES], f"{len(words) - _MOST_ROLES} other roles their share"]
    text = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
    return f"{text} = {counted(round(sum(count * size for _, count, size in parts)), thing)}"


def _nodes(sizes: Sequence[int]) -> str:
    kinds = Counter(sizes)
    parts = [f"{counted(count, 'node')} × {size}" for size, count in kinds.items()]
    return f"{' + '.join(parts)} = {sum(sizes)}"
