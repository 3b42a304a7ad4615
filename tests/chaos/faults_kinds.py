"""Faults that are the workers' own doing: kinds of them that are hard to end, or hard to find."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from chaos import sight, specs, stage, worker
from chaos.faults import LATER, REGISTRY, Act, Fault, fault, kill_at_once
from chaos.sight import Who

if TYPE_CHECKING:
    from chaos.trial import Trial

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def _with(kind: str, **more: object) -> Act:
    def prepare(trial: Trial) -> None:
        trial.draft.role(kind, kind, stop={"grace": 1.0}, **more)

    return prepare


def _await(kind: str, count: int) -> Act:
    """Strike when so many of its processes are there."""

    def strike(trial: Trial) -> None:
        def there() -> bool:
            return sum(line.name.startswith(f"{kind}/") for line in trial.sight.announced()) >= count

        stage.until(there, f"{count} processes of the {kind} worker")
        trial.wait_a_moment(0.5)
        trial.struck()

    return strike


KINDS = [
    ("stubborn", 1, "a worker that ignores SIGTERM"),
    ("stopped", 1, "a worker that is stopped (SIGSTOP)"),
    ("daemon", 2, "a worker that double-forks with setsid"),
    ("hidden", 2, "a daemon that closes every descriptor, changes directory and title"),
    ("scrubbed", 2, "a daemon started with `env -i`"),
    ("breeder", 20, f"a worker that starts {worker.PER_SECOND} processes a second"),
    ("thousand", worker.CHILDREN, f"{worker.CHILDREN} children of one worker"),
]

for _kind, _count, _about in KINDS:
    REGISTRY[f"worker-{_kind}"] = Fault(
        name=f"worker-{_kind}",
        about=_about,
        prepare=_with(_kind),
        strike=_await(_kind, _count),
        moments=("ready",),
        ends=False,
    )


def _with_bomb(trial: Trial) -> None:
    _with("bomb", on_failure="ignore")(trial)


def _gone_off(trial: Trial) -> None:
    stage.until(lambda: len(trial.sight.workers()) >= worker.BOMB // 2, "the fork bomb to go off")
    trial.wait_a_moment(0.5)


@fault(
    "worker-bomb",
    f"a fork bomb of {worker.BOMB} processes",
    prepare=_with_bomb,
    moments=("ready",),
    ends=False,
    isolated=True,
)
def bomb(trial: Trial) -> None:
    _gone_off(trial)
    trial.struck()


@fault(
    "bomb-and-keepers-gone",
    "guardian and agent killed at once while a fork bomb goes off",
    prepare=_with_bomb,
    moments=("ready",),
    isolated=True,
    excuses="unverified intent",
)
def bomb_and_keepers_gone(trial: Trial) -> None:
    leader = next(line.who for line in trial.sight.leaders() if line.name.startswith("bomb/"))
    agent = sight.parent(leader.pid)
    _gone_off(trial)
    kill_at_once(trial, agent)


@fault(
    "worker-escaped",
    "a process that moved itself out of the job's control groups",
    prepare=_with("escaped"),
    moments=("ready",),
    ends=False,
)
def escaped(trial: Trial) -> None:
    """There is something to leave only where Slurm has put the job into control groups."""
    _await("escaped", 2)(trial)
    those = [line.who.pid for line in trial.sight.leaders() if line.name.startswith("escaped/")]
    left = [_groups(sight.parent(pid)) - _groups(pid) for pid in those]
    trial.note(f"it left {', '.join(sorted(left[0])) or 'none: it was in none'}" if left else "it is gone already")
    if left and not left[0] and trial.stage.proctrack == "cgroup" and trial.stage.backend == "slurm":
        raise stage.Broken("the process could not leave its control groups")


def _groups(pid: int) -> set[str]:
    """The control groups of Slurm's that a process is in."""
    lines = [line.split(":", 2) for line in sight.read(pid, "cgroup").decode().splitlines()]
    return {f"{names or 'cgroup2'} job_{path.rpartition('/job_')[2]}" for _, names, path in lines if "/job_" in path}


def _with_instant(trial: Trial) -> None:
    restart = {"policy": "always", "max": 20, "backoff": 0}
    more = {"replicas": 4, "restart": restart, "on_failure": "ignore"}
    trial.draft.roles["unseen"] = {"command": ["/bin/true"], **more}


@fault("worker-instant", "a child that exits between start and record", prepare=_with_instant, ends=False)
def instant(trial: Trial) -> None:
    trial.struck()


@fault(
    "loaders-orphaned",
    "loaders blocked in a pipe write, their rank killed by SIGKILL",
    prepare=_with("loader", on_failure="end"),
    moments=("ready",),
)
def loaders_orphaned(trial: Trial) -> None:
    _await("loader", 5)(trial)
    rank = next(line.who for line in trial.sight.leaders() if line.name.startswith("loader/"))
    trial.kill(rank)


@fault(
    "keepers-and-tag-gone",
    "guardian and agent killed the moment that a worker has a daemon without environment",
    prepare=_with("scrubbed"),
    moments=("own",),
    cleans=True,
    excuses="unverified intent",
)
def keepers_and_tag_gone(trial: Trial) -> None:
    """No ring is left that knows of the daemon, but for what the journal and the kernel can tell."""
    trial.submit()

    def there() -> list[Who]:
        lines = [line for line in trial.sight.announced() if line.name.startswith("scrubbed/")]
        return [line.who for line in lines if line.leader and len(lines) > 1]

    leader = stage.until(there, "the daemon", pause=0.001)[0]
    kill_at_once(trial, sight.parent(leader.pid))


# --- reused PIDs


def _cannot_choose() -> str:
    may = os.access(LAST_PID, os.W_OK) and os.geteuid() == 0
    return "" if may else "it needs root, where the next PID may be chosen"


@fault(
    "pid-reuse",
    "recorded PIDs reused by innocents before the clean-up (forced)",
    moments=LATER,
    cleans=True,
    ends=False,
    lacks=_cannot_choose,
    excuses="unverified intent",
)
def pid_reuse(trial: Trial) -> None:
    """Workers end, some unseen by their agent, who is killed with its guardian before; others get their PIDs."""
    doomed = [line.who for line in trial.sight.leaders()][:8]
    if trial.dice.random() < 0.7:
        above = [*trial.find("agent"), *trial.find("guardian")]
        for one in above:
            sight.signal_one(one, signal.SIGSTOP)
        trial.kill(*above)
    trial.kill(*trial.sight.workers())
    taken = [one for one in doomed if _occupy(trial, one)]
    trial.note(f"{len(taken)} of {len(doomed)} PIDs reused")


def _occupy(trial: Trial, doomed: Who) -> bool:
    """Have an innocent with this PID, once it is free; False where somebody else was quicker, a new worker perhaps."""
    pid = doomed.pid
    argv = specs.command("plain", trial.stage.directory / "decoys", "first/0", str(stage.FOREVER))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        LAST_PID.write_text(str(pid - 1))
        child = os.fork()
        if child == 0:
            _become(argv, pid)
        if child == pid:
            trial.adopt(f"an innocent with the PID {pid} of a worker", child)
            return True
        os.waitpid(child, 0)
        if sight.who(pid) not in (None, doomed):
            return False
        stage.pause(0.005)
    return False


def _become(argv: list[str], pid: int) -> None:
    try:
        if os.getpid() == pid:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            os.closerange(3, 4096)
            os.execve(argv[0], argv, {"PATH": os.defpath})
    finally:
        os._exit(0)
