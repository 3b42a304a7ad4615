"""The members: the agents that joined, their links, and asking several of them at once.

Nodes listen on no port: each agent connects to the head's link port with its certificate and stays. A link that
is lost may come back within the lease, unless its guardian has ended too; after that the node counts as lost. Each
agent is asked now and then whether it still answers; of one that hangs nobody waits for the rest of a long time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from slurmfork import credentials
from slurmfork.errors import Refused, SlurmforkError, Unreachable
from slurmfork.link import Link
from slurmfork.messages import NodeView
from slurmfork.names import natural
from slurmfork.orders import Join, ReserveOrder, Welcome

log = logging.getLogger(__name__)
T = TypeVar("T")

HEARTBEAT = 10.0
LEASE = 5.0
SETTLE = 0.5  # seconds in which the others' links end too, if it is not one node alone that is gone
SPARE_PORTS = 4
PING_INTERVAL = 5.0
SILENCE = 10.0  # seconds without an answer after which an agent counts as hanging
SILENT_PATIENCE = 2.0  # seconds for an answer of one that hangs


@dataclass
class Member:
    """One node's agent. ``ports`` are reserved there for the rendezvous of roles; ``silent``: it hangs."""

    join: Join
    link: Link
    address: str
    ports: list[int] = field(default_factory=list)
    silent: bool = False

    @property
    def node(self) -> str:
        return self.join.node


class Members:
    """Accepts agents on the link port and keeps their links.

    ``on_join``, ``on_lost`` hear of nodes (a lost one after its lease), ``on_silence(node, silent)`` of one that
    hangs, or answers again; ``on_notice(node, op, body)`` hears what agents tell; ``on_api(node, body)`` serves a
    worker's API call. ``end_of(node)`` returns once it is known that the node's guardian has ended.
    """

    def __init__(
        self,
        run_id: str,
        expected: int,
        addresses: dict[str, str],
        *,
        on_join: Callable[[NodeView], None],
        on_lost: Callable[[str], None],
        on_silence: Callable[[str, bool], None],
        on_notice: Callable[[str, str, msgspec.Raw], None],
        on_api: Callable[[str, msgspec.Raw], Awaitable[Any]],
        end_of: Callable[[str], Awaitable[None]],
    ) -> None:
        self.expected = expected
        self.complete = asyncio.Event()
        self.closed = False
        self._closing = asyncio.Event()
        self._run_id = run_id
        self._addresses = addresses
        self._members: dict[str, Member] = {}
        self._on_join, self._on_lost, self._on_silence = on_join, on_lost, on_silence
        self._on_notice, self._on_api = on_notice, on_api
        self._end_of = end_of

    def close(self) -> int:
        """Take nobody in any more; returns how many nodes had not joined. Late agents leave as they came."""
        self.closed = True
        self._closing.set()
        return self.expected - len(self._members)

    def absent(self) -> list[str]:
        """Nodes that never joined, as far as their names are known."""
        return [node for node in self._addresses if node not in self._members]

    def sorted(self) -> list[Member]:
        """Members in the order of their nodes' names, numbers counted as numbers."""
        return sorted(self._members.values(), key=lambda member: natural(member.node))

    def get(self, node: str) -> Member:
        """The member of a node; raises Unreachable if none ever joined."""
        if node not in self._members:
            raise Unreachable(f"no agent on node {node}")
        return self._members[node]

    def open_door(self) -> Link:
        """The link for a connection that was just accepted."""
        return _Door(self).link

    def joined(self, join: Join, link: Link) -> Welcome:
        """Take an agent in (again, after a lost link); raises Refused for a stranger or a second one."""
        known = self._members.get(join.node)
        if self.closed and known is None:
            raise Refused("the run is ending: no node is taken in any more", "stopping")
        if known is not None and not known.link.closed and known.join.agent_pid != join.agent_pid:
            raise Refused(f"node {join.node} has an agent already", "conflict")
        if known is None and len(self._members) >= self.expected:
            raise Refused(f"all {self.expected} nodes have joined already", "conflict")
        if known is not None:
            known.link.close()  # whoever still waits for an answer there waits in vain
        address = self._addresses.get(join.node) or join.address
        ports = known.ports if known else []
        self._members[join.node] = Member(join, link, address, ports)
        self._on_join(_node_view(join, address))
        return Welcome(run_id=self._run_id, heartbeat=HEARTBEAT, lease=LEASE, address=address, time=time.time())

    async def settled(self, node: str) -> None:
        """After a join: put rendezvous ports aside, and see whether all are here."""
        member = self.get(node)
        if not member.ports:
            order = ReserveOrder(owner="head", count=SPARE_PORTS)
            member.ports = await member.link.ask("reserve", order, list[int], timeout=30)
        if len(self._members) >= self.expected and all(member.ports for member in self._members.values()):
            self.complete.set()

    async def stay_in_touch(self, node: str, link: Link) -> None:
        """Ask the agent at the other end of ``link`` now and then whether it answers, as long as there is one."""
        member = self.get(node)
        while member.link is link and not link.closed:
            try:
                await link.ask("ping", None, Any, timeout=SILENCE)
            except asyncio.TimeoutError:
                silent = True
            except SlurmforkError:
                return
            else:
                silent = False
            if silent != member.silent:
                member.silent = silent
                self._on_silence(node, silent)
                if silent:
                    link.give_up(f"the agent on node {node} does not answer")
            if self.closed:
                await asyncio.sleep(0 if silent else PING_INTERVAL)
            else:  # who is to end a node is asked at once whether he is there
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), 0 if silent else PING_INTERVAL)

    async def left(self, node: str, link: Link) -> None:
        """A link of this node has ended: within the lease there may be another."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._alone_gone(node), LEASE)
        if self._members[node].link is link:
            self._on_lost(node)

    async def _alone_gone(self, node: str) -> None:
        """Wait until it is known that this node's guardian has ended, while there are other nodes.

        When the last one ends so does the launcher, and what that says comes first.
        """
        await self._end_of(node)
        await asyncio.sleep(SETTLE)
        if all(member.link.closed for member in self._members.values()):
            await asyncio.sleep(LEASE)

    async def take_port(self, node: str) -> int:
        """A port on ``node`` for a role's rendezvous; give it back with ``return_port``."""
        member = self.get(node)
        if not member.ports:
            order = ReserveOrder(owner="head", count=SPARE_PORTS)
            member.ports += await member.link.ask("reserve", order, list[int], timeout=30)
        return member.ports.pop(0)

    def return_port(self, node: str, port: int) -> None:
        """Put a rendezvous port back; the longest unused is taken next."""
        self.get(node).ports.append(port)

    async def ask(self, node: str, op: str, body: Any, kind: type[T], timeout: float | None = None) -> T:
        """Ask one agent; raises Refused, Unreachable (also when it does not answer in time)."""
        member = self.get(node)
        if member.silent:
            timeout = SILENT_PATIENCE if timeout is None else min(timeout, SILENT_PATIENCE)
        try:
            return await member.link.ask(op, body, kind, timeout)
        except asyncio.TimeoutError:
            hangs = ": it hangs" if member.silent else ""
            raise Unreachable(f"the agent on node {node} did not answer within {timeout:.0f} s{hangs}") from None

    async def ask_each(
        self, op: str, bodies: dict[str, Any], kind: type[T], timeout: float | None = None
    ) -> dict[str, T | SlurmforkError]:
        """Ask several agents at once; per node the answer, or the error in its place."""

        async def one(node: str, body: Any) -> T | SlurmforkError:
            try:
                return await self.ask(node, op, body, kind, timeout)
            except SlurmforkError as error:
                return error

        answers = await asyncio.gather(*(one(node, body) for node, body in bodies.items()))
        return dict(zip(bodies, answers, strict=True))

    async def notice(self, node: str, op: str, body: msgspec.Raw) -> Any:
        """What an agent sends by itself."""
        if op == "api":
            return await self._on_api(node, body)
        self._on_notice(node, op, body)
        return None


class _Door:
    """A connection whose first word must be ``join``."""

    def __init__(self, members: Members) -> None:
        self.node: str | None = None
        self.link = Link(self._handle, self._made)
        self._members = members
        self._tasks: set[asyncio.Task[None]] = set()

    def _made(self) -> None:
        who = credentials.holder(self.link.fact("ssl_object"))
        if who == credentials.AGENT:
            self._begin(self._see_out())
        else:
            log.warning("link refused: the peer's certificate is of %r, not of an agent", who)
            self.link.close()

    async def _see_out(self) -> None:
        await self.link.ended()
        if self.node is not None:
            await self._members.left(self.node, self.link)

    async def _handle(self, op: str, body: msgspec.Raw) -> Any:
        if op == "join" and self.node is None:
            join = msgspec.json.decode(body, type=Join)
            welcome = self._members.joined(join, self.link)
            self.node = join.node
            self._begin(self._members.settled(join.node))
            self._begin(self._members.stay_in_touch(join.node, self.link))
            return welcome
        if self.node is None:
            raise Refused("join first", "conflict")
        return await self._members.notice(self.node, op, body)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("node %s: %s", self.node, error)


def _node_view(join: Join, address: str) -> NodeView:
    return NodeView(
        node=join.node,
        address=address,
        joined=True,
        guarantee=join.guarantee,
        devices=list(join.devices),
        cpus=join.cpus,
        agent_pid=join.agent_pid,
        guardian_pid=join.guardian_pid,
        notes=list(join.notes),
    )


async def listen(members: Members, sock: Any, context: ssl.SSLContext) -> asyncio.Server:
    """Begin to accept agents on a bound socket."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(members.open_door, sock=sock, ssl=context, ssl_handshake_timeout=60, backlog=1024)
