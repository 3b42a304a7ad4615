"""The faults: what each does to a run, when it may be done, and what it excuses. Here those of single processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos import sight

if TYPE_CHECKING:
    from chaos.trial import Trial

ANY_MOMENT = ("starting", "forking", "ready", "stopping")
LATER = ("forking", "ready", "stopping")
BACKENDS = ("local", "slurm", "ray")
TRACKERS = ("linuxproc", "pgid", "cgroup")

Act = Callable[["Trial"], None]


def nothing(trial: Trial) -> None:
    """For faults that need nothing here."""


def lacks_nothing() -> str:
    """For faults that every machine lets one do."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    ``moments`` are when it may strike ("own": it brings the run up itself). ``ends``: the run ends of it by itself,
    within ``patience`` seconds; else the run is cancelled after it, or ended ``outside`` where no command of
    slurmfork's can name it any more. ``cleans``: where no ring can hold, ``slurmfork clean`` is run at the end.
    ``excuses`` are checks that cannot hold: ``unverified`` (a node could not be asked), ``silent`` (nobody was left to
    say how many survived), ``intent`` (one without a start), ``journal``, ``scratch`` (node-local directories).
    ``core``: pairs are made of these. ``named``: only when asked for by name. ``lacks``: why this machine does not
    let one do it; empty where it does. ``isolated``: it is withstood in a PID namespace alone, where also no ``cleans``
    is needed.
    """

    name: str
    about: str
    strike: Act
    prepare: Act = nothing
    finish: Act = nothing
    moments: tuple[str, ...] = ANY_MOMENT
    backends: tuple[str, ...] = BACKENDS
    ends: bool = True
    outside: bool = False
    cleans: bool = False
    patience: float = 60.0
    excuses: frozenset[str] = frozenset()
    core: bool = False
    named: bool = False
    isolated: bool = False
    lacks: Callable[[], str] = lacks_nothing


REGISTRY: dict[str, Fault] = {}


def fault(name: str, about: str, *, excuses: str = "", **more: object) -> Callable[[Act], Act]:
    """Enter the function that strikes into the registry."""

    def enter(strike: Act) -> Act:
        made = Fault(name=name, about=about, strike=strike, excuses=frozenset(excuses.split()), **more)  # type: ignore[arg-type]
        REGISTRY[name] = made
        return strike

    return enter


# --- what slurmfork and Slurm run


@fault("agent-kill", "SIGKILL of an agent", core=True, excuses="intent unverified")
def agent_kill(trial: Trial) -> None:
    trial.kill(trial.one("agent"))


@fault("guardian-kill", "SIGKILL of a guardian", core=True, excuses="intent unverified")
def guardian_kill(trial: Trial) -> None:
    trial.kill(trial.one("guardian"))


@fault("head-kill", "SIGKILL of the head", core=True, excuses="intent silent")
def head_kill(trial: Trial) -> None:
    trial.kill(trial.one("head"))


@fault(
    "guardian-and-agent-kill",
    "SIGKILL of a guardian and its agent at once",
    core=True,
    cleans=True,
    excuses="intent unverified",
)
def guardian_and_agent_kill(trial: Trial) -> None:
    kill_at_once(trial, trial.one("agent").pid)


def kill_at_once(trial: Trial, agent: int, *others: int) -> None:
    """SIGKILL of an agent, its guardian, and others; none hears of another's death."""
    all_of_them = [one for pid in (*others, sight.parent(agent), agent) if pid > 1 and (one := sight.who(pid))]
    for one in all_of_them:
        sight.signal_one(one, signal.SIGSTOP)
    trial.kill(*all_of_them)


@fault("launcher-kill", "SIGKILL of the launcher (srun)", core=True, excuses="intent unverified")
def launcher_kill(trial: Trial) -> None:
    trial.kill(trial.one("launcher"))


@fault("agent-stop", "SIGSTOP of an agent", core=True, ends=False, excuses="unverified intent")
def agent_stop(trial: Trial) -> None:
    agent = trial.one("agent")
    trial.struck()
    sight.signal_one(agent, signal.SIGSTOP)


@fault("batch-kill", "SIGKILL of the batch script", core=True, excuses="intent silent")
def batch_kill(trial: Trial) -> None:
    trial.kill(trial.one("batch"))


@fault("worker-kill", "SIGKILL of a worker", core=True, ends=False, moments=LATER)
def worker_kill(trial: Trial) -> None:
    leaders = trial.sight.leaders()
    if leaders:
        trial.kill(trial.dice.choice(leaders).who)


# --- nothing but a cancel


@fault("cancel", "`slurmfork cancel`", ends=False)
def cancel(trial: Trial) -> None:
    trial.struck()


@fault("cancel-twice", "`slurmfork cancel` twice, side by side", ends=False)
def cancel_twice(trial: Trial) -> None:
    trial.struck()
    trial.cancel_in_background()


@fault("batch-term", "SIGTERM to the batch script, and once more in the middle of the clean-up", excuses="intent")
def batch_term(trial: Trial) -> None:
    batch = trial.one("batch")
    trial.struck()
    sight.signal_one(batch, signal.SIGTERM)
    trial.wait_a_moment(1.5)
    sight.signal_one(batch, signal.SIGTERM)
