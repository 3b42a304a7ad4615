"""The cells of the matrix: which there are, what became of each, and the files that this is kept in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from beds.scenarios import REGISTRY

TREE = Path(__file__).resolve().parents[2]
PLAIN = ""  # no particular site


@dataclass(frozen=True)
class Place:
    """A bed: a release, how it knows a job's processes, what its nodes are, and how the site has it."""

    release: str
    tracker: str
    kernels: bool
    site: str = PLAIN
    user: str = ""

    @property
    def title(self) -> str:
        version = "" if self.tracker != "cgroup" else " v2" if self.kernels else " v1"
        return f"{self.release} {self.tracker}{version}{', kernels' if self.kernels else ''}"


@dataclass
class Cell:
    """One scenario on one bed. ``verdict``: ok (``detail`` may say what was measured), failed, or none (it cannot
    be had, or was not run, and ``detail`` says why)."""

    release: str
    tracker: str
    kernels: bool
    site: str
    scenario: str
    verdict: str
    detail: str = ""
    seconds: float = 0.0
    how: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, bool, str, str]:
        return self.release, self.tracker, self.kernels, self.site, self.scenario


# The places of the matrix without a particular site, and those of each site.
PLACES = [
    Place("22.05", "linuxproc", False),
    Place("22.05", "pgid", False),
    Place("22.05", "cgroup", False),
    Place("24.11", "linuxproc", False),
    Place("24.11", "cgroup", True),
    Place("26.05", "linuxproc", False),
    Place("26.05", "cgroup", True),
]
SITED = [
    *(
        Place("22.05", "linuxproc", False, site)
        for site in (
            "export-none",
            "noisy",
            "short-memory",
            "preempt",
            "interactive",
            "autobind",
            "rate-limit",
            "old-commands",
        )
    ),
    *(Place("24.11", "cgroup", True, site) for site in ("tmpfs", "rate-limit", "adopt", "export-none")),
    *(Place("26.05", "cgroup", True, site) for site in ("tmpfs", "rate-limit")),
    Place("24.11", "linuxproc", False, "private-data", "nobody"),
    Place("24.11", "linuxproc", False, "pmix"),  # its root has the library that Slurm's plugin is made for
]
SITE_SCENARIOS = ("cancel", "fork", "scancel", "end-0", "end-3")
EVERY = ("cancel", "fork", "scancel", "time-limit", "requeue", "preempt", "restart", "end-0", "end-3")


def scenarios_of(place: Place) -> list[str]:
    """What is tried there: at a particular site, what sites make a difference to."""
    if place.site:
        return list(SITE_SCENARIOS)
    return [name for name, one in REGISTRY.items() if place.kernels or not one.kernels]


def circumstances() -> dict[str, str]:
    """What whoever reads a result has to know of how it was made."""
    commit = _said("git", "-C", str(TREE), "rev-parse", "--short=12", "HEAD")
    changed = " with changes" if _said("git", "-C", str(TREE), "status", "--porcelain", "-uno") else ""
    return {
        "commit": commit + changed,
        "kernel": f"{platform.system()} {platform.release()}",
        "cpus": str(len(os.sched_getaffinity(0))),
        "began": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _said(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    except OSError:
        return ""


def save(path: Path, cells: Iterable[Cell]) -> None:
    """Write the file whole: whoever is interrupted keeps what it had."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps({"cells": [asdict(one) for one in cells]}, indent=1) + "\n")
    new.replace(path)


def load(path: Path) -> list[Cell]:
    """The cells of a file; raises ValueError where it is not one of ours."""
    try:
        return [Cell(**one) for one in json.loads(path.read_text())["cells"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no results of matrix: {error}") from None


def newest(cells: Iterable[Cell]) -> dict[tuple[str, str, bool, str, str], Cell]:
    """The last word on each cell."""
    return {one.key: one for one in sorted(cells, key=lambda one: one.how.get("began", ""))}
