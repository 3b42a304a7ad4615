"""Who knows the workers of a run, to those who call their engines."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from slurmfork.errors import SlurmforkError
from slurmfork.messages import WorkerView


class Source(Protocol):
    """Who knows the workers of a run: a Run, or the worker that this process is."""

    @property
    def run_id(self) -> str: ...

    @property
    def credentials_directory(self) -> Path:
        """Where the run's certificates are."""

    def engine_views(self, role: str) -> list[WorkerView]:
        """The workers of a role, as they stand now."""


def views_of(source: Source, workers: Collection[str]) -> dict[str, WorkerView | None]:
    """How these stand, None for one that is gone; without those of whom nobody says anything now."""
    found: dict[str, WorkerView | None] = {}
    for role in {worker.partition("/")[0] for worker in workers}:
        with contextlib.suppress(SlurmforkError):
            views = {view.worker: view for view in source.engine_views(role)}
            found |= {worker: views.get(worker) for worker in workers if worker.startswith(f"{role}/")}
    return found
