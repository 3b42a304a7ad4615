"""The guardian: the tiny parent of a node's agent, srun's direct task. It passes signals on, reaps, waits.

When the agent ends, however it ends, all that it had falls to the guardian, which ends it too. An agent that was
told to end and does not is ended before Slurm would end all of us. It imports as little as it can, because it stays
for as long as the run, and decides nothing else while the agent lives.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from slurmfork import names, prctl
from slurmfork.killing import end_all
from slurmfork.process import Identity, ancestors, describe, walk, walk_tagged

if TYPE_CHECKING:
    from slurmfork.agent.namespace import Namespace

GRACE = "SLURMFORK_GUARDIAN_GRACE"
DEFAULT_GRACE_S = 2.0
BOUND_S = 10.0
DEFAULT_KILL_WAIT_S = 30.0  # Slurm's own
KILL_MARGIN_S = 1.0

_FAULTS = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGTRAP,
    signal.SIGSYS,
    signal.SIGABRT,
}
_OWN = {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGPIPE,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGWINCH,
    signal.SIGURG,
}
# What would end or stop this process is the agent's to answer: if that dies of it, somebody here sees it.
PASSED_ON = signal.valid_signals() - _FAULTS - _OWN - {signal.SIGCHLD}
WATCHED = PASSED_ON | {signal.SIGCHLD}
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}

AgentMain = Callable[[int], int]


def run(agent_main: AgentMain | None = None, *, bound: float = BOUND_S) -> int:
    """Start the agent below this process, wait for its end, end what it left; returns the exit status."""
    parent, guardian = os.getppid(), os.getpid()
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, it loses statuses
        prctl.rename("slurmfork-guard")
        prctl.become_subreaper()
        prctl.signal_at_parents_death(signal.SIGTERM)
        if os.getppid() != parent:  # it ended before we asked to be told
            return 128 + signal.SIGTERM
        lifeline = os.pipe2(os.O_CLOEXEC) if os.environ.get(names.ISOLATION) in ("namespace", "auto") else None
        agent = os.fork()
    except OSError as error:
        _say(f"cannot start the agent: {error}")
        return 1
    if agent == 0:
        _be_agent(guardian, agent_main or partial(_agent_main, lifeline))
    if lifeline is not None:
        os.close(lifeline[0])
    status, late = _watch(agent)
    return _conclude(status, grace=0.0 if late else _grace(), bound=bound)


def node_name() -> str:
    """What this node is called in the run."""
    given = os.environ.get(names.NODE) or os.environ.get("SLURMD_NODENAME")
    return given or os.uname().nodename.partition(".")[0]


def _agent_main(lifeline: tuple[int, int] | None, guardian: int) -> int:
    """Be the real agent. ``lifeline``: a pipe whose second end the guardian alone keeps; None: no namespace."""
    namespace: Namespace | None = None
    why = ""
    if lifeline is not None:
        os.close(lifeline[1])
        from slurmfork.agent.namespace import Unavailable, create  # before all else: there is but one thread yet

        try:
            namespace = create(grace=_grace(), guardian=lifeline[0])
        except (Unavailable, OSError) as refusal:
            why = str(refusal)
        os.close(lifeline[0])
    from slurmfork.agent.main import main

    return main(guardian, namespace, why)


def _be_agent(guardian: int, agent_main: AgentMain) -> NoReturn:
    """Become the agent, with every signal as a fresh process has it; never returns to the guardian's code."""
    status = 1
    try:
        prctl.rename("slurmfork-agent")
        for number in WATCHED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        status = agent_main(guardian)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status & 0xFF)


def _watch(agent: int) -> tuple[int, bool]:
    """Pass signals on and reap until the agent has ended; its status as ``waitpid`` has it, and whether it was late.

    Late: it was told to end, and did not within what Slurm leaves us.
    """
    deadline = float("inf")
    late = False
    while True:
        rest = deadline - time.monotonic()
        if rest <= 0:
            _say(f"the agent on {node_name()} was told to end and does not: it is killed")
            os.kill(agent, signal.SIGKILL)  # not reaped yet, so this PID is the agent's
            deadline, late = float("inf"), True
            continue
        told = signal.sigwaitinfo(WATCHED) if rest == float("inf") else signal.sigtimedwait(WATCHED, rest)
        if told is None:
            continue
        if told.si_signo in _ENDING and not late:
            deadline = min(deadline, time.monotonic() + max(1.0, kill_wait(os.environ) - KILL_MARGIN_S))
        if told.si_signo != signal.SIGCHLD:
            os.kill(agent, told.si_signo)
        elif (status := _reap().get(agent)) is not None:
            return status, late


def kill_wait(environment: Mapping[str, str]) -> float:
    """Seconds from Slurm's SIGTERM to its SIGKILL."""
    try:
        return float(environment.get(names.KILL_WAIT) or DEFAULT_KILL_WAIT_S)
    except ValueError:
        return DEFAULT_KILL_WAIT_S


def _reap() -> dict[int, int]:
    """Reap every child that has ended; PID -> status."""
    ended: dict[int, int] = {}
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended


def _childless() -> bool:
    """Whether nothing at all is left below this process; a subreaper's last child is its last descendant."""
    _reap()
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def _conclude(status: int, *, grace: float, bound: float) -> int:
    """End what the agent left, say what happened, and choose the exit status."""
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and _childless():
        return 0
    if code < 0:
        _say(f"the agent on {node_name()} was ended by signal {-code}")
    # From here on the kernel reaps: an init is not gone before all that was in its namespace is reaped too.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        outcome = end_all(_leftovers, grace=grace, bound=bound, clear=_childless)
    except OSError as error:
        _say(f"cannot end what the agent on {node_name()} left: {error}")
        return _exit_status(code) or 1
    _reap()
    if outcome.ended:
        _say(f"ended {len(outcome.ended)} processes that the agent on {node_name()} left")
    for survivor in outcome.survivors:
        _say(f"{describe(survivor)} on {node_name()} would not die")
    if not outcome.survivors:
        _tidy()
    return _exit_status(code) or int(bool(outcome.survivors))


def _leftovers() -> Iterator[Identity]:
    """All that is below this process, and what carries the tag of this run and node wherever it is."""
    _reap()
    seen: set[Identity] = set()
    for one in walk(os.getpid()):
        seen.add(one)
        yield one
    if run_id := os.environ.get(names.RUN_ID):
        kin = ancestors(os.getpid())
        for one in walk_tagged(run_id, node_name(), job_id=os.environ.get("SLURM_JOB_ID")):
            if one not in seen and one.pid not in kin:
                yield one


def _tidy() -> None:
    """Remove the node's directory and shared memory, which the agent would have removed."""
    from slurmfork.scratch import remove_left  # not before: what is imported stays for the whole run
    from slurmfork.shm import remove_named

    if run_id := os.environ.get(names.RUN_ID):
        remove_left(run_id, node_name())
        remove_named(run_id)


def _exit_status(code: int) -> int:
    return code if code >= 0 else 128 - code


def _grace() -> float:
    try:
        return min(max(0.0, float(os.environ.get(GRACE, ""))), 60.0)
    except ValueError:
        return DEFAULT_GRACE_S


def _say(text: str) -> None:
    with suppress(OSError, ValueError):
        print(f"slurmfork: {text}", file=sys.stderr, flush=True)
