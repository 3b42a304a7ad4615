"""Nodes, places and how the places of a role are numbered: the words that packing and colocation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slurmfork.names import worker_name


@dataclass(frozen=True)
class Node:
    """A node as the plan sees it. ``cpus`` None: not limited."""

    name: str
    gpus: int
    cpus: int | None = None


@dataclass(frozen=True)
class Placement:
    """One worker's place. ``gpus`` are positions in the node's list of devices.

    ``targets`` are all workers that it is beside, ``target`` the first of them; ``cpus`` is what it counts
    for: declared, or one for each GPU of its own.
    """

    worker: str
    role: str
    index: int
    node: str
    gpus: tuple[int, ...]
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    target: str | None = None
    targets: tuple[str, ...] = ()
    cpus: int = 0


@dataclass(frozen=True)
class Seat:
    """A place before it has a number."""

    node: str
    gpus: tuple[int, ...]
    targets: tuple[str, ...] = ()


def numbered(role: str, seats: Sequence[Seat], cpus: int) -> list[Placement]:
    """Number the seats of a role in their order, as torchrun numbers ranks."""
    sizes: dict[str, int] = {}
    for seat in seats:
        sizes[seat.node] = sizes.get(seat.node, 0) + 1
    node_ranks = {node: number for number, node in enumerate(sizes)}
    taken = dict.fromkeys(sizes, 0)
    placements = []
    for index, seat in enumerate(seats):
        placements.append(
            Placement(
                worker=worker_name(role, index),
                role=role,
                index=index,
                node=seat.node,
                gpus=seat.gpus,
                rank=index,
                world_size=len(seats),
                local_rank=taken[seat.node],
                local_world_size=sizes[seat.node],
                node_rank=node_ranks[seat.node],
                target=seat.targets[0] if seat.targets else None,
                targets=seat.targets,
                cpus=cpus,
            )
        )
        taken[seat.node] += 1
    return placements
