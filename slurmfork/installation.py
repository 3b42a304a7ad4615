"""The installation that this process is of: paths of it that stay true when a bootstrap puts another beside it.

``~/.slurmfork/venv`` is a link to the newest one. What is recorded, and what is imported later, must not go through
it: a run, and a process, keep the installation that they began with. Imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import sys


def python() -> str:
    """This Python, by a path in which no directory is a link; the file itself may be one, as in any venv."""
    return os.path.join(os.path.realpath(os.path.dirname(sys.executable)), os.path.basename(sys.executable))  # noqa: PTH118, PTH119, PTH120


def settle() -> None:
    """Have this process import from the installation that the link names now, whatever it will name later."""
    before = os.path.dirname(os.path.dirname(sys.executable))  # noqa: PTH120
    resolved = python()
    after = os.path.dirname(os.path.dirname(resolved))  # noqa: PTH120
    if before == after:
        return

    def settled(path: str) -> str:
        return after + path[len(before) :] if path == before or path.startswith(before + os.sep) else path

    sys.executable, sys.prefix, sys.exec_prefix = resolved, settled(sys.prefix), settled(sys.exec_prefix)
    sys.path[:] = map(settled, sys.path)
    for module in list(sys.modules.values()):
        if isinstance(places := getattr(module, "__path__", None), list):
            places[:] = map(settled, places)


def note_use(run_dir: str) -> None:
    """Leave word in an installation that a bootstrap made that a run needs it, so that it is not removed."""
    place = os.path.dirname(os.path.dirname(python()))  # noqa: PTH120
    if os.path.exists(os.path.join(place, ".complete")):  # noqa: PTH110, PTH118
        runs = os.path.join(place, "runs")  # noqa: PTH118
        with contextlib.suppress(OSError):
            os.makedirs(runs, mode=0o700, exist_ok=True)  # noqa: PTH103
            os.symlink(run_dir, os.path.join(runs, os.path.basename(run_dir)))  # noqa: PTH118, PTH119, PTH211
