"""The table by fault: of one call on the terminal, of several calls in one page of the documentation."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.faults import BOTH, REGISTRY, TRACKERS
from chaos.trial import Result

BEGIN, END = "<!-- begin: scripts/chaos --table -->", "<!-- end -->"
HEADINGS = ("fault", "backend", "proctrack", "trials", "survivors", "innocents hit", "by `clean`", "median", "worst")
PAIRS = "pairs: "

INTRO = """# Faults

What was done to runs, and what was left of them. This page is made by `scripts/chaos --table docs/faults.md`, one call
for each backend and process tracker of Slurm; `scripts/chaos --list` names the faults.

Each trial makes a random run of one to three nodes, some of whose workers are awkward (they ignore SIGTERM, are
stopped, daemonize, scrub their environment, close every descriptor, start fifty processes a second), strikes at a
random moment (while it starts, during a fork, when it is ready, during a cancel), and lets it come to its end; a run
that the fault does not end is cancelled. Then it looks at the machine with eyes of its own: each process of a trial
maps a file that slurmfork knows nothing of, and announces itself. Beside it live a second run of the same user and
processes that look like a run's; one of them gone or stopped is an innocent hit.

- *survivors*: processes of the run that were left when all was over, `slurmfork clean` included where it was needed.
- *by `clean`*: trials in which something was left until `slurmfork clean RUN` ended it. That is for faults against
  which nothing on the node can help by itself, as guardian and agent killed in one moment where Slurm has no cgroup.
- *median*, *worst*: seconds from the fault, or from the cancel that followed it, until none of the workers' processes
  was left; grace times of 0.2 to 1.5 s are in it.
- *proctrack*: how Slurm knows a job's processes; `-` on the local backend.
"""


@dataclass
class Row:
    """One fault on one backend."""

    fault: str
    backend: str
    proctrack: str
    trials: int
    survivors: int
    innocents: int
    cleaned: int
    median: str
    worst: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.fault, self.backend, self.proctrack

    def cells(self) -> list[str]:
        return [str(value) for value in vars(self).values()]


def rows(results: Iterable[Result], backend: str, proctrack: str) -> list[Row]:
    """A row for each fault; pairs are told by their first."""
    by_fault: dict[str, list[Result]] = {}
    for one in results:
        first, _, second = one.fault.partition(" + ")
        by_fault.setdefault(f"{PAIRS}{first}" if second else first, []).append(one)
    return [_row(name, found, backend, proctrack) for name, found in by_fault.items()]


def _row(name: str, found: Sequence[Result], backend: str, proctrack: str) -> Row:
    seconds = [one.seconds for one in found if one.seconds is not None]
    return Row(
        fault=name,
        backend=backend,
        proctrack=proctrack,
        trials=len(found),
        survivors=sum(len(one.survivors) for one in found),
        innocents=sum(len(one.innocents) for one in found),
        cleaned=sum(bool(one.cleaned) for one in found),
        median=f"{statistics.median(seconds):.2f}" if seconds else "-",
        worst=f"{max(seconds):.2f}" if seconds else "-",
    )


def shown(table: Sequence[Row]) -> str:
    """For a terminal."""
    lines = [list(HEADINGS), *(row.cells() for row in table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def merge(page: Path, new: Sequence[Row]) -> None:
    """Lay these rows over those of the page, which is made if it is not there."""
    table = {row.key: row for row in _read(page)}
    table.update({row.key: row for row in new})
    faults = [*REGISTRY, *(f"{PAIRS}{name}" for name in REGISTRY)]
    backends, trackers = list(BOTH), ["-", *TRACKERS]

    def order(row: Row) -> tuple[int, int, int]:
        at = faults.index(row.fault) if row.fault in faults else len(faults)
        return at, backends.index(row.backend), trackers.index(row.proctrack)

    lines = [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
    lines += [_line(row.cells()) for row in sorted(table.values(), key=order)]
    about = [f"- `{one.name}`: {one.about}" for one in REGISTRY.values() if any(one.name in key[0] for key in table)]
    parts = [INTRO, BEGIN, "\n".join(lines), "", _totals(list(table.values())), END, "## The faults\n", *about]
    page.write_text("\n".join(parts) + "\n")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _totals(table: list[Row]) -> str:
    lines = []
    for backend in BOTH:
        those = [row for row in table if row.backend == backend]
        if those:
            trials, left = sum(row.trials for row in those), sum(row.survivors for row in those)
            lines.append(f"- {summary(trials, backend, left, sum(row.innocents for row in those))}")
    return "\n".join(lines)


def summary(trials: int, place: str, survivors: int, innocents: int) -> str:
    left = f"{survivors} processes left" if survivors else "nothing left"
    hit = f"{innocents} innocents hit" if innocents else "nobody hit"
    return f"{trials} {'trial' if trials == 1 else 'trials'} on {place}: {left}, {hit}"


def _read(page: Path) -> list[Row]:
    if not page.exists():
        return []
    body = page.read_text().partition(BEGIN)[2].partition(END)[0]
    found = []
    for line in body.splitlines():
        cells = re.findall(r"[^|]+", line)
        cells = [cell.strip() for cell in cells]
        if len(cells) == len(HEADINGS) and cells[3].isdigit():
            numbers = map(int, cells[3:7])
            found.append(Row(cells[0], cells[1], cells[2], *numbers, cells[7], cells[8]))
    return found
