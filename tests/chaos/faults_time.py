"""The fault of the clock: a node's, and the head's, is set back while the run is on.

The machine's own clock is everybody's, and is left alone. Batch script, head, launcher, agents and workers load
clock.c, by which theirs can be set; the commands of slurmfork and Slurm's daemons go by the machine's.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from chaos.faults import fault

if TYPE_CHECKING:
    from chaos.trial import Trial

SOURCE = Path(__file__).with_name("clock.c")
BACK = [5, 3600, 40 * 86_400]  # seconds; the last is further than the run's certificates reach


def _lacks() -> str:
    return "" if shutil.which("cc") else "it needs a C compiler (cc)"


def _own_clock(trial: Trial) -> None:
    library = trial.directory / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True, capture_output=True)
    _file(trial).write_bytes(bytes(8))
    trial.draft.setup = f"export CHAOS_CLOCK={_file(trial)} LD_PRELOAD={library}"


def _file(trial: Trial) -> Path:
    return trial.directory / "clock"


@fault(
    "clock-back",
    "the clock of head and agents set back, by seconds, an hour, or forty days",
    prepare=_own_clock,
    backends=("local", "slurm"),  # Ray's processes, which are the cluster's, have the machine's clock
    ends=False,
    lacks=_lacks,
    excuses="intent",
)
def clock_back(trial: Trial) -> None:
    back = trial.dice.choice(BACK)
    trial.note(f"by {back} s")
    with _file(trial).open("r+b", buffering=0) as file:
        trial.struck()
        file.write((-back).to_bytes(8, "little", signed=True))
    trial.wait_a_moment(2.0)
