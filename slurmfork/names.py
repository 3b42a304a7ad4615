"""The words of the contracts: states, environment variables, and the names that may be used for things.

Imports nothing of the package, and little of the standard library: the guardian reads it too.
"""

from __future__ import annotations

import re
from enum import Enum


class RunState(str, Enum):
    """State of a run. ``ENDED_STATES`` are final. ``UNKNOWN``: what its directory holds cannot be read."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    PREEMPTED = "preempted"
    NODE_FAIL = "node_fail"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


class WorkerState(str, Enum):
    """State of a worker. ``READY`` follows a readiness check, ``RUNNING`` is for workers without one."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    RUNNING = "running"
    RESTARTING = "restarting"
    EXITED = "exited"
    FAILED = "failed"
    STOPPED = "stopped"

    def __str__(self) -> str:
        return self.value


ENDED_STATES = frozenset(
    {
        RunState.COMPLETED,
        RunState.FAILED,
        RunState.CANCELLED,
        RunState.TIMEOUT,
        RunState.PREEMPTED,
        RunState.NODE_FAIL,
    }
)
UP_STATES = frozenset({WorkerState.READY, WorkerState.RUNNING})
LIVE_STATES = frozenset({WorkerState.STARTING, WorkerState.READY, WorkerState.RUNNING, WorkerState.RESTARTING})
OVER_STATES = frozenset({WorkerState.EXITED, WorkerState.FAILED, WorkerState.STOPPED})

ROOT = "SLURMFORK_ROOT"
CLUSTER = "SLURMFORK_CLUSTER"
RUN_ID = "SLURMFORK_RUN_ID"
RUN_DIR = "SLURMFORK_RUN_DIR"
NODE = "SLURMFORK_NODE"
WORKER = "SLURMFORK_WORKER"
ROLE = "SLURMFORK_ROLE"
INDEX = "SLURMFORK_INDEX"
PORTS = "SLURMFORK_PORTS"
AGENT = "SLURMFORK_AGENT"
TARGET = "SLURMFORK_TARGET"
HEAD = "SLURMFORK_HEAD"
BATCH = "SLURMFORK_BATCH"
ATTEMPT = "SLURMFORK_ATTEMPT"
SSH_CONFIG = "SLURMFORK_SSH_CONFIG"
MARKS = "SLURMFORK_MARKS"  # DESCRIPTOR:TEXT, for `logs` to tell where it is and to begin again there
DRESSED = "SLURMFORK_DRESSED"  # names of variables that tell of a terminal elsewhere, and are no job's
KILL_WAIT = "SLURMFORK_KILL_WAIT"
ISOLATION = "SLURMFORK_ISOLATION"
DEVICE_FILES = "SLURMFORK_DEVICE_FILES"
# What torchrun tells each of its workers, and so do we.
RANKS = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
# What a worker is told of itself by other names than ours: a run that it submits must not take it for its own.
WORKERS_OWN = RANKS | {"NOTIFY_SOCKET", "TMPDIR"}

NAME_PATTERN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,38}[A-Za-z0-9])?")
RUN_ID_PATTERN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,46}[A-Za-z0-9])?")
NODE_PATTERN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?")
ENV_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
WORKER_PATTERN = re.compile(rf"({NAME_PATTERN.pattern})/(0|[1-9][0-9]{{0,5}})")


def worker_name(role: str, index: int) -> str:
    """The name of a worker, ``role/index``."""
    return f"{role}/{index}"


def split_target(text: str) -> tuple[str, int | None]:
    """Read ``role`` or ``role/index``; raises ValueError for anything else."""
    if match := WORKER_PATTERN.fullmatch(text):
        return match[1], int(match[2])
    if NAME_PATTERN.fullmatch(text):
        return text, None
    raise ValueError(f"{text!r} is neither a role nor a worker (role/index)")


def natural(text: str) -> list[tuple[int, int | str]]:
    """Sort key of names with numbers in them: n2 before n10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text)]
