"""The weight of code: what is too much is refused before anything is read, and the largest directories are named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from slurmfork.code.manifest import Entry
from slurmfork.errors import UsageError
from slurmfork.spec.sizes import in_words, size_of

MOST_FILES = 100_000
SHOWN = 3
_MOST = 0.9  # of a directory: then what is in it is named in its place


def refuse_too_much(directory: Path, entries: Sequence[Entry], limit: str) -> None:
    """Raise UsageError for more than ``limit`` (as 1G), or for more files than anybody wants to wait for."""
    size = sum(entry.size for entry in entries)
    if size > size_of(limit):
        weights = {entry.path: entry.size for entry in entries}
        said = f"{in_words(size)} in {len(entries):,} files, more than its limit of {limit}"
        words = [f"{path} ({in_words(part)})" for path, part in heaviest(weights)]
    elif len(entries) > MOST_FILES:
        weights = {entry.path: 1 for entry in entries}
        said = f"{len(entries):,} files, more than {MOST_FILES:,}"
        words = [f"{path} ({part:,} files)" for path, part in heaviest(weights)]
    else:
        return
    mend = "leave out what is no code with `exclude` or .gitignore"
    raise UsageError(f"code: {directory} has {said}; most of it is {', '.join(words)}; {mend}, or raise `limit`")


def heaviest(weights: dict[str, int]) -> list[tuple[str, int]]:
    """The heaviest directories and files, at the level at which they part: ``data/``, not all that is in it."""
    totals: defaultdict[str, int] = defaultdict(int)
    children: defaultdict[str, set[str]] = defaultdict(set)
    for path, weight in weights.items():
        here = path
        totals[here] += weight
        while here:
            above = here[: here.rstrip("/").rfind("/") + 1]
            totals[above] += weight
            children[above].add(here)
            here = above
    top = sorted(children[""], key=lambda one: (-totals[one], one))[:SHOWN]
    return [(place, totals[place]) for place in (_narrowed(one, totals, children) for one in top)]


def _narrowed(place: str, totals: dict[str, int], children: dict[str, set[str]]) -> str:
    while inner := [one for one in children.get(place, ()) if totals[one] >= _MOST * totals[place]]:
        if not inner[0].endswith("/"):
            break
        place = inner[0]
    return place
