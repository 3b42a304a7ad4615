"""Who knows the workers of a run, to those who call their engines."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

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
