"""The faults of Ray's parts: the driver, the actors, the nodes' raylets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos import sight, stage
from chaos.faults import fault

if TYPE_CHECKING:
    from chaos.trial import Trial

ON_RAY = ("ray",)


@fault("driver-kill", "SIGKILL of Ray's driver", backends=ON_RAY, excuses="intent unverified")
def driver_kill(trial: Trial) -> None:
    trial.kill(trial.one("driver"))


@fault("actor-kill", "SIGKILL of the actor that holds a guardian", backends=ON_RAY, excuses="intent unverified")
def actor_kill(trial: Trial) -> None:
    trial.kill(trial.one("holder"))


@fault(
    "raylet-kill",
    "SIGKILL of the raylet of one of the run's nodes",
    backends=ON_RAY,
    moments=("ready", "forking", "stopping"),
    excuses="intent unverified",
)
def raylet_kill(trial: Trial) -> None:
    """The cluster has it replaced: other trials need nodes, too."""
    spare = trial.stage.spare_raylets()
    above = {sight.parent(one.pid) for one in trial.find("holder")}
    mine = [pid for pid in spare if pid in above]
    if not mine:
        trial.note("the run has no node of which the cluster could lose the raylet")
        trial.result.missed = True
        return
    pid = trial.dice.choice(sorted(mine))
    raylet = stage.until(lambda: sight.who(pid), "the raylet", 5)
    trial.stage.replace_raylet(pid)
    trial.kill(raylet)
