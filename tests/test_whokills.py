"""The README's table of who kills what holds for slurmfork: each cell once, on real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import whokills
from cluster import Factory
from namespaced import may_make_namespaces
from running import Shell
from whokills import EVENTS, ISOLATIONS, Event

README = Path(__file__).resolve().parent.parent / "README.md"
HERE = [event for event in EVENTS if "local" in event.on]
THERE = [event for event in EVENTS if event.name in ("both", "stepd", "three", "cancel")]

pytestmark = pytest.mark.skipif(not may_make_namespaces(), reason="no PID namespaces for this user on this machine")


def unsure(event: Event, isolation: str) -> str:
    """Of whom the table says that it may live for a while, or where rings alone cannot promise it."""
    return "E" if not event.ends or (isolation == "none" and event.name in ("both", "three", "stepd")) else ""


def check(shell: Shell, event: Event, isolation: str, place: str) -> None:
    maybe = unsure(event, isolation)
    cell = whokills.measure(shell, event, isolation, place, unawaited=maybe)
    assert set(cell.left) <= {maybe}
    assert cell.after == []


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("event", HERE, ids=lambda event: event.name)
def test_who_is_left(tmp_path: Path, event: Event, isolation: str) -> None:
    check(Shell(tmp_path), event, isolation, "local")


@pytest.mark.slurm
@pytest.mark.timeout(300)
@pytest.mark.parametrize("event", THERE, ids=lambda event: event.name)
def test_who_is_left_on_slurm(tmp_path: Path, minicluster: Factory, event: Event) -> None:
    cluster = minicluster(nodes=2, gpus=2, proctrack="linuxproc")
    check(Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]}), event, "namespace", "slurm with linuxproc")


def test_the_table_has_every_row() -> None:
    lines = README.read_text().partition(whokills.BEGIN)[2].partition(whokills.END)[0].splitlines()
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:6]
        for line in lines
        if line.startswith("| slurmfork")
    }
    for isolation in ISOLATIONS:
        for event in EVENTS:
            *four, last = rows[f"slurmfork, `isolation: {isolation}`: {event.words}"]
            assert four == ["gone"] * 4
            if isolation == "namespace":
                assert last == ("gone" if event.ends else "in the run")
    assert all(any(line.startswith(f"| {name} ") for line in lines) for name, _ in whokills.NEIGHBOURS)
