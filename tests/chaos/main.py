"""The command line of fault injection: chooses faults by seed, runs trials, prints each, the table, and the verdict."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from chaos import batch, faults_kinds, faults_ray, faults_slurm, faults_steps, faults_storage, faults_time, table
from chaos.batch import Plan
from chaos.faults import BACKENDS, REGISTRY, TRACKERS, Fault
from chaos.result import Batch, Result, circumstances, load, save
from chaos.stage import Broken

# Importing them fills the registry.
ROOMS = (faults_kinds, faults_ray, faults_slurm, faults_steps, faults_storage, faults_time)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="chaos",
        description="Random faults at random moments against random runs on a real backend. Proves that nothing is "
        "left behind and nobody else is touched, or says with which seeds it was not so.",
    )
    add = top.add_argument
    add("--trials", type=int, default=20, metavar="N", help="how many (default: %(default)s)")
    add("--seed", type=int, default=1, metavar="S", help="of the first trial; each next has the next (default: 1)")
    add("--backend", choices=BACKENDS, default="local")
    add("--proctrack", choices=TRACKERS, default=TRACKERS[0], help="how Slurm knows a job's processes")
    add("--isolation", choices=("none", "namespace"), default="none", help="of the runs (default: none)")
    add("--fault", nargs="+", action="extend", metavar="NAME", help="only these; --list names them")
    add("--pairs", action="store_true", help="two faults a trial, of those that --list marks")
    add("--engines", action="store_true", help="runs that host engines alone; else some of them do")
    add("--jobs", type=int, default=1, metavar="N", help="trials side by side, each job with a cluster of its own")
    add("--results", type=Path, metavar="FILE", help="add what was found to this file, after each trial")
    add("--table", type=Path, metavar="FILE", help="write the page docs/faults.md, of this batch or of those of --from")
    add("--from", type=Path, nargs="+", dest="sources", metavar="FILE", help="run nothing: results of earlier batches")
    add("--minutes", type=float, metavar="M", help="begin no further trial after so long")
    add("--keep", action="store_true", help="keep the directories of trials that went well, too")
    add("--list", action="store_true", help="say what faults there are")
    return top


def show_list() -> None:
    for one in REGISTRY.values():
        marks = (
            ["pairs"] * one.core + ["only by name"] * one.named + [", ".join(one.backends)] * (one.backends != BACKENDS)
        )
        marks += ["only with --isolation namespace"] * one.isolated
        if lacks := one.lacks():
            marks.append(f"not here: {lacks}")
        print(f"{one.name:<24} {one.about}" + (f"  ({', '.join(marks)})" if marks else ""))


def chosen(asked: argparse.Namespace) -> list[list[Fault]]:
    """What a trial may be of: faults that apply, or ordered pairs of them. The seed says which."""
    unknown = [name for name in asked.fault or [] if name not in REGISTRY]
    if unknown:
        raise Broken(f"no such fault: {', '.join(unknown)}; --list names them")
    apply = [one for one in REGISTRY.values() if asked.backend in one.backends]
    apply = [one for one in apply if asked.isolation == "namespace" or not one.isolated]
    if asked.fault:
        apply = [one for one in apply if one.name in asked.fault]
        if lacking := [f"{one.name}: {one.lacks()}" for one in apply if one.lacks()]:
            raise Broken("; ".join(lacking))
    else:
        apply = [one for one in apply if not one.named and not one.lacks()]
    if asked.pairs:
        core = [one for one in apply if one.core]
        found = [[one, other] for one in core for other in core if one is not other]
    else:
        found = [[one] for one in apply]
    if not found:
        raise Broken("none of these faults applies to this backend")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if anything was left, anybody hit, or anything else did not hold."""
    asked = parser().parse_args(arguments)
    if asked.list:
        show_list()
        return 0
    try:
        batches = read(asked.sources) if asked.sources else [perform(asked)]
    except (Broken, ValueError, OSError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    batches, at_first = table.again(batches)
    print(f"\n{table.shown(table.rows(batches))}\n")
    if asked.table:
        try:
            asked.table.write_text(table.page(batches, at_first))
        except ValueError as error:
            print(f"chaos: {error}", file=sys.stderr)
            return 2
    return conclude(batches)


def read(sources: Sequence[Path]) -> list[Batch]:
    return [one for path in dict.fromkeys(path.resolve() for path in sources) for one in load(path)]


def perform(asked: argparse.Namespace) -> Batch:
    """Run the trials, and tell and keep each as it comes."""
    signal.signal(signal.SIGTERM, batch.leave)
    choice = chosen(asked)
    earlier = load(asked.results) if asked.results and asked.results.exists() else []
    proctrack = asked.proctrack if asked.backend == "slurm" else "-"
    found = Batch(asked.backend, proctrack, circumstances(asked.backend, options(asked)), isolation=asked.isolation)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    plan = Plan(
        backend=asked.backend,
        proctrack=asked.proctrack,
        isolation=asked.isolation,
        choice=choice,
        seeds=range(asked.seed, asked.seed + asked.trials),
        directory=directory,
        until=time.monotonic() + 60 * asked.minutes if asked.minutes else float("inf"),
        keep=asked.keep,
        engines=asked.engines,
    )
    try:
        for result in batch.run(plan, asked.jobs):
            show(result, plan.trial_directory(result.seed))
            found.results.append(result)
            if asked.results:
                save(asked.results, [*earlier, found])
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        if not any(directory.glob("trial-*")):
            shutil.rmtree(directory, ignore_errors=True)
    if left_out := asked.trials - len(found.results):
        print(f"{left_out} trials are left out")
    return found


def options(asked: argparse.Namespace) -> str:
    """Those that say what the trials were, as they may be given again."""
    words = [f"--trials {asked.trials} --seed {asked.seed}"]
    words += [f"--isolation {asked.isolation}"] * (asked.isolation != "none")
    words += [f"--fault {' '.join(asked.fault or ())}"] * bool(asked.fault) + ["--pairs"] * asked.pairs
    words += ["--engines"] * asked.engines
    return " ".join([*words, f"--jobs {asked.jobs}"])


def show(one: Result, directory: Path) -> None:
    took = "" if one.seconds is None else f"none left after {one.seconds:.2f} s"
    verdict = "ok" if one.ok else "FAILED"
    print(f"seed {one.seed:<6} {one.fault:<24} {one.moment:<9} {took:<26} {verdict}", flush=True)
    parts = [("left", one.counted), ("hit", one.innocents), ("failed", one.failures), ("note", one.notes)]
    for word, lines in [*parts, ("before clean", one.left if one.due else [])]:
        for line in lines[:8]:
            print(f"    {word}: {line}")
        if len(lines) > 8:
            print(f"    {word}: and {len(lines) - 8} more")
    if not one.ok:
        print(f"    of {one.what}; kept in {directory}", flush=True)


def conclude(batches: Sequence[Batch]) -> int:
    """Print the verdict on each place."""
    lines, failed = table.verdicts(batches)
    print("\n".join(lines) if lines else "no trials")
    return 1 if failed else 0
