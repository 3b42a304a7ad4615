"""The command line of the matrix: brings up each bed that is asked for, tries the scenarios there, makes the page."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from beds import on_kernels, page
from beds.bed import SCRIPT, Bed, outside
from beds.cells import PLACES, SITED, Cell, Place, circumstances, load, save, scenarios_of
from beds.scenarios import REGISTRY
from beds.trial import try_out

ROOMS = (on_kernels,)  # importing it fills the registry
NODES, GPUS, CPUS = 2, 2, 4
REFUSED = 4  # minicluster: this site cannot be had there


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="matrix", description=__doc__)
    add = top.add_argument
    places = [*PLACES, *SITED]
    add("--release", nargs="+", metavar="R", choices=sorted({one.release for one in places}), help="only these")
    add("--tracker", nargs="+", metavar="T", choices=sorted({one.tracker for one in places}), help="only these")
    add("--site", nargs="+", metavar="S", help="only beds of these sites; `plain`: of none, `any`: of each")
    add("--scenario", nargs="+", metavar="NAME", help="only these; --list names them")
    add("--kernels", action="store_true", help="only beds whose nodes are kernels of their own")
    add("--no-kernels", action="store_true", help="only beds whose nodes are this machine")
    add("--minutes", type=float, metavar="M", help="begin no further cell after so long")
    add("--results", type=Path, metavar="FILE", help="add what was found to this file, after each cell")
    add(
        "--table", type=Path, metavar="FILE", help="write the page docs/matrix.md, of these cells or of those of --from"
    )
    add("--from", type=Path, nargs="+", dest="sources", metavar="FILE", help="run nothing: results of earlier calls")
    add("--list", action="store_true", help="say what beds and scenarios there are")
    return top


def chosen(asked: argparse.Namespace) -> list[tuple[Place, list[str]]]:
    """Beds, each with what is to be tried there."""
    found = []
    for place in [*PLACES, *SITED]:
        sites = asked.site or ["plain"]
        wanted = (place.site or "plain") in sites or (bool(place.site) and "any" in sites)
        wanted = wanted and (not asked.release or place.release in asked.release)
        wanted = wanted and (not asked.tracker or place.tracker in asked.tracker)
        wanted = wanted and not (asked.kernels and not place.kernels) and not (asked.no_kernels and place.kernels)
        names = [name for name in scenarios_of(place) if not asked.scenario or name in asked.scenario]
        if wanted and names:
            found.append((place, names))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a cell failed."""
    asked = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the bed goes down
    if asked.list:
        for place in [*PLACES, *SITED]:
            print(f"{place.title}{f', site {place.site}' if place.site else ''}")
        for scenario in REGISTRY.values():
            print(f"{scenario.name:<20} {scenario.about}{' (kernels)' if scenario.kernels else ''}")
        return 0
    if unknown := [name for name in asked.scenario or [] if name not in REGISTRY]:
        print(f"matrix: no such scenario: {', '.join(unknown)}; --list names them", file=sys.stderr)
        return 2
    try:
        cells = [one for path in asked.sources for one in load(path)] if asked.sources else perform(asked)
    except (ValueError, OSError) as error:
        print(f"matrix: {error}", file=sys.stderr)
        return 2
    if asked.table:
        asked.table.write_text(page.page(cells))
    failed = [one for one in cells if one.verdict == "failed"]
    print(f"{len(cells)} cells, {len(failed)} failed")
    return 1 if failed else 0


def perform(asked: argparse.Namespace) -> list[Cell]:
    earlier = load(asked.results) if asked.results and asked.results.exists() else []
    found: list[Cell] = []
    until = time.monotonic() + 60 * asked.minutes if asked.minutes else float("inf")
    for place, names in chosen(asked):
        if time.monotonic() > until:
            break
        for cell in on(place, names, until):
            found.append(cell)
            print(
                f"{place.title:<24} {place.site:<12} {cell.scenario:<18} {cell.verdict} {cell.seconds:.0f} s",
                flush=True,
            )
            if cell.verdict != "ok":
                print(f"    {cell.detail[:1500]}", flush=True)
            if asked.results:
                save(asked.results, [*earlier, *found])
    return found


def on(place: Place, names: Sequence[str], until: float) -> Iterator[Cell]:
    """The cells of one bed, which is there meanwhile."""
    name = f"matrix-{os.getpid()}"
    done = minicluster("up", name, *options(place))
    if done.returncode:
        verdict = "none" if done.returncode in (3, REFUSED) else "failed"
        reason = (done.stderr.strip().splitlines() or ["?"])[-1].removeprefix("minicluster: ")
        for each in names:
            yield Cell(
                place.release, place.tracker, place.kernels, place.site, each, verdict, reason, how=circumstances()
            )
        return
    try:
        bed = Bed(name, place.user)
        for each in names:
            if time.monotonic() > until:
                return
            yield try_out(bed, place, REGISTRY[each])
    finally:
        minicluster("down", name)


def options(place: Place) -> list[str]:
    words = ["--slurm", place.release, "--proctrack", place.tracker, "--nodes", str(NODES), "--gpus", str(GPUS)]
    words += ["--cpus", str(CPUS), *(["--kernels"] if place.kernels else [])]
    return [*words, *(["--site", place.site] if place.site else [])]


def minicluster(verb: str, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(SCRIPT), verb, "--name", name, *words]
    return subprocess.run(argv, env=outside(), capture_output=True, text=True, timeout=1800, check=False)
