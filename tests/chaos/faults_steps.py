"""Faults at a step: the run is cancelled the moment that a submit, a fork or a restart has got so far."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from chaos import sight, specs, stage
from chaos.faults import fault

if TYPE_CHECKING:
    from chaos.trial import Trial

Step = Callable[["Trial"], object]


def _journaled(trial: Trial, op: str, role: str, count: int = 1) -> bool:
    worker = f'"worker":"{role}/'
    lines = [line for line in trial.journal_lines() if f'"op":"{op}"' in line and worker in line]
    return len(lines) >= count


SUBMIT: dict[str, Step] = {
    "the run is there": lambda trial: trial.look_for_run(),
    "the batch script runs": lambda trial: trial.look_for_run() and trial.find("batch"),
    "the head is there": lambda trial: trial.look_for_run() and trial.find("head"),
    "the head listens": lambda trial: trial.look_for_run() and (trial.rundir / "head.json").exists(),
    "the launcher is there": lambda trial: trial.look_for_run() and trial.find("launcher"),
    "a guardian is there": lambda trial: trial.look_for_run() and trial.find("guardian"),
    "an agent is there": lambda trial: trial.look_for_run() and trial.find("agent"),
    "an intent is journaled": lambda trial: trial.look_for_run() and _journaled(trial, "intent", specs.FIRST),
    "a start is journaled": lambda trial: trial.look_for_run() and _journaled(trial, "started", specs.FIRST),
    "a worker is there": lambda trial: trial.look_for_run() and trial.sight.announced(),
}

FORK: dict[str, Step] = {
    "it was asked for": lambda trial: True,
    "an intent is journaled": lambda trial: _journaled(trial, "intent", specs.FORKED),
    "a start is journaled": lambda trial: _journaled(trial, "started", specs.FORKED),
    "a child is there": lambda trial: any(line.name.startswith(specs.FORKED) for line in trial.sight.announced()),
    "it is done": lambda trial: trial.background[-1].poll() is not None,
}

NO_PROCESS = ("it was asked for", "it is done")

RESTART: dict[str, Step] = {
    "the worker is dead": lambda trial: True,
    "its end is journaled": lambda trial: _journaled(trial, "ended", "again"),
    "a second intent is journaled": lambda trial: _journaled(trial, "intent", "again", 2),
    "a second start is journaled": lambda trial: _journaled(trial, "started", "again", 2),
    "it is there again": lambda trial: len([one for one in trial.sight.announced() if one.name == "again/0"]) > 1,
}


def _reach(trial: Trial, steps: dict[str, Step]) -> None:
    name = trial.dice.choice(list(steps))
    trial.note(f"when {name}")
    stage.until(lambda: steps[name](trial), name, pause=0.001)
    trial.struck()


@fault("cancel-submit", "cancel at a step of a submit", moments=("own",), ends=False, excuses="intent")
def cancel_submit(trial: Trial) -> None:
    trial.submit_in_background()
    _reach(trial, SUBMIT)
    trial.await_submit()


@fault("submit-kill", "SIGKILL of `slurmfork submit`, then cancel", moments=("own",), ends=False, excuses="intent")
def submit_kill(trial: Trial) -> None:
    """Where it died before it had a run directory there is nothing to cancel, and must be nothing to find."""
    submitting = trial.submit_in_background()
    if trial.dice.random() < 0.7:
        stage.until(trial.look_for_run, "the run's directory", pause=0.001)
        trial.wait_a_moment(trial.dice.choice([0.01, 0.1]))
    else:
        trial.wait_a_moment(0.4)
    submitting.send_signal(signal.SIGKILL)
    submitting.wait()
    trial.struck()
    if not trial.look_for_run():
        trial.note("before the run was there")
    elif not trial.job_id:
        trial.note("before its job was recorded")


@fault("cancel-fork", "cancel at a step of a fork", moments=("own",), ends=False, excuses="intent")
def cancel_fork(trial: Trial) -> None:
    trial.submit()
    trial.await_ready()
    trial.fork_in_background()
    strategy = trial.draft.roles[specs.FORKED].get("strategy", {})
    in_process = strategy.get("fork") is False  # then there is neither a process nor a journal's line of one
    _reach(trial, {name: step for name, step in FORK.items() if not in_process or name in NO_PROCESS})


def _with_again(trial: Trial) -> None:
    trial.draft.role("again", "plain", restart={"policy": "always", "max": 5, "backoff": 0.3})


@fault(
    "cancel-restart",
    "cancel at a step of a restart",
    prepare=_with_again,
    moments=("own",),
    ends=False,
    excuses="intent",
)
def cancel_restart(trial: Trial) -> None:
    trial.submit()
    trial.await_ready()
    victim = stage.until(lambda: [line.who for line in trial.sight.leaders() if line.name == "again/0"], "again/0")
    sight.signal_one(victim[0], signal.SIGKILL)
    _reach(trial, RESTART)
