"""One scenario on a bed that is up: strangers beside it, a verdict at its end, and the bed mended for the next."""

from __future__ import annotations

import itertools
import os
import subprocess
import time

from beds import on_kernels
from beds.bed import FOREVER, Bed, Broken
from beds.cells import Cell, Place, circumstances
from beds.scenarios import Scenario

_marks = itertools.count(FOREVER + 1000 * (os.getpid() % 8000), 2)


def try_out(bed: Bed, place: Place, scenario: Scenario) -> Cell:
    """What became of it. A failure of the bed itself is told as one."""
    mark = next(_marks)
    cell = Cell(place.release, place.tracker, place.kernels, place.site, scenario.name, "ok", how=circumstances())
    began = time.monotonic()
    bed.measured.clear()
    try:
        for node in bed.nodes if bed.kernels else bed.nodes[:1]:
            bed.stranger(mark + 1, node)
        scenario.act(bed, mark)
    except (AssertionError, Broken, subprocess.TimeoutExpired) as error:
        cell.verdict, cell.detail = "failed", str(error)
    cell.seconds = round(time.monotonic() - began, 1)
    try:
        _after(bed, cell, mark, scenario)
    except (AssertionError, Broken, subprocess.TimeoutExpired) as error:
        cell.verdict = "failed"
        cell.detail = cell.detail or f"afterwards: {error}"
    if cell.verdict == "ok":
        cell.detail = "; ".join(bed.measured)
    return cell


def _after(bed: Bed, cell: Cell, mark: int, scenario: Scenario) -> None:
    """Nothing is left and no stranger is hurt; then the bed is as it was."""
    if cell.verdict == "failed" or scenario.kernels:
        if bed.kernels:
            on_kernels.mend(bed)
        bed.end()
    left = bed.everywhere(mark)
    if left and cell.verdict == "ok":
        cell.verdict, cell.detail = "failed", f"left running: {left}"
    without_power = {"power-cut", "power-cut-in-fork"} & {scenario.name}
    nodes = [node for node in (bed.nodes if bed.kernels else bed.nodes[:1]) if not (without_power and node == "n2")]
    alive = bed.everywhere(mark + 1)
    if hurt := [node for node in nodes if node not in alive]:
        cell.verdict, cell.detail = "failed", f"strangers hit on {', '.join(hurt)}; {cell.detail}"
    bed.forget(mark)
    bed.forget(mark + 1)
    bed.runs.clear()
    bed.until(lambda: not bed.slurm("squeue", "-h", check=False).strip(), "the queue to be empty")
