"""Runs at sites that configure Slurm in ways of their own (`minicluster up --site`), on this machine's release."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from beds.bed import FOREVER, Bed
from beds.scenarios import REGISTRY
from cluster import SCRIPT, MiniCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SITES = ("export-none", "noisy", "short-memory", "preempt", "interactive", "autobind")
REFUSED = 4
_marks = itertools.count(FOREVER + 1000 * (os.getpid() % 8000))


@pytest.fixture(params=SITES)
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    cluster = MiniCluster()
    try:
        cluster.up(nodes=2, gpus=2, cpus=4, site=request.param)
        yield Bed(cluster.name)
    finally:
        cluster.down()


def test_a_run_at_a_site(bed: Bed) -> None:
    """Submit, fork, fork of a fork, stop, cancel; nothing of it is left."""
    mark = next(_marks)
    REGISTRY["fork"].act(bed, mark)
    assert bed.everywhere(mark) == {}


def test_a_site_that_a_release_cannot_have_is_told_in_a_line() -> None:
    for words, reason in (
        (["--slurm", "22.05", "--site", "rate-limit"], "Slurm 22.05 has no rl_enable; 23.02 has it"),
        (["--site", "adopt"], "hosts of their own"),
        (["--site", "tmpfs"], "would hide"),
        (["--slurm", "24.11", "--site", "old-commands"], "to understand commands of 20.11"),
    ):
        done = subprocess.run(
            [sys.executable, SCRIPT, "up", "--name", "refused", *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == REFUSED, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert reason in done.stderr
