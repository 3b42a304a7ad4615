"""Fixtures that many tests share."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from cluster import minicluster  # noqa: F401
from ray_cluster import RayCluster
from running import Shell
from ssh_cluster import ssh_cluster  # noqa: F401
from sshd import agent, client, login, sshd  # noqa: F401

TORCH = "torch==2.13.0"
RAY = "ray==2.60.0"


class Teller:
    """Names each failure when it comes, so that a session that is cut off has told of it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reporter.write_line(f" {report.nodeid} failed ({report.when})")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Teller(config))


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Shell]:
    """A user's shell for runs on the local backend; ends what it submitted and checks that nothing is left."""
    made = Shell(tmp_path)
    yield made
    made.end()


def kept_python(name: str, packages: Sequence[str]) -> str:
    """A Python that has these packages, in an environment of its own that is kept from one session to the next."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slurmfork-tests" / name
    python = cache / "bin" / "python"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side, and two may want the same
        if not (cache / ".complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(cache)], check=True, timeout=120)
            install = [str(python), "-m", "pip", "-q", "--disable-pip-version-check", "install", *packages]
            subprocess.run(install, check=True, timeout=1800)
            (cache / ".complete").touch()
    return str(python)


@pytest.fixture(scope="session")
def torch_python() -> str:
    """A Python that has PyTorch."""
    return kept_python("torch", [TORCH, "numpy"])


@pytest.fixture(scope="session")
def ray_python() -> str:
    """A Python that has Ray, and all that slurmfork needs; slurmfork itself is on its PYTHONPATH."""
    needed = [one for one in metadata.requires("slurmfork") or () if "extra ==" not in one]
    return kept_python("ray-backend", [RAY, "numpy", *needed])


@pytest.fixture(scope="module")
def ray_cluster(ray_python: str) -> Iterator[RayCluster]:
    """A Ray cluster of two local nodes, each with two GPUs that are numbers alone; nothing of it is left."""
    cluster = RayCluster(ray_python)
    yield cluster
    cluster.end()
