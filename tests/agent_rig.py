"""A rig for tests of the agent: a real TLS head end, against which real guardian and agent processes are run.

Nothing of the package's head is in it: it says ``welcome``, sends orders, and keeps what it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from slurmfork import credentials, process
from slurmfork.link import Link
from slurmfork.messages import StopResult, WorkerView
from slurmfork.names import WorkerState
from slurmfork.orders import ApiAnswer, ApiCall, EndOrder, EndReport, Going, Join, Order, StartOrder, StopOrder, Welcome
from slurmfork.process import Identity
from slurmfork.rundir import RunDir, new_run_id
from slurmfork.scratch import node_directory

T = TypeVar("T")

AGENT = Path(__file__).resolve().parent.parent / "slurmfork" / "agent" / "__main__.py"
AWKWARD = Path(__file__).with_name("awkward.py")
ISOLATED = os.environ.get("SLURMFORK_TEST_ISOLATION", "none")  # namespace: all tests of the agent, in namespaces
KEEPERS = ("slurmfork-init", "slurmfork-look")
PATIENCE = 30.0  # generous: the machine may be busy with other things


@dataclass
class AgentEnd:
    """What the rig knows of one agent."""

    link: Link
    join: Join
    views: dict[str, WorkerView] = field(default_factory=dict)
    history: list[tuple[str, WorkerState, str]] = field(default_factory=list)
    going: list[str] = field(default_factory=list)
    joins: int = 1


class Rig:
    """One run without a head: its directory, credentials and link port, and the agents that joined."""

    def __init__(self, directory: Path) -> None:
        self.run_id = new_run_id("rig")
        self.rundir = RunDir(directory / self.run_id)
        self.welcome = Welcome(run_id=self.run_id, heartbeat=0.2, lease=1.0)
        self.agents: dict[str, AgentEnd] = {}
        self.guardians: dict[str, subprocess.Popen[bytes]] = {}
        self.calls: list[ApiCall] = []
        self.answer = ApiAnswer(status=200, body="{}")
        self._server: asyncio.Server | None = None
        self.port = 0
        self._changed = asyncio.Event()
        self._requests = 0
        self._ends: list[asyncio.Task[None]] = []

    # --- the head end

    async def open(self) -> None:
        """Make the run directory and listen."""
        self.rundir.make()
        credentials.make(self.rundir.credentials, self.run_id)
        await self.listen()

    async def listen(self) -> None:
        """Listen, on the same port as before if there was one."""
        context = credentials.server_context(self.rundir.credentials)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, "127.0.0.1", self.port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    def hang_up(self, *, deaf: bool = False) -> None:
        """Cut all links, as a head that is killed would; ``deaf``: and accept no new ones."""
        if deaf and self._server:
            self._server.close()
        for end in self.agents.values():
            end.link.close()

    def _accept(self) -> Link:
        name = ""

        async def handle(op: str, body: msgspec.Raw) -> Any:
            nonlocal name
            if op == "join":
                join = msgspec.json.decode(body, type=Join)
                name = join.node
                self._joined(join, link)
                return self.welcome
            return self._told(name, op, body)

        link = Link(handle)
        self._ends.append(asyncio.ensure_future(self._see_out(link)))
        return link

    async def _see_out(self, link: Link) -> None:
        await link.ended()
        self._wake()

    def _joined(self, join: Join, link: Link) -> None:
        if known := self.agents.get(join.node):
            known.link, known.join, known.joins = link, join, known.joins + 1
        else:
            self.agents[join.node] = AgentEnd(link, join)
        self._wake()

    def _told(self, node: str, op: str, body: msgspec.Raw) -> Any:
        end = self.agents[node]
        if op == "worker":
            view = msgspec.json.decode(body, type=WorkerView)
            end.views[view.worker] = view
            end.history.append((view.worker, view.state, view.reason))
        elif op == "going":
            end.going.append(msgspec.json.decode(body, type=Going).reason)
        elif op == "api":
            self.calls.append(msgspec.json.decode(body, type=ApiCall))
            return self.answer
        self._wake()
        return None

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- agents

    def launch(
        self, node: str = "n0", *, devices: str = "", under: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a guardian, with no more of this process's environment than a batch script would give.

        ``under``: a command that becomes the one which follows it.
        """
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        full = {
            **kept,
            "SLURMFORK_RUN_ID": self.run_id,
            "SLURMFORK_RUN_DIR": str(self.rundir.path),
            "SLURMFORK_HEAD": f"127.0.0.1:{self.port}",
            "SLURMFORK_NODE": node,
            "SLURMFORK_LOCAL_DEVICES": devices,
            "SLURMFORK_GUARDIAN_GRACE": "0.2",
            "SLURMFORK_ISOLATION": ISOLATED,
            **environment,
        }
        with self.rundir.agent_log(node).open("ab") as log:
            guardian = subprocess.Popen(
                [*under, sys.executable, "-I", str(AGENT)],
                env=full,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.guardians[node] = guardian
        return guardian

    async def agent(self, node: str = "n0", **options: Any) -> AgentEnd:
        """Start an agent and wait until it has joined."""
        self.launch(node, **options)
        await self.until(lambda: node in self.agents, f"agent {node} to join")
        join = self.agents[node].join
        if options.get("SLURMFORK_ISOLATION", ISOLATED) == "namespace":
            assert join.guarantee == "namespace", join.no_namespace
        return self.agents[node]

    async def ask(self, op: str, body: Any, kind: type[T], node: str = "n0") -> T:
        """Ask an agent."""
        return await self.agents[node].link.ask(op, body, kind, PATIENCE)

    async def start(self, *orders: Order, node: str = "n0", request: str = "") -> list[WorkerView]:
        """Order workers."""
        self._requests += 1
        body = StartOrder(request_id=request or f"start-{self._requests}", orders=list(orders))
        views = await self.ask("start", body, list[WorkerView], node)
        known = self.agents[node].views
        for view in views:  # a notice may have overtaken the answer
            if view.worker not in known or known[view.worker].state is WorkerState.PENDING:
                known[view.worker] = view
        return views

    async def stop(
        self, *workers: str, node: str = "n0", grace: float | None = None, forget: bool = False
    ) -> list[StopResult]:
        """Stop workers."""
        body = StopOrder(workers=list(workers), grace=grace, forget=forget)
        return await self.ask("stop", body, list[StopResult], node)

    async def end(self, node: str = "n0", budget: float | None = 5.0) -> EndReport:
        """End an agent by order, and wait for its guardian."""
        report = await self.ask("end", EndOrder(budget=budget), EndReport, node)
        await self.gone(node)
        return report

    async def gone(self, node: str = "n0") -> int:
        """Wait until a guardian has ended; its exit status."""
        guardian = self.guardians[node]
        await self.until(lambda: guardian.poll() is not None, f"the guardian of {node} to end")
        return guardian.returncode

    async def view(
        self, worker: str, test: Callable[[WorkerView], bool], what: str = "", *, node: str = "n0"
    ) -> WorkerView:
        """Wait until a worker's view passes ``test``."""
        views = self.agents[node].views

        def holds() -> bool:
            return worker in views and test(views[worker])

        await self.until(holds, what or f"{worker}, now {views.get(worker)}")
        return views[worker]

    async def state(self, worker: str, state: WorkerState, *, node: str = "n0") -> WorkerView:
        """Wait until a worker is in ``state``."""
        return await self.view(worker, lambda view: view.state is state, f"{worker} to be {state}", node=node)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that a notice, or the world, brings about."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                logs = {path.name: path.read_text()[-3000:] for path in self.rundir.agents.glob("*.log")}
                raise AssertionError(f"waited {PATIENCE:.0f} s for {what}; the agents' logs: {logs}")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.02)

    # --- looking

    def log(self, worker: str) -> str:
        """What a worker wrote."""
        role, _, index = worker.partition("/")
        path = self.rundir.worker_log(role, int(index))
        return path.read_text() if path.exists() else ""

    async def printed(self, worker: str, *, lines: int = 1) -> list[str]:
        """Wait until a worker has written so many lines."""
        await self.until(lambda: self.log(worker).count("\n") >= lines, f"{worker} to write {lines} lines")
        return self.log(worker).splitlines()

    def left(self) -> list[str]:
        """What runs of this run, its guardians and agents too; of namespaces not what keeps them."""
        return [process.describe(one) for one in self._alive() if process.name(one.pid) not in KEEPERS]

    def _alive(self) -> list[Identity]:
        return [one for one in process.tagged(self.run_id) if process.alive(one)]

    def below(self, node: str = "n0") -> list[int]:
        """The PIDs of an agent's workers and orphans; in a namespace those have fallen to init."""
        found = process.children(self.agents[node].join.agent_pid)
        inits = [pid for pid in found if process.name(pid) == KEEPERS[0]]
        return [pid for pid in found if process.name(pid) not in KEEPERS] + [
            orphan for pid in inits for orphan in process.children(pid)
        ]

    def local(self, node: str = "n0") -> Path:
        """The agent's directory on the node."""
        return node_directory(self.run_id, node)

    async def close(self) -> None:
        """End everything that was started here, whatever state it is in, and see that nothing is left."""
        for guardian in self.guardians.values():
            if guardian.poll() is None:
                guardian.terminate()
        for node in self.guardians:
            with contextlib.suppress(AssertionError):
                await self.gone(node)
        if self._server:
            self._server.close()
        self.hang_up()
        leaked = [process.describe(one) for one in self._alive()]
        for one in process.tagged(self.run_id):
            process.send(one, signal.SIGKILL)
        for guardian in self.guardians.values():
            guardian.wait(PATIENCE)
        assert not leaked, f"left behind: {leaked}"


@contextlib.asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Rig]:
    """A rig for the length of a test."""
    rig = Rig(directory)
    await rig.open()
    try:
        yield rig
    finally:
        await rig.close()


def python(text: str, *arguments: str) -> list[str]:
    """A command that runs a piece of Python, quick to start."""
    return [sys.executable, "-I", "-S", "-c", text, *arguments]


def order(worker: str, command: str | list[str], **fields: Any) -> Order:
    """An order with what tests seldom care about filled in."""
    return Order(worker=worker, command=command, cwd=fields.pop("cwd", "/"), **fields)


_BROOD = """
import os, signal, sys
awkward, directory, kinds, behave = sys.argv[1:5]
for kind in kinds.split(","):
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-I", "-S", awkward, kind, directory, kind])
os.execv(sys.executable, [sys.executable, "-I", "-S", awkward, behave, directory, "leader"])
"""


def brood(directory: Path, *kinds: str, leader: str = "plain") -> list[str]:
    """A command: a leader of kind ``leader`` with awkward processes below it, which announce themselves."""
    return python(_BROOD, str(AWKWARD), str(directory), ",".join(kinds), leader)


async def announced(rig: Rig, directory: Path, *kinds: str) -> dict[str, Identity]:
    """Wait until these have announced themselves; who they are."""
    found = {}
    for kind in kinds:
        path = directory / f"{kind}.pid"
        await rig.until(path.exists, f"{kind} to announce itself")
        pid, start_time = path.read_text().split()
        found[kind] = _seen_from_here(int(pid), int(start_time))
    return found


def _seen_from_here(pid: int, start_time: int) -> Identity:
    """Who has this PID, in the namespace that it is in."""
    for one in map(process.identify, process.pids()):
        if one is not None and one.start_time == start_time and own_pid(one.pid) == pid:
            return one
    return Identity(pid, start_time, process.boot_id())


def own_pid(pid: int) -> int:
    """What a process itself takes for its PID; 0 where it is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[-1]) for line in lines if line.startswith("NSpid:"))
    return 0
