"""Pythons with large packages, in environments of their own that are kept from one session to the next."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

RAY = "ray==2.60.0"
KEPT = "SLURMFORK_TEST_KEPT"  # where environments are that were made by who may


def kept_python(name: str, packages: Sequence[str]) -> str:
    """A Python that has these packages; raises OSError or SubprocessError where they cannot be had."""
    if made := os.environ.get(KEPT):
        return str(Path(made) / name / "bin" / "python")
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


def python_with_ray() -> str:
    """One with Ray, and all that slurmfork needs; slurmfork itself is to be on its PYTHONPATH."""
    needed = [one for one in metadata.requires("slurmfork") or () if "extra ==" not in one]
    return kept_python("ray-backend", [RAY, "numpy", *needed])
