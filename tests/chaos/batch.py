"""A batch of trials: one after the other on one stage, or several side by side, each job on a stage of its own.

Jobs are processes. They share the machine, and nothing else: each has its own cluster, second run and decoys, and no
trial looks for anything but its own marks.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from chaos.faults import Fault
from chaos.result import Result
from chaos.stage import Broken, Stage
from chaos.trial import Trial

FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Plan:
    """What is to be tried. The seed chooses of ``choice``, and says all that is random in a trial."""

    backend: str
    proctrack: str
    isolation: str
    choice: list[list[Fault]]
    seeds: range
    directory: Path
    until: float = float("inf")
    keep: bool = False
    engines: bool = False

    def trial_directory(self, seed: int) -> Path:
        return self.directory / f"trial-{seed}"

    def trial(self, stage: Stage, seed: int) -> Result:
        """One trial. An interruption goes on to the caller, with nothing left of the trial."""
        directory = self.trial_directory(seed)
        trial = Trial(stage, directory, seed, self.choice[seed % len(self.choice)])
        try:
            result = trial.run()
        except KeyboardInterrupt:
            trial.tidy()
            raise
        except Exception:
            result = trial.result
            result.failures.append(f"fault in the checker: {traceback.format_exc()}")
        if result.ok and not self.keep:
            shutil.rmtree(directory, ignore_errors=True)
        return result


def run(plan: Plan, jobs: int) -> Iterator[Result]:
    """Results as they come; raises Broken where there is no stage to be had."""
    turn = FORK.Value("q", plan.seeds.start)
    doors: dict[Connection, ForkProcess] = {}
    try:
        for number in range(min(jobs, len(plan.seeds))):
            door, far = FORK.Pipe(duplex=False)
            worker = FORK.Process(target=_job, args=(plan, number, turn, far))
            worker.start()
            doors[door] = worker
            far.close()  # the job has the only one: its end is heard
        yield from _collected(doors)
    finally:
        for worker in doors.values():
            if worker.is_alive():
                worker.terminate()
        for worker in doors.values():
            worker.join()


def _collected(doors: dict[Connection, ForkProcess]) -> Iterator[Result]:
    open_doors = set(doors)
    while open_doors:
        for door in wait(list(open_doors)):
            assert isinstance(door, Connection)
            try:
                said = door.recv()
            except EOFError:
                open_doors.discard(door)
                doors[door].join()
                if doors[door].exitcode:
                    raise Broken(f"a job ended with {doors[door].exitcode}") from None
                continue
            if isinstance(said, str):
                raise Broken(said)
            yield said


def _job(plan: Plan, number: int, turn: Any, far: Connection) -> None:
    """Take seed after seed; leave nothing on the machine, however it ends."""
    signal.signal(signal.SIGTERM, leave)
    directory = plan.directory / f"job-{number}"
    directory.mkdir()
    try:
        shape = {"engines": plan.engines, "isolation": plan.isolation}
        with Stage(directory, plan.backend, plan.proctrack, **shape).up() as stage:
            while (seed := _next(turn)) in plan.seeds and time.monotonic() < plan.until:
                far.send(plan.trial(stage, seed))
    except Broken as error:
        far.send(str(error))
    except KeyboardInterrupt:
        return


def _next(turn: Any) -> int:
    with turn.get_lock():
        seed: int = turn.value
        turn.value += 1
    return seed


def leave(*_: object) -> None:
    """Have the stage cleared, once: `timeout` sends its signal twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
