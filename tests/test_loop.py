"""The example of a learning loop, unchanged on every backend, with the same results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Factory
from ray_cluster import ROOT, RayCluster
from running import Shell

EXAMPLES = ROOT / "docs" / "examples"


def learned(shell: Shell, backend: str) -> tuple[list[str], list[str]]:
    """(what it prints of its learning, who was where); nothing may be left."""
    done = subprocess.run(
        [shell.python, str(EXAMPLES / "loop.py"), str(EXAMPLES / "loop.yaml"), backend],
        env=shell.env,
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    (run_id,) = [path.name for path in shell.root.iterdir()]
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{shell.logs(run_id)}"
    assert shell.left(run_id) == []
    status = shell.status(run_id)
    assert (status["state"], status["survivors"], status["unverified"]) == ("cancelled", 0, [])
    return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What it learns here."""
    return learned(Shell(tmp_path_factory.mktemp("local")), "local")[0]


def test_it_learns(expected: list[str]) -> None:
    rewards = [float(line.split()[3].rstrip(",")) for line in expected if line.startswith("step")]
    assert len(rewards) == 5
    assert rewards[-1] > 2 * rewards[0]
    assert expected[-1].startswith("at the end: 0.7")


@pytest.mark.slurm
@pytest.mark.timeout(300)
def test_it_learns_the_same_on_slurm(expected: list[str], minicluster: Factory, tmp_path: Path) -> None:
    cluster = minicluster(nodes=4, gpus=8)
    shell = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    lines, places = learned(shell, "slurm")
    assert lines == expected
    assert {line.split()[2] for line in places if " on " in line} == {f"{node}," for node in cluster.nodes[:4]}


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_it_learns_the_same_on_ray(
    expected: list[str], ray_cluster: RayCluster, ray_python: str, tmp_path: Path
) -> None:
    lines, places = learned(ray_cluster.shell(tmp_path, ray_python), "ray")
    assert lines == expected
    assert {line.split()[2] for line in places if " on " in line} == {"ray0,", "ray1,"}


def test_it_needs_nothing_but_numpy_beside_slurmfork() -> None:
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import policy; print('slurmfork' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
