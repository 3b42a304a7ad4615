"""docs/matrix.md, made of what was kept of the cells."""

from __future__ import annotations

import re
from collections.abc import Sequence

from beds.cells import PLACES, SITED, Cell, Place, newest, scenarios_of
from beds.scenarios import REGISTRY

INTRO = """# Which Slurm

What runs came to on which Slurm. This page is made by a script, from the results of runs that were kept:

    scripts/matrix --release 22.05 --results 22.05.json
    scripts/matrix --release 24.11 --kernels --results 24.11.json
    scripts/matrix --table docs/matrix.md --from 22.05.json 24.11.json ...

Each cell is a run on a Slurm of that release (Debian's packages: 22.05 of bookworm, 24.11 of trixie, 26.05 of sid)
with two compute nodes. Where it says *kernels*, login node and compute nodes are kernels of their own, by User-Mode
Linux, each with its own /proc, host name, clock and network link, and control groups of version 2; elsewhere all nodes
are on one machine. A run has two workers a node: one with a child, and one with a daemon that has scrubbed its
environment. A cell is *ok* if the run came to the right state and exit status, none of its processes was left on any
node that has power, as that node's own /proc has it, and a stranger's process on each node lived on. The number is the
seconds that it took, on a machine of two CPUs that had much else to do. A number in brackets stands for a reason below.
"""


NOT_RUN = "Not run yet: the machine had no more time for it."


class Notes:
    """Reasons, each told once and numbered."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.lines.setdefault(text, len(self.lines) + 1)


def page(cells: Sequence[Cell]) -> str:
    """The whole page."""
    found, notes = newest(cells), Notes()
    parts = [INTRO, "## Scenarios", "", *_scenarios(found, notes), "", "## Sites", "", *_sites(found, notes), ""]
    parts += ["## What is not ok, and why", ""]
    parts += [f"{number}. {line}" for line, number in notes.lines.items()] or ["Nothing."]
    told = [one for one in found.values() if one.verdict == "ok" and one.detail]
    measured = [f"- `{one.scenario}`, {one.release} {one.tracker}: {one.detail}" for one in told]
    parts += ["", "## Measured on the way", "", *measured] if measured else []
    parts += ["", "## What is done", "", *(f"- `{one.name}`: {one.about}" for one in REGISTRY.values()), ""]
    parts += ["## How this was made", "", *_made(list(found.values()))]
    return "\n".join(parts) + "\n"


def _scenarios(found: dict[tuple[str, str, bool, str, str], Cell], notes: Notes) -> list[str]:
    lines = [_line(["scenario", *(place.title for place in PLACES)]), _line(["---"] * (len(PLACES) + 1))]
    for name in REGISTRY:
        lines.append(_line([f"`{name}`", *(_cell(found, place, name, notes) for place in PLACES)]))
    return lines


def _sites(found: dict[tuple[str, str, bool, str, str], Cell], notes: Notes) -> list[str]:
    names = scenarios_of(SITED[0])
    lines = [_line(["site", "Slurm", *(f"`{name}`" for name in names)]), _line(["---"] * (len(names) + 2))]
    for place in sorted(SITED, key=lambda one: (one.site, one.release)):
        title = f"{place.title}{f', as {place.user}' if place.user else ''}"
        lines.append(_line([f"`{place.site}`", title, *(_cell(found, place, name, notes) for name in names)]))
    return lines


def _cell(found: dict[tuple[str, str, bool, str, str], Cell], place: Place, name: str, notes: Notes) -> str:
    if REGISTRY[name].kernels and not place.kernels:
        return "-"
    cell = found.get((place.release, place.tracker, place.kernels, place.site, name))
    if cell is None:
        return f"[{notes.number(NOT_RUN)}]"
    if cell.verdict == "ok":
        return f"ok {cell.seconds:.0f}"
    word = "failed " if cell.verdict == "failed" else ""
    return f"{word}[{notes.number(_plain(cell.detail))}]"


def _plain(text: str) -> str:
    """One short line, with no directory of the machine that it was seen on."""
    line = " ".join(re.sub(r"(?:/[\w.+-]+)+/", "", text).split())
    return line if len(line) <= 300 else f"{line[:300]} ..."


def _made(cells: Sequence[Cell]) -> list[str]:
    hows = sorted({(one.how["began"][:10], one.how["commit"], one.how["kernel"], one.how["cpus"]) for one in cells})
    return [
        f"- {day}: commit {commit}, {kernel}, {cpus} CPUs: "
        f"{sum((o.how['began'][:10], o.how['commit']) == (day, commit) for o in cells)} cells"
        for day, commit, kernel, cpus in hows
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
