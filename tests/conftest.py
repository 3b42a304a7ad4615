"""Fixtures that many tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import minicluster  # noqa: F401
from running import Shell
from ssh_cluster import ssh_cluster  # noqa: F401
from sshd import agent, client, login, sshd  # noqa: F401

TORCH = "torch==2.13.0"


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Shell]:
    """A user's shell for runs on the local backend; ends what it submitted and checks that nothing is left."""
    made = Shell(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="session")
def torch_python() -> str:
    """A Python that has PyTorch, in an environment of its own that is kept from one session to the next."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slurmfork-tests" / "torch"
    python = cache / "bin" / "python"
    if not (cache / ".complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(cache)], check=True, timeout=120)
        install = [str(python), "-m", "pip", "-q", "--disable-pip-version-check", "install", TORCH, "numpy"]
        subprocess.run(install, check=True, timeout=1800)
        (cache / ".complete").touch()
    return str(python)
