"""The Ray backend: the batch script runs on this machine, and Ray gives the nodes, by ``backends.ray_driver``.

As with the local backend a job is the script's process. Ray itself is imported by the driver alone.
"""

from __future__ import annotations

import contextlib
from importlib import metadata, util
from typing import TYPE_CHECKING

from slurmfork.backends.base import Check, Job
from slurmfork.backends.local import LocalBackend
from slurmfork.backends.ray_nodes import read
from slurmfork.errors import BackendError, RunDirError

if TYPE_CHECKING:
    from slurmfork.plan import Request
    from slurmfork.rundir import RunDir
    from slurmfork.spec import Spec

_MISSING = "Ray is not installed in this Python: pip install 'slurmfork[ray]'"


class RayBackend(LocalBackend):
    """Runs batch scripts on this machine, which ask Ray for nodes."""

    name = "ray"

    def submit(self, rundir: RunDir, spec: Spec, request: Request) -> Job:
        """Start the batch script; raises BackendError without Ray, or without bash."""
        if util.find_spec("ray") is None:
            raise BackendError(_MISSING)
        return self._begin(rundir, spec, [])

    def host(self, rundir: RunDir, node: str) -> str:
        """The machine of one of Ray's nodes; this one where that is not known."""
        with contextlib.suppress(RunDirError):
            if place := read(rundir).nodes.get(node):
                return place.host
        return super().host(rundir, node)

    def check(self) -> list[Check]:
        """Whether Ray is there."""
        if util.find_spec("ray") is None:
            return [Check(name="ray", ok=False, detail=_MISSING)]
        return [Check(name="ray", ok=True, detail=f"version {metadata.version('ray')}")]
