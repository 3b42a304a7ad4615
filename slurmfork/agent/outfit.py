"""A worker's outfit: environment, devices, ports, scratch, notify socket: all that its node has to give it.

Laid out before a start, so that what the node cannot give is known before anything runs; kept over restarts.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slurmfork.agent import environment
from slurmfork.agent.lastwords import signal_number
from slurmfork.agent.node import Node
from slurmfork.agent.ports import Ports
from slurmfork.agent.readiness import Notify
from slurmfork.agent.spawn import StartFailed
from slurmfork.agent.starter import Starter
from slurmfork.agent.tree import Trees
from slurmfork.engine import hosting
from slurmfork.errors import Refused, RunDirError
from slurmfork.messages import Device, WorkerView
from slurmfork.orders import EngineOrder, Order
from slurmfork.scratch import Scratch
from slurmfork.shm import SharedMemory

_HOST = str(Path(hosting.__file__).with_name("__main__.py"))


@dataclass
class Site:
    """What all workers of a node share.

    ``tell`` sends a view to the head, ``reap`` has those hear of it whose processes have ended, ``address`` is
    the node's own. ``end_inside`` has the kernel end all that was started, where there is a namespace. ``closing``:
    nothing is started any more.
    """

    node: Node
    base: Mapping[str, str]
    trees: Trees
    starter: Starter
    ports: Ports
    scratch: Scratch
    memory: SharedMemory
    tell: Callable[[WorkerView], None]
    reap: Callable[[], None]
    end_inside: Callable[[], Awaitable[bool]] | None = None
    address: str = ""
    closing: bool = False


@dataclass(frozen=True)
class Outfit:
    """What one worker is started with, each time. ``values`` are those of its command's placeholders."""

    command: str | list[str]
    environment: dict[str, str]
    values: dict[str, str]
    scratch: Path
    gpus: list[Device]
    ports: list[int]
    notify: Notify | None


def outfit(order: Order, site: Site, said: Callable[[str], None]) -> Outfit:
    """Lay it out; raises StartFailed. What was taken by then is its owner's to give back.

    ``said`` hears what the worker says of itself on its notify socket.
    """
    try:
        signal_number(order.stop.signal)
        gpus = environment.slice_of(site.node.devices, order.devices)
        ports = site.ports.reserve(order.worker, order.ports) if order.ports else []
        notify = site.scratch.notify(order.worker) if order.ready and order.ready.notify else None
        scratch = site.scratch.worker(order.worker)
        variables = environment.of_worker(
            site.node,
            order,
            base=site.base,
            ports=ports,
            socket=site.scratch.socket,
            scratch=scratch,
            notify=notify,
        )
        command = order.command
        if order.engine is not None:
            command = [sys.executable, _HOST, order.worker]
            variables[hosting.VARIABLE] = _hosting(order, order.engine, site, scratch)
        values = _values(order, site.node, ports)
        return Outfit(command, variables, values, scratch, gpus, ports, Notify(notify, said) if notify else None)
    except (ValueError, Refused, RunDirError) as error:
        raise StartFailed(str(error)) from None


def _hosting(order: Order, engine: EngineOrder, site: Site, scratch: Path) -> str:
    """What the host of an engine is told."""
    told = hosting.Hosting(
        worker=order.worker,
        run_id=site.node.run_id,
        run_dir=str(site.node.rundir.path),
        socket=str(scratch / hosting.SOCKET),
        address=site.address,
        path=engine.path,
        args=engine.args,
        kwargs=engine.kwargs,
        pickle=engine.pickle,
        stop=order.stop.signal,
        checkpoint=engine.checkpoint,
    )
    return hosting.encode(told)


def _values(order: Order, node: Node, ports: list[int]) -> dict[str, str]:
    """What the placeholders of the command stand for."""
    role, _, index = order.worker.partition("/")
    listed = [str(port) for port in ports]
    return {
        "index": index,
        "rank": str(order.rank),
        "role": role,
        "worker": order.worker,
        "node": node.name,
        "run_id": node.run_id,
        "run_dir": str(node.rundir.path),
        **({"port": listed[0], "ports": ",".join(listed)} if listed else {}),
    }
