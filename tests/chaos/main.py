"""The command line of fault injection: chooses faults by seed, runs trials, prints each, the table, and the verdict."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from chaos import faults_kinds, faults_slurm, faults_steps, faults_storage, table
from chaos.faults import BOTH, REGISTRY, TRACKERS, Fault
from chaos.stage import Broken, Stage
from chaos.trial import Result, Trial

ROOMS = (faults_kinds, faults_slurm, faults_steps, faults_storage)  # importing them fills the registry


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="chaos",
        description="Random faults at random moments against random runs on a real backend. Proves that nothing is "
        "left behind and nobody else is touched, or says with which seeds it was not so.",
    )
    add = top.add_argument
    add("--trials", type=int, default=20, metavar="N", help="how many (default: %(default)s)")
    add("--seed", type=int, default=1, metavar="S", help="of the first trial; each next has the next (default: 1)")
    add("--backend", choices=BOTH, default="local")
    add("--proctrack", choices=TRACKERS, default=TRACKERS[0], help="how Slurm knows a job's processes")
    add("--fault", nargs="+", action="extend", metavar="NAME", help="only these; --list names them")
    add("--pairs", action="store_true", help="two faults a trial, of those that --list marks")
    add("--table", type=Path, metavar="FILE", help="merge the rows into this page, as docs/faults.md")
    add("--json", type=Path, metavar="FILE", help="all that was found out, for programs")
    add("--minutes", type=float, metavar="M", help="begin no further trial after so long")
    add("--keep", action="store_true", help="keep the directories of trials that went well, too")
    add("--list", action="store_true", help="say what faults there are")
    return top


def show_list() -> None:
    for one in REGISTRY.values():
        marks = ["pairs"] * one.core + ["only by name"] * one.named + [one.backends[0]] * (len(one.backends) == 1)
        print(f"{one.name:<24} {one.about}" + (f"  ({', '.join(marks)})" if marks else ""))


def chosen(asked: argparse.Namespace) -> list[list[Fault]]:
    """What a trial may be of: faults that apply, or ordered pairs of them. The seed says which."""
    unknown = [name for name in asked.fault or [] if name not in REGISTRY]
    if unknown:
        raise Broken(f"no such fault: {', '.join(unknown)}; --list names them")
    apply = [one for one in REGISTRY.values() if asked.backend in one.backends]
    if asked.fault:
        apply = [one for one in apply if one.name in asked.fault]
    else:
        apply = [one for one in apply if not one.named]
    if not asked.pairs:
        return [[one] for one in apply]
    core = [one for one in apply if one.core]
    return [[one, other] for one in core for other in core if one is not other]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if anything was left, anybody hit, or anything else did not hold."""
    asked = parser().parse_args(arguments)
    if asked.list:
        show_list()
        return 0
    signal.signal(signal.SIGTERM, _leave)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        choice = chosen(asked)
        if not choice:
            raise Broken("none of these faults applies to this backend")
        proctrack = asked.proctrack if asked.backend == "slurm" else "-"
        with Stage(directory, asked.backend, asked.proctrack).up() as stage:
            results = trials(asked, stage, choice)
    except Broken as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    finally:
        if not any(directory.glob("trial-*")):
            shutil.rmtree(directory, ignore_errors=True)
    return conclude(asked, results, proctrack)


def _leave(*_: object) -> None:
    """Clear the stage, once: `timeout` sends its signal twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def trials(asked: argparse.Namespace, stage: Stage, choice: list[list[Fault]]) -> list[Result]:
    results: list[Result] = []
    end = time.monotonic() + 60 * asked.minutes if asked.minutes else float("inf")
    for seed in range(asked.seed, asked.seed + asked.trials):
        if time.monotonic() > end:
            print(f"{asked.minutes:g} minutes are over: {asked.trials - len(results)} trials are left out")
            break
        directory = stage.directory / f"trial-{seed}"
        trial = Trial(stage, directory, seed, choice[seed % len(choice)])
        try:
            result = trial.run()
        except KeyboardInterrupt:
            print(f"interrupted in seed {seed}")
            trial.tidy()
            break
        except Exception:
            result = trial.result
            result.failures.append(f"fault in the checker: {traceback.format_exc()}")
        show(result, directory)
        results.append(result)
        if result.ok and not asked.keep:
            shutil.rmtree(directory, ignore_errors=True)
    return results


def show(one: Result, directory: Path) -> None:
    took = "" if one.seconds is None else f"none left after {one.seconds:.2f} s"
    verdict = "ok" if one.ok else "FAILED"
    print(f"seed {one.seed:<6} {one.fault:<24} {one.moment:<9} {took:<26} {verdict}", flush=True)
    parts = [("left", one.survivors), ("hit", one.innocents), ("failed", one.failures), ("note", one.notes)]
    for word, lines in [*parts, ("before clean", one.cleaned)]:
        for line in lines[:8]:
            print(f"    {word}: {line}")
        if len(lines) > 8:
            print(f"    {word}: and {len(lines) - 8} more")
    if not one.ok:
        print(f"    of {one.what}; kept in {directory}", flush=True)


def conclude(asked: argparse.Namespace, results: list[Result], proctrack: str) -> int:
    found = table.rows(results, asked.backend, proctrack)
    print(f"\n{table.shown(found)}\n")
    if asked.table:
        table.merge(asked.table, found)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    place = asked.backend + (f" with proctrack/{proctrack}" if asked.backend == "slurm" else "")
    left, hit = (sum(len(getattr(one, part)) for one in results) for part in ("survivors", "innocents"))
    words = table.summary(len(results), place, left, hit)
    failed = [one for one in results if not one.ok]
    if failed:
        print(f"{words}; failed: {' '.join(f'{one.seed} ({one.fault})' for one in failed)}")
        return 1
    print(words)
    return 0
