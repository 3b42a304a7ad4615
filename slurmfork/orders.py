"""What head and agents say to each other, one JSON document a line on the link that each agent holds to the head.

Typed and strict as ``slurmfork.messages``, whose words for workers and results these use. All times are seconds since
the epoch, all durations seconds.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct, field

from slurmfork.messages import Device, EnvName, RequestId, StopResult, Strict, Text, WorkerName
from slurmfork.spec.model import Ready, Restart, Stop


class EngineOrder(Strict, kw_only=True, omit_defaults=True):
    """What a worker that hosts an engine makes: ``path`` is ``package.module:Class``. As in the spec's role.

    ``checkpoint``: the signal by which it hears that the run is about to end.
    """

    path: str
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    pickle: bool = False
    checkpoint: str | None = None


class Order(Strict, kw_only=True, omit_defaults=True):
    """What the head orders an agent to start: one worker, complete but for what only the node knows.

    ``devices`` are positions in the node's list of granted devices, None for a node's worker that shall see
    no restriction at all (never used for GPUs). ``env`` holds the run's, the role's and the rank variables;
    the agent adds devices, ports, paths and readiness. ``engine`` is in place of a command; ``shared``: it lives in
    the process of ``target``.
    """

    worker: WorkerName
    command: str | list[str] = ""
    cwd: str
    env: dict[EnvName, Text] = field(default_factory=dict)
    devices: list[int] = field(default_factory=list)
    target: WorkerName | None = None
    rank: int = 0
    ports: int = 0
    ready: Ready | None = None
    restart: Restart = field(default_factory=Restart)
    stop: Stop = field(default_factory=Stop)
    engine: EngineOrder | None = None
    shared: bool = False


class Join(Strict, kw_only=True):
    """The first thing that an agent says: who it is and what its node was granted.

    ``no_namespace``: why its node gives none, where the run asks for one.
    """

    node: str
    hostname: str
    address: str
    devices: list[Device]
    cpus: int
    agent_pid: int
    guardian_pid: int
    boot_id: str
    guarantee: Literal["namespace", "cgroup", "rings"]
    no_namespace: str = ""
    version: str
    notes: list[str] = field(default_factory=list)


class Welcome(Strict, kw_only=True):
    """The head's answer to ``Join``. ``heartbeat``: seconds between two looks at the workers' trees.

    ``lease``: seconds for which an agent that lost its link tries to get it back, before it stops everything.
    ``address``: what the head knows of the node's own address (Slurm's NodeAddr), empty where it knows none.
    ``time``: what the head's clock says.
    """

    run_id: str
    heartbeat: float = 10.0
    lease: float = 5.0
    address: str = ""
    time: float | None = None


class Finding(Strict, kw_only=True):
    """Agent to head, in answer to ``preflight``: something on its node that is not as a run would have it.

    ``kind``: devices, leftovers, scratch, shm, or clock. ``serious``: with `preflight: refuse` the run fails of it.
    """

    kind: str
    text: str
    serious: bool = False


class StartOrder(Strict, kw_only=True):
    """Head to agent: start these workers, all or none; answered by a list of WorkerView once each has begun.

    ``request_id``: asked twice, done once. ``reserved``: key -> ports reserved before by ``ReserveOrder`` to be
    owned by the workers named so.
    """

    request_id: RequestId
    orders: list[Order]


class ReserveOrder(Strict, kw_only=True):
    """Head to agent: reserve ports; ``owner`` is the worker (or ``role:NAME``) whose end releases them."""

    owner: str
    count: int


class StopOrder(Strict, kw_only=True):
    """Head to agent: stop these workers with their trees; answered by a list of StopResult when they are gone.

    ``forget``: drop them from the table afterwards, so that their names are free again.
    """

    workers: list[WorkerName]
    grace: float | None = None
    forget: bool = False


class SignalOrder(Strict, kw_only=True):
    """Head to agent: send a signal to these workers."""

    workers: list[WorkerName]
    signal: str


class EndOrder(Strict, kw_only=True):
    """Head to agent: stop everything within ``budget`` seconds (None: as each worker's grace asks), sweep, exit.

    Answered by EndReport before the agent exits.
    """

    budget: float | None = None


class EndReport(Strict, kw_only=True):
    """Agent to head: what the end of the node's work left. ``survivors`` describes each process still there."""

    survivors: list[str] = field(default_factory=list)
    results: list[StopResult] = field(default_factory=list)


class ApiCall(Strict, kw_only=True):
    """Agent to head: an API request that a worker made on the agent's Unix socket, passed on as it came."""

    method: str
    path: str
    body: str = ""
    worker: str | None = None


class ApiAnswer(Strict, kw_only=True):
    """Head to agent: the answer to an ApiCall."""

    status: int
    body: str
    headers: dict[str, str] = field(default_factory=dict)


class Going(Strict, kw_only=True):
    """Agent to head, unasked: this node is about to end, by a signal (SIGTERM from Slurm ...).

    ``lost``: nobody told it to; what it needs there is gone (its guardian, or who held that).
    """

    reason: str
    lost: bool = False


class Frame(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One line on the link. ``id`` pairs a request with its answer; without one it is a notice.

    ``op`` is the request's or the notice's name, empty for an answer; ``error`` set: the request failed.
    """

    id: int = 0
    op: str = ""
    body: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    kind: str = ""
