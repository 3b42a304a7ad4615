"""Faults that are Slurm's: its ways of ending a job, and the death of a node's daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos import sight, stage
from chaos.faults import LATER, fault, kill_at_once

if TYPE_CHECKING:
    from chaos.trial import Trial

SLURM = ("slurm",)
SLURMD_MOMENTS = ("forking", "ready")


def _scancel(trial: Trial, *options: str) -> None:
    trial.struck()
    trial.stage.slurm("scancel", *options, trial.job_id, check=False)


@fault("scancel", "scancel", backends=SLURM, excuses="intent")
def scancel(trial: Trial) -> None:
    _scancel(trial)


@fault("scancel-kill", "scancel --signal=KILL", backends=SLURM, excuses="intent unverified")
def scancel_kill(trial: Trial) -> None:
    _scancel(trial, "--signal=KILL")


@fault("scancel-batch", "scancel --batch", backends=SLURM, excuses="intent silent")
def scancel_batch(trial: Trial) -> None:
    """SIGKILL for the batch script; with cgroups Slurm then ends the head, too, which is in the same step."""
    _scancel(trial, "--batch")


@fault("scancel-twice", "scancel twice, the second in the middle of the clean-up", backends=SLURM, excuses="intent")
def scancel_twice(trial: Trial) -> None:
    _scancel(trial)
    trial.wait_a_moment(2.0)
    trial.stage.slurm("scancel", trial.job_id, check=False)


@fault("requeue", "scontrol requeue", backends=SLURM, moments=LATER, ends=False, excuses="intent")
def requeue(trial: Trial) -> None:
    """The first attempt ends; whatever the second becomes is cancelled."""
    trial.stage.slurm("scontrol", "update", f"JobId={trial.job_id}", "Requeue=1", check=False)
    trial.struck()
    trial.stage.slurm("scontrol", "requeue", trial.job_id, check=False)
    first = {line.who for line in trial.sight.announced()}
    stage.until(lambda: not any(sight.lives(one) for one in first), "the first attempt's workers to end")
    trial.wait_a_moment(3.0)


@fault(
    "stepd-kill",
    "SIGKILL of slurmstepd, the daemon of a node's step",
    backends=SLURM,
    moments=LATER,
    core=True,
    cleans=True,
    excuses="intent unverified silent",
)
def stepd_kill(trial: Trial) -> None:
    trial.kill(trial.one("stepd"))


@fault(
    "stepd-and-keepers-kill",
    "SIGKILL of slurmstepd, guardian and agent of a node at once",
    backends=SLURM,
    moments=LATER,
    cleans=True,
    excuses="intent unverified silent",
)
def stepd_and_keepers_kill(trial: Trial) -> None:
    """Nobody is left who knows of the node's part of the run."""
    agent = trial.one("agent").pid
    guardian = sight.parent(agent)
    kill_at_once(trial, agent, sight.parent(guardian))


def _short(trial: Trial) -> None:
    trial.draft.slurm["time"] = "00:01:00"


@fault(
    "time-limit",
    "the time limit of one minute",
    prepare=_short,
    moments=("ready",),
    backends=SLURM,
    patience=180,
    named=True,
    excuses="intent",
)
def time_limit(trial: Trial) -> None:
    """Strikes when Slurm does: what is measured begins with the first process's end."""
    everybody = trial.sight.workers()
    stage.until(lambda: not all(sight.lives(one) for one in everybody), "the time limit", 150)
    trial.struck()


def _elsewhere(trial: Trial) -> None:
    """The second run's node is not to be taken from it."""
    trial.draft.slurm["exclude"] = trial.stage.node(1)


def _bring_back(trial: Trial) -> None:
    for node in trial.taken_down:
        trial.stage.start_slurmd(node)
        trial.stage.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

        def idle(node: str = node) -> bool:
            return trial.stage.slurm("sinfo", "-h", "-n", node, "-o", "%T", check=False).strip() in ("idle", "mixed")

        stage.until(idle, f"{node} to be back", 90, pause=0.2)


@fault(
    "slurmd-kill",
    "slurmd killed and its node set down",
    prepare=_elsewhere,
    finish=_bring_back,
    moments=SLURMD_MOMENTS,
    backends=SLURM,
    core=True,
    cleans=True,
    excuses="intent unverified silent",
)
def slurmd_kill(trial: Trial) -> None:
    """The node is told down at once; what runs there knows nothing of it."""
    nodes = trial.stage.slurm("scontrol", "show", "hostnames", _nodelist(trial)).split()
    node = trial.dice.choice(sorted(nodes))
    trial.taken_down.append(node)
    trial.struck()
    sight.kill(trial.stage.slurmd(node))
    trial.stage.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=chaos")


def _nodelist(trial: Trial) -> str:
    words = trial.stage.slurm("scontrol", "-o", "show", "job", trial.job_id).split()
    return next(word.partition("=")[2] for word in words if word.startswith("NodeList="))
