"""What clients and head say to each other, JSON over HTTPS: typed structs; nothing malformed gets past decoding.

Requests in, views out. What comes from outside is strict: unknown fields and wrong types are errors. All times are
seconds since the epoch, all durations seconds. ``slurmfork.orders`` has what head and agents say on their link.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from slurmfork import names
from slurmfork.errors import UsageError
from slurmfork.names import WorkerState

R = TypeVar("R", bound=Struct)

Name: TypeAlias = Annotated[str, Meta(pattern=rf"^{names.NAME_PATTERN.pattern}\Z")]
WorkerName: TypeAlias = Annotated[str, Meta(pattern=rf"^{names.WORKER_PATTERN.pattern}\Z")]
Target: TypeAlias = Annotated[str, Meta(pattern=rf"^{names.NAME_PATTERN.pattern}(?:/(?:0|[1-9][0-9]{{0,5}}))?\Z")]
EnvName: TypeAlias = Annotated[str, Meta(pattern=rf"^{names.ENV_PATTERN.pattern}\Z", max_length=256)]
Text: TypeAlias = Annotated[str, Meta(pattern=r"^[^\x00]*\Z", max_length=131_072)]
RequestId: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}\Z")]
Device: TypeAlias = int | str  # no string: Python 3.10 would not resolve it inside list[...]


class Strict(Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of what comes from outside."""


# --- workers -----------------------------------------------------------------------------------------------


class WorkerView(Struct, kw_only=True):
    """One worker as `ps --json`, the API and the agents' reports show it.

    ``exit_status`` is the exit code, or 128 + the signal's number as shells have it; ``reason`` says in words
    why a worker is not up; ``log_tail`` is the end of its log, for workers that failed. ``endpoints`` are where the
    host of an engine listens, the quickest first.
    """

    worker: str
    role: str
    index: int
    node: str | None = None
    pid: int | None = None
    state: WorkerState = WorkerState.PENDING
    target: str | None = None
    gpus: list[Device] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    restarts: int = 0
    exit_status: int | None = None
    log: str | None = None
    rank: int = 0
    started: float | None = None
    ready: float | None = None
    ended: float | None = None
    reason: str = ""
    log_tail: str = ""
    endpoints: list[str] = field(default_factory=list)


class StopResult(Struct, kw_only=True):
    """What became of one worker that was to be stopped. ``survivors`` describes processes that would not die."""

    worker: str
    exit_status: int | None = None
    seconds: float = 0.0
    killed: bool = False
    survivors: list[str] = field(default_factory=list)


# --- API requests ------------------------------------------------------------------------------------------


class ForkRequest(Strict, kw_only=True):
    """POST /v1/fork. ``target`` and ``command`` may be left out where the spec's role gives them.

    ``count`` children for each target (or group of targets); ``env`` goes over the role's own.
    """

    role: Name
    request_id: RequestId
    target: Target | None = None
    count: Annotated[int, Meta(ge=1, le=1024)] = 1
    env: dict[EnvName, Text] = field(default_factory=dict)
    command: Annotated[list[Text], Meta(min_length=1, max_length=4096)] | None = None
    timeout: Annotated[float, Meta(gt=0, le=86_400)] | None = None


class StopRequest(Strict, kw_only=True):
    """POST /v1/stop: a role, or one worker. ``grace`` overrides the role's own."""

    target: Target
    request_id: RequestId | None = None
    grace: Annotated[float, Meta(ge=0, le=86_400)] | None = None


class SignalRequest(Strict, kw_only=True):
    """POST /v1/signal: ``signal`` is a name without SIG; to the workers themselves, not to their trees."""

    target: Target
    signal: Annotated[str, Meta(pattern=r"^[A-Z0-9+]{2,12}\Z")]


class PortsRequest(Strict, kw_only=True):
    """POST /v1/ports: reserve ``count`` ports on the node of ``worker``; they are released when it ends."""

    worker: WorkerName
    count: Annotated[int, Meta(ge=1, le=64)] = 1


class CancelRequest(Strict, kw_only=True):
    """POST /v1/cancel: end the run. ``reason`` is shown in its status."""

    reason: Annotated[str, Meta(pattern=r"^[^\x00]*\Z", max_length=500)] = ""


class NoQuery(Strict, kw_only=True):
    """The query of what takes none."""


class StatusQuery(Strict, kw_only=True):
    """The query of GET /v1/status."""

    workers: Annotated[bool, Meta(description="Whether to list the workers.")] = True


class WorkersQuery(Strict, kw_only=True):
    """The query of GET /v1/workers."""

    role: Annotated[Name, Meta(description="Only the workers of this role.")] | UnsetType = UNSET


class EventsQuery(Strict, kw_only=True):
    """The query of GET /v1/events. ``follow`` is the head's to serve: an agent has what there is by now."""

    since: Annotated[int, Meta(ge=0, le=2**63 - 1, description="Only events with a greater number.")] = 0
    follow: Annotated[bool, Meta(description="Also those to come, as they happen, one JSON document a line.")] = False


# --- API replies -------------------------------------------------------------------------------------------


class Health(Struct, kw_only=True):
    """The head is there."""

    ok: bool
    run_id: str
    state: names.RunState


class NodeView(Struct, kw_only=True):
    """One node of a run. ``guarantee``: which containment holds there, ``namespace``,
    ``cgroup`` or ``rings``.

    ``silent``: its agent does not answer at the moment.
    """

    node: str
    address: str = ""
    joined: bool = False
    guarantee: str = "rings"
    devices: list[Device] = field(default_factory=list)
    cpus: int = 0
    agent_pid: int | None = None
    guardian_pid: int | None = None
    silent: bool = False
    notes: list[str] = field(default_factory=list)


class WorkerCounts(Struct, kw_only=True):
    """How many workers are up with and without a readiness check, have failed, and are known in all."""

    ready: int = 0
    running: int = 0
    failed: int = 0
    total: int = 0


class StatusView(Struct, kw_only=True):
    """GET /v1/status, and ``status.json``: the run as its head sees it. ``seq`` grows with each change."""

    run_id: str
    state: names.RunState
    reason: str = ""
    exit_status: int | None = None
    nodes: list[NodeView] = field(default_factory=list)
    counts: WorkerCounts = field(default_factory=WorkerCounts)
    workers: list[WorkerView] = field(default_factory=list)
    seq: int = 0
    updated: float = 0.0
    started: float | None = None
    ready: float | None = None


class WorkersReply(Struct, kw_only=True):
    """Workers, by role and index."""

    workers: list[WorkerView]


class ForkReply(Struct, kw_only=True):
    """The children of a fork, all of them up."""

    workers: list[WorkerView]


class StopReply(Struct, kw_only=True):
    """What a stop did; ``survivors`` counts processes that are still there."""

    stopped: list[str]
    survivors: int
    results: list[StopResult] = field(default_factory=list)


class SignalReply(Struct, kw_only=True):
    """The names of the workers that were signalled."""

    signalled: list[str]


class PortsReply(Struct, kw_only=True):
    """The ports that were reserved."""

    ports: list[int]


class CancelReply(Struct, kw_only=True):
    """How a cancelled run ended; sent when nothing of it runs on any node that could be asked.

    ``notes``: what else went wrong, as a scheduler that would not cancel the job.
    """

    state: names.RunState
    survivors: int
    unverified: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class ErrorReply(Struct, kw_only=True):
    """Body of every API error. ``kind`` is stable, ``error`` one line for people, ``workers`` who failed and how."""

    error: str
    kind: str = "refused"
    workers: list[WorkerView] = field(default_factory=list)


class Event(Struct, kw_only=True, omit_defaults=True):
    """One line of ``events.jsonl`` and of GET /v1/events: something happened to the run or to a worker."""

    seq: int
    time: float
    kind: str
    state: str = ""
    worker: str | None = None
    node: str | None = None
    message: str = ""


class EventsReply(Struct, kw_only=True):
    """Events, the oldest first."""

    events: list[Event]


# --- making requests ---------------------------------------------------------------------------------------


_NAMES = {"role": "not a role's name", "target": "neither a role nor a worker (role/index)"}


def new_request_id() -> str:
    """A request id: what carries it is done once, however often it is sent."""
    return secrets.token_hex(12)


def fork_request(
    role: str,
    *,
    target: str | None,
    count: int,
    env: Mapping[str, str] | None,
    command: Sequence[str] | None,
    timeout: float | None,
    request_id: str | None = None,
) -> ForkRequest:
    """A fork request, with an id of its own if none is given; raises UsageError for what the head would refuse."""
    if command is not None and (isinstance(command, str) or not isinstance(command, Sequence)):
        raise UsageError(f"command is a list of words, not {command!r}; for a shell it is ['sh', '-c', TEXT]")
    if env is not None and not isinstance(env, Mapping):
        raise UsageError(f"env maps names to values; it is not {env!r}")
    return checked(
        ForkRequest(
            role=role,
            request_id=request_id or new_request_id(),
            target=target,
            count=count,
            env=dict(env or {}),
            command=list(command) if command else None,
            timeout=timeout,
        )
    )


def checked(request: R) -> R:
    """A request held to the rules of its type, before anything is sent; raises UsageError."""
    try:
        return msgspec.json.decode(msgspec.json.encode(request), type=type(request))
    except (msgspec.ValidationError, TypeError) as error:
        raise UsageError(_plainly(request, str(error))) from None


def _plainly(request: Struct, told: str) -> str:
    """What is wrong with a name, without the pattern that it does not match."""
    found = re.search(r"matching regex .* `\$\.(\w+)`$", told)
    if found is None or found[1] not in _NAMES:
        return told
    return f"{getattr(request, found[1])!r} is {_NAMES[found[1]]}"
