"""How trials went: one trial's result, and batches of them, kept in files from which the table is made."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from slurmfork.version import __version__

TREE = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """One trial. ``left``: what was there when all was over; ``survivors``: what `slurmfork clean` left of it.

    ``due``: the fault is one against which no ring can hold, so that clean was due: only what it left is counted. In a
    namespace it never is.
    ``missed``: whom the fault was for was gone before it struck. ``engines``: the run hosted some, and was called.
    """

    seed: int
    fault: str
    moment: str = ""
    what: str = ""
    seconds: float | None = None
    due: bool = False
    missed: bool = False
    engines: bool = False
    left: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    innocents: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def counted(self) -> list[str]:
        """Processes that should not have been left."""
        return self.survivors if self.due else self.left

    @property
    def ok(self) -> bool:
        return not (self.counted or self.innocents or self.failures)


@dataclass
class Batch:
    """The trials of one call. ``how``: of which code, by which options, on what machine."""

    backend: str
    proctrack: str
    how: dict[str, str]
    results: list[Result] = field(default_factory=list)
    isolation: str = "none"

    @property
    def place(self) -> str:
        words = self.backend + (f" with proctrack/{self.proctrack}" if self.backend == "slurm" else "")
        return words + (f", isolation {self.isolation}" if self.isolation != "none" else "")


def circumstances(backend: str, options: str) -> dict[str, str]:
    """What whoever reads the results has to know of how they were made."""
    return {
        "version": __version__,
        "commit": _said("git", "-C", str(TREE), "rev-parse", "--short=12", "HEAD")
        + (" with changes" if _said("git", "-C", str(TREE), "status", "--porcelain", "-uno") else ""),
        "options": options,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "slurm": _said("sinfo", "--version") if backend == "slurm" else "",
        "began": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _said(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    except OSError:
        return ""


def save(path: Path, batches: list[Batch]) -> None:
    """Write the file whole: whoever is interrupted keeps what it had."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps({"batches": [asdict(one) for one in batches]}, indent=1) + "\n")
    new.replace(path)


def load(path: Path) -> list[Batch]:
    """The batches of a file; raises ValueError where it is not one of ours."""
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())["batches"]
        return [Batch(**{**one, "results": [Result(**result) for result in one["results"]]}) for one in found]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no results of {Path(sys.argv[0]).name}: {error}") from None
