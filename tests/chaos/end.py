"""The end of a trial: its run is brought to its end, and what is left is counted, before and after a clean."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

from chaos import sight, stage
from chaos.sight import Watch
from slurmfork.errors import SlurmforkError

if TYPE_CHECKING:
    from chaos.trial import Trial

PATIENCE = 60.0
CANCEL_PATIENCE = 150.0
SLOW = 40.0  # seconds after which a cancel is pictured
SETTLE = 20.0


def bring(trial: Trial) -> None:
    """Wait for the end that the fault brings, or bring one."""
    if not trial.run_id:
        return
    outside = any(one.outside for one in trial.faults)
    if outside:
        _from_outside(trial)
    elif not trial.cancels and not trial.result.missed and any(one.ends for one in trial.faults):
        patience = max(one.patience for one in trial.faults)
        if not _wait_over(trial, patience):
            trial.fail(f"not over by itself within {patience:g} s: {trial.status_words()}")
    if not outside:
        if not trial.cancels and not trial.over():
            trial.struck()
            trial.cancel_in_background()
        _await_cancels(trial)
        if not _wait_over(trial, PATIENCE):
            trial.fail(f"never over: {trial.status_words()}")
    _told_too_early(trial)
    _end_caller(trial)
    for child in trial.background:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=stage.PATIENCE)
        if child.poll() is None:
            trial.fail(f"`slurmfork {child.args[3]}` hangs")  # type: ignore[index]
            stage.kill_group(child)


def _end_caller(trial: Trial) -> None:
    """Whoever calls engines has every call answered, or failed, by the time that the run is over."""
    if trial.caller is None:
        return
    try:
        said, _ = trial.caller.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        trial.caller.send_signal(signal.SIGABRT)
        said, _ = trial.caller.communicate()
        trial.fail(f"calls of engines hang when the run is over: {said.strip()[-1500:]}")
        return
    if trial.caller.returncode:
        trial.fail(f"who calls engines was told something else: {said.strip()[-1500:]}")
    else:
        trial.note(f"calls of engines: {said.strip()}")


def _from_outside(trial: Trial) -> None:
    trial.struck()
    if trial.stage.backend == "slurm":
        trial.stage.slurm("scancel", trial.job_id, check=False)
    else:
        for one in trial.find("batch"):
            sight.signal_one(one, signal.SIGTERM)


def _await_cancels(trial: Trial) -> None:
    for child in trial.cancels:
        found = _patiently(trial, child)
        if found is None:
            continue
        output, errors = found
        told = _document(output)
        if child.returncode and not told.get("unverified"):
            trial.fail(f"cancel: exit status {child.returncode}: {errors.strip()[-300:]}")
        elif child.returncode and "unverified" not in trial.excuses:
            trial.fail(f"cancel could not ask {told['unverified']}")


def _patiently(trial: Trial, child: subprocess.Popen[str]) -> tuple[str, str] | None:
    """What a cancel says; None where it hangs, which is told with the place that it hangs at."""
    for number, patience in enumerate((SLOW, CANCEL_PATIENCE - SLOW)):
        try:
            return child.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            _picture(trial, f"slow-cancel-{number}")
    child.send_signal(signal.SIGABRT)  # the stage has its commands say where they are then
    _, errors = child.communicate(timeout=stage.PATIENCE)
    trial.fail(f"`slurmfork cancel` hangs for more than {CANCEL_PATIENCE:g} s: {errors.strip()[-1500:]}")
    return None


def _picture(trial: Trial, name: str) -> None:
    """Leave a list of all processes, and of Slurm's jobs and steps, with the trial, for whoever looks into it."""
    commands = ["ps axfww -o pid,ppid,sid,stat,etimes,wchan:24,args"]
    if trial.stage.backend == "slurm":
        commands += ["squeue -a", "squeue -s", f"scontrol show job {trial.job_id}", "sinfo -N -l"]
    with (trial.directory / name).open("w") as file:
        for line in commands:
            file.write(f"$ {line}\n")
            file.flush()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may be Slurm that is slow
                subprocess.run(line.split(), stdout=file, stderr=file, timeout=5, check=False)
    trial.note(f"`slurmfork cancel` is slow: see {name}")


def _wait_over(trial: Trial, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not trial.over():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _told_too_early(trial: Trial) -> None:
    """Whether "0 survivors" was said, of every node, while something was there."""
    with contextlib.suppress(SlurmforkError):
        status = trial.status()
        told = status.over and status.survivors == 0 and not status.unverified
        if told and (left := trial.sight.workers()):
            trial.fail(f"told {status.state} with 0 survivors while {len(left)} processes were there")


def count(trial: Trial, watch: Watch) -> None:
    """What is left when all is over, and what of that a clean leaves."""
    result = trial.result
    result.due = trial.stage.isolation == "none" and any(one.cleans for one in trial.faults)
    if left := trial.sight.none_left(SETTLE):
        result.left = [sight.describe(one) for one in left]
        said = trial.shell.call("clean", trial.run_id) if trial.run_id else None
        remain = trial.sight.none_left(SETTLE if result.due else 1.0)
        result.survivors = [sight.describe(one) for one in remain]
        if said and not result.due:
            trial.note(f"clean said: {said.stdout}{said.stderr}")
    if trial.began is not None and watch.gone is not None and watch.gone > trial.began:
        result.seconds = watch.gone - trial.began


def _document(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(text)
        return found
    return {}
