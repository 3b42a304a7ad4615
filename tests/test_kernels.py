"""Runs on nodes that are kernels of their own: another release of Slurm, control groups of version 2, each node with a
/proc, a host name, a clock, and a power supply that can be cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from beds import on_kernels
from beds.bed import FOREVER, Bed
from beds.scenarios import REGISTRY
from cluster import MiniCluster, words_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(2400)]

RELEASE = "24.11"
ROOMS = (on_kernels,)  # importing it fills the registry
_marks = itertools.count(FOREVER)

SPEC = """
    name: kernels
    nodes: 2
    slurm: {{gpus-per-node: 2, time: "01:00:00"}}
    roles:
      first:
        per_node: 1
        gpus: 1
        command: "sleep {mark} & exec sleep {mark}"
      stray:
        per_node: 1
        command: "env -i setsid -f sleep {mark}; exec sleep {mark}"
      second:
        strategy: {{type: colocation, target: first}}
        autostart: false
        command: [sleep, "{mark}"]
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """Two nodes and a login node; a machine that cannot have them skips, or fails where Slurm is demanded."""
    cluster = MiniCluster()
    try:
        cluster.up(slurm=RELEASE, kernels=True, nodes=2, gpus=2, cpus=4)
        yield Bed(cluster.name)
    finally:
        home = cluster.home
        cluster.down()
        assert words_of(home) == []


@pytest.fixture
def mark(bed: Bed) -> Iterator[int]:
    """What the processes of one test are known by; none is left on any node."""
    made = next(_marks)
    yield made
    bed.end()
    assert bed.everywhere(made) == {}


def test_a_run_from_submit_to_cancel(bed: Bed, mark: int) -> None:
    run_id = bed.ready(SPEC.format(mark=mark))
    assert {node: len(bed.seen(mark, node)) for node in bed.nodes} == {"n1": 4, "n2": 4}
    forked = bed.json("fork", run_id, "second", "--target", "first")["workers"]
    assert sorted((view["worker"], view["node"]) for view in forked) == [("second/0", "n1"), ("second/1", "n2")]
    assert {node: len(bed.seen(mark, node)) for node in bed.nodes} == {"n1": 5, "n2": 5}
    stopped = bed.json("stop", run_id, "second")
    assert (len(stopped["stopped"]), stopped["survivors"]) == (2, 0)
    assert {node: len(bed.seen(mark, node)) for node in bed.nodes} == {"n1": 4, "n2": 4}
    cancelled = bed.json("cancel", run_id)
    assert (cancelled["state"], cancelled["survivors"], cancelled["unverified"]) == ("cancelled", 0, [])
    assert bed.everywhere(mark) == {}


def test_a_bare_scancel_leaves_nothing_on_any_node(bed: Bed, mark: int) -> None:
    run_id = bed.ready(SPEC.format(mark=mark))
    bed.json("fork", run_id, "second", "--target", "first")
    bed.slurm("scancel", bed.status(run_id)["job_id"])
    assert bed.ended(run_id).returncode == 1
    assert bed.status(run_id)["state"] == "cancelled"
    bed.until(lambda: bed.everywhere(mark) == {}, "every process of the run to be gone")


def test_a_node_without_power(bed: Bed, mark: int) -> None:
    """It is named in time, the other node's workers are ended, and when it is back nothing lives there."""
    try:
        REGISTRY["power-cut"].act(bed, mark)
    finally:
        for node in list(bed.down_nodes):
            bed.deed(node, "start")
