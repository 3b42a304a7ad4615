"""What must hold when a run is over: its status, its journal against what was really there, nothing on the disk."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaos import sight
from chaos.sight import Line, Who
from slurmfork.errors import SlurmforkError
from slurmfork.names import ENDED_STATES
from slurmfork.run import Run
from slurmfork.scratch import node_directory

if TYPE_CHECKING:
    from chaos.trial import Trial

NEAR = 4.0  # seconds within which a turn of events explains what is missing
PATIENCE = 30.0


def all_of(trial: Trial) -> list[str]:
    """Everything that does not hold, in words."""
    if not trial.run_id:
        return []
    return [*_status(trial), *_journal(trial), *_scratch(trial), *_isolation(trial)]


def _isolation(trial: Trial) -> list[str]:
    """Whether everybody was where the spec wants them."""
    wanted = trial.stage.isolation == "namespace"
    wrong = {line.name for line in trial.sight.announced() if line.inside != wanted}
    return [f"{', '.join(sorted(wrong))} ran {'out' if wanted else 'in'}side of a namespace"] if wrong else []


def _status(trial: Trial) -> list[str]:
    if any(one.outside for one in trial.faults):
        return []
    try:
        status = Run.load(trial.run_id, trial.root).status()
    except SlurmforkError as error:
        return [f"status: {error}"]
    found = []
    if status.state not in ENDED_STATES:
        found.append(f"status says {status.state}: {status.reason}")
    if status.survivors:
        found.append(f"status says that {status.survivors} survived")
    headless = not (trial.rundir / "head.json").exists()  # nobody was there yet who could say
    if status.survivors is None and "silent" not in trial.excuses and not headless:
        found.append(f"status does not say how many survived ({status.state} by {status.source}: {status.reason})")
    if status.unverified and "unverified" not in trial.excuses:
        found.append(f"status says that {status.unverified} could not be asked")
    return found


def _journal(trial: Trial) -> list[str]:
    """The journal's starts were announced and are gone; announced workers are in it; no intent hangs."""
    if "journal" in trial.excuses:
        return []
    records = [record for line in trial.journal_lines() if (record := _decoded(line))]
    started = {Who(one["pid"], one["start_time"]): one for one in records if one["op"] == "started"}
    by_start = {(one.start, record["worker"]): one for one, record in started.items()}
    lines = [line for line in trial.sight.announced() if line.leader]
    leaders = {_outer(line, by_start): line.name for line in lines}
    intents = {one["start_id"]: one for one in records if one["op"] == "intent"}
    starts = {one["start_id"] for one in started.values()}
    ended = {(one["start_id"], one["pid"]): one["time"] for one in records if one["op"] == "ended"}
    found = []
    for one, record in started.items():
        if sight.lives(one) and one not in trial.sight.spared:
            found.append(f"the journal's {record['worker']} (pid {one.pid}) lives")
        over = ended.get((record["start_id"], one.pid), time.time())
        brief = over - record["time"] < NEAR or _near(trial, record["time"])
        if one not in leaders and not brief and not record["argv"][0].endswith("/true"):
            found.append(f"the journal's {record['worker']} (pid {one.pid}) never announced itself")
        if leaders.get(one, record["worker"]) != record["worker"]:
            found.append(f"pid {one.pid} is {record['worker']} in the journal, and was {leaders[one]}")
    for one, name in leaders.items():
        # An agent that was killed between start and record leaves the intent, and the tag.
        if one not in started and not ("intent" in trial.excuses and _intended(name, intents, starts)):
            found.append(f"{name} (pid {one.pid}) is not in the journal")
    if "intent" not in trial.excuses:
        hanging = [one for key, one in intents.items() if key not in starts and not _near(trial, one["time"])]
        found += [f"an intent of {one['worker']} has no start" for one in hanging]
    return found


def _outer(line: Line, started: dict[tuple[int, str], Who]) -> Who:
    """Who announced this; where it had ended before its PID could be translated, by start time and name."""
    return line.who if line.who.pid > 0 else started.get((line.who.start, line.name), line.who)


def _intended(name: str, intents: dict[str, Any], starts: set[str]) -> bool:
    return any(one["worker"] == name and key not in starts for key, one in intents.items())


def _near(trial: Trial, moment: float) -> bool:
    return any(abs(turn - moment) < NEAR for turn in trial.turns)


def _decoded(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(line)
        return found
    return None


def _scratch(trial: Trial) -> list[str]:
    """What lies on the node still. Where nobody may have been left there to remove it, ``clean`` is to do it."""
    if "silent" in trial.excuses and scratch(trial):
        trial.note(f"scratch was left to clean: {trial.shell.call('clean', trial.run_id).stdout.strip()}")
    return [] if "scratch" in trial.excuses else [f"{place} is left on the node" for place in scratch(trial)]


def scratch(trial: Trial) -> list[Path]:
    """Node-local directories that are there; only their names are asked of slurmfork."""
    places = [node_directory(trial.run_id, trial.stage.node(number)) for number in range(1, trial.stage.size + 1)]
    return [place for place in places if trial.run_id and place.exists()]
