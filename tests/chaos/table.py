"""The table by fault: on the terminal, and as a page of the documentation, from the results of any batches."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from chaos.faults import BACKENDS, REGISTRY, TRACKERS
from chaos.result import Batch, Result

HEADINGS = (
    "fault",
    "backend",
    "proctrack",
    "trials",
    "before clean",
    "after clean",
    "innocents hit",
    "median",
    "worst",
)
PAIRS, ENGINES = "pairs: ", "engines: "
MISSED = "came too late"

INTRO = """# Faults

What was done to runs, and what was left of them. This page is made by a script, from the results of batches of trials:

    scripts/chaos --backend slurm --proctrack cgroup --trials 170 --jobs 3 --results cgroup.json
    scripts/chaos --table docs/faults.md --from cgroup.json ...

Each trial makes a random run of one to three nodes, some of whose workers are awkward (they ignore SIGTERM, are
stopped, daemonize, scrub their environment, close every descriptor, start fifty processes a second), strikes at a
random moment (while it starts, during a fork, when it is ready, during a cancel), and lets it come to its end; a run
that the fault does not end is cancelled. Then it looks at the machine with eyes of its own: each process of a trial
maps a file that slurmfork knows nothing of, and announces itself. Beside it live a second run of the same user and
processes that look like a run's; one of them gone or stopped is an innocent hit, and so is a part of Ray, where the run
is on that. A trial also holds the run's status and journal to what was really there. Everything is real: processes,
Slurm, Ray, file systems; all nodes are on one machine.

- *before clean*: processes of the run that were left when all was over, and nobody had cleaned up after it.
- *after clean*: those of them that `slurmfork clean RUN` left, too.
- *median*, *worst*: seconds from the fault, or from the cancel that followed it, until none of the workers' processes
  was left; grace times of 0.2 to 1.5 s are in it.
- *proctrack*: how Slurm knows a job's processes; `-` on the other backends.
- *engines*: the run's first role, and mostly what is forked beside it, hosts [engines](engines.md); a controller calls
  them all the while, and must have an answer or an error to every call when the run is over. Some leave daemons, some
  never come to the end of their `close`.
- *pairs*: the fault, and up to a second later another one.
- *came too late*: whom the fault was for had ended before it struck.
"""

LIMITS = """## Where nothing can be promised without `clean`

Guardian and agent of a node killed in the same instant leave nobody there who watches. With proctrack/cgroup Slurm
itself then ends all that the job has. With proctrack/linuxproc and pgid, and on the other backends, it is the sweep at
the end of the run that finds what was left: by the journal, by the run's tag in a process's environment, and by what a
process still holds of the run. The kernel gives no other mark to go by, so there is no guarantee for a process that
was started in the last moment before both died, too late for the journal, and that has daemonized, has scrubbed its
environment, and has closed every descriptor: nothing that is left of it says whose it is. In such a cell *before clean*
may be more than 0; what counts there is *after clean*. Processes in this table that `clean` could not name either are
counted there, too, and none is left out.
"""

AT_FIRST = """The same trials with later code are among those above.
"""
ISOLATED = "namespace"
ISOLATED_INTRO = (
    INTRO.replace("# Faults\n", "# Faults, with `isolation: namespace`\n")
    .replace("scripts/chaos --backend", "scripts/chaos --isolation namespace --backend")
    .replace("docs/faults.md", "docs/faults-namespace.md")
    .replace(
        "Each trial makes",
        "The runs have a PID namespace on each node ([isolation](isolation.md)); [faults](faults.md) has those that\n"
        "do without. "
        "Each trial makes",
    )
)
ISOLATED_LIMITS = """## Nobody cleans up

In no trial of this page is `slurmfork clean` due, those in which guardian and agent of a node die in the same instant
included: all of *before clean* counts. A trial has also failed if a worker announced itself from outside of a
namespace.
"""


@dataclass
class Row:
    """One fault in one place. ``counted``: processes that should not have been left."""

    fault: str
    backend: str
    proctrack: str
    trials: int
    before: int
    after: int
    innocents: int
    median: str
    worst: str

    def cells(self) -> list[str]:
        return [str(value) for value in vars(self).values()]


def rows(batches: Iterable[Batch]) -> list[Row]:
    """A row for each fault and place, in order; pairs are told by their first."""
    cells: dict[tuple[str, str, str], list[Result]] = {}
    for batch in batches:
        for one in batch.results:
            cells.setdefault((_name(one), batch.backend, batch.proctrack), []).append(one)
    return [_row(*key, cells[key]) for key in sorted(cells, key=_order)]


def _name(one: Result) -> str:
    first, _, second = one.fault.partition(" + ")
    if second:
        return f"{PAIRS}{first}"
    if one.missed:
        return MISSED
    return f"{ENGINES}{first}" if one.engines else first


def _order(key: tuple[str, str, str]) -> tuple[int, int, int]:
    faults = [prefix + name for prefix in ("", ENGINES, PAIRS) for name in REGISTRY]
    name, backend, proctrack = key
    at = faults.index(name) if name in faults else len(faults)
    return at, BACKENDS.index(backend), ["-", *TRACKERS].index(proctrack)


def _row(name: str, backend: str, proctrack: str, found: Sequence[Result]) -> Row:
    seconds = [one.seconds for one in found if one.seconds is not None]
    return Row(
        fault=name,
        backend=backend,
        proctrack=proctrack,
        trials=len(found),
        before=sum(len(one.left) for one in found),
        after=sum(len(one.survivors) for one in found),
        innocents=sum(len(one.innocents) for one in found),
        median=f"{statistics.median(seconds):.2f}" if seconds else "-",
        worst=f"{max(seconds):.2f}" if seconds else "-",
    )


def shown(table: Sequence[Row]) -> str:
    """For a terminal."""
    lines = [list(HEADINGS), *(row.cells() for row in table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def verdicts(batches: Sequence[Batch]) -> tuple[list[str], bool]:
    """A line for each place, and at the end one for each backend; whether anything did not hold."""
    places = dict.fromkeys(batch.place for batch in batches)
    lines = [_verdict(place, [one for one in batches if one.place == place]) for place in places]
    for backend in BACKENDS:
        those = [one for one in batches if one.backend == backend]
        if len({one.place for one in those}) > 1:
            lines.append(_verdict(backend, those))
    return lines, any(not one.ok for batch in batches for one in batch.results)


def _verdict(place: str, batches: Sequence[Batch]) -> str:
    results = [one for batch in batches for one in batch.results]
    trials = f"{len(results)} {'trial' if len(results) == 1 else 'trials'}"
    left, hit = sum(len(one.counted) for one in results), sum(len(one.innocents) for one in results)
    words = f"{trials} on {place}: {f'{left} processes' if left else 'nothing'} left, "
    words += f"{hit} innocents hit" if hit else "nobody hit"
    if cleaned := sum(bool(one.left) for one in results if one.due):
        words += f"; {cleaned} needed `slurmfork clean`"
    if failed := [f"{one.seed} ({one.fault})" for one in results if not one.ok]:
        words += f"; failed: {', '.join(failed)}"
    return words


# --- the page


def again(batches: Sequence[Batch]) -> tuple[list[Batch], list[str]]:
    """The batches without those failures whose trial was made again in a later batch, and held; and these in words."""
    kept, at_first = [], []
    for number, batch in enumerate(batches):
        held = {_trial(later, one) for later in batches[number + 1 :] for one in later.results if one.ok}
        mended = [one for one in batch.results if not one.ok and _trial(batch, one) in held]
        at_first += [f"{line} (commit {batch.how['commit']})" for line in _failures([replace(batch, results=mended)])]
        kept.append(replace(batch, results=[one for one in batch.results if one not in mended]))
    return kept, at_first


def _trial(batch: Batch, one: Result) -> tuple[str, int, str]:
    return batch.place, one.seed, one.fault


def page(batches: Sequence[Batch], at_first: Sequence[str] = ()) -> str:
    """All of docs/faults.md, or of its like for runs in namespaces; raises ValueError where both are among these.

    ``at_first``: what ``again`` tells.
    """
    isolated = {batch.isolation == ISOLATED for batch in batches}
    if len(isolated) > 1:
        raise ValueError("batches with and without namespaces do not go on one page")
    intro, limits = (ISOLATED_INTRO, ISOLATED_LIMITS) if isolated == {True} else (INTRO, LIMITS)
    found = rows(batches)
    names = {row.fault.removeprefix(PAIRS).removeprefix(ENGINES) for row in found}
    lines = [_line(HEADINGS), _line(["---"] * len(HEADINGS)), *(_line(row.cells()) for row in found)]
    about = [f"- `{one.name}`: {one.about}" for one in REGISTRY.values() if one.name in names]
    made = [f"- {_made(batch)}" for batch in batches]
    parts = [
        intro,
        *lines,
        "",
        limits,
        "## What did not hold\n",
        *(_failures(batches) or ["Nothing: every trial passed every check."]),
        *(["\n## What held only when it was tried again\n", AT_FIRST, *at_first] if at_first else []),
        "\n## The faults\n",
        *about,
        "\n## How this was made\n",
        *made,
        "\n## In all\n",
        *(f"- {line}" for line in verdicts(batches)[0]),
    ]
    return "\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _made(batch: Batch) -> str:
    how = batch.how
    machine = [how["kernel"], how["slurm"], f"Python {how['python']}", f"{how['cpus']} CPUs"]
    return (
        f"{batch.place}, `{how['options']}`: {len(batch.results)} trials of slurmfork {how['version']} "
        f"(commit {how['commit']}), begun {how['began']}; {', '.join(filter(None, machine))}"
    )


def _failures(batches: Sequence[Batch]) -> list[str]:
    lines = []
    for batch in batches:
        for one in batch.results:
            if not one.ok:
                words = [f"{len(one.counted)} processes left"] * bool(one.counted)
                words += [f"hit: {each}" for each in one.innocents] + one.failures
                lines.append(f"- {batch.place}, seed {one.seed}, {one.fault}: {_plain('; '.join(words))}")
    return lines


def _plain(text: str) -> str:
    """One short line, with no directory of the machine that it was seen on."""
    line = " ".join(re.sub(r"(?:/[\w.+-]+)+/", "", text).split())
    return line if len(line) <= 400 else f"{line[:400]} ..."
