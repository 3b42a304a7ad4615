"""The sweeper: has a node swept from outside whose agent does not answer, or is gone.

The batch script says how a command is run on a node (srun on Slurm); what is run is ``slurmfork.sweep``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from slurmfork import sweep
from slurmfork.rundir import RunDir

log = logging.getLogger(__name__)

GRACE_S = 2.0
PATIENCE_S = 45.0


class Sweeper:
    """``prefix`` is the beginning of a command line that, followed by a node and a command, runs that there."""

    def __init__(self, prefix: Sequence[str], rundir: RunDir) -> None:
        self._prefix = list(prefix)
        self._rundir = rundir

    async def sweep(self, nodes: Sequence[str], patience: float = PATIENCE_S) -> dict[str, list[str] | None]:
        """Sweep nodes, all at once: per node descriptions of survivors; None where it could not be done."""
        found = await asyncio.gather(*(self._sweep(node, patience) for node in nodes))
        return dict(zip(nodes, found, strict=True))

    async def _sweep(self, node: str, patience: float) -> list[str] | None:
        program = Path(sweep.__file__)
        argv = [sys.executable, "-I", str(program), "--run-dir", str(self._rundir.path), "--grace", str(GRACE_S)]
        if not self._prefix:
            return None
        try:
            process = await asyncio.create_subprocess_exec(
                *self._prefix,
                node,
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            log.warning("node %s could not be swept: %s", node, error)
            return None
        try:
            output, words = await asyncio.wait_for(process.communicate(), patience)
            report = msgspec.json.decode(output, type=sweep.SweepReport)
        except asyncio.TimeoutError:
            log.warning("node %s could not be swept within %g s", node, patience)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return None
        except msgspec.DecodeError:
            log.warning("node %s could not be swept: %s", node, words.decode(errors="replace").strip()[-500:])
            return None
        self._keep(output)
        log.info("node %s was swept from outside: %d ended, %d left", node, len(report.killed), len(report.survivors))
        return report.survivors

    def _keep(self, output: bytes) -> None:
        """Beside the reports of the batch script's own sweep."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            descriptor = os.open(self._rundir.sweeps, flags, 0o600)
            try:
                os.write(descriptor, output)
            finally:
                os.close(descriptor)
