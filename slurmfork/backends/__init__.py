"""Backends: who gives the nodes. Each gets nodes and has one agent started on each; the rest is common code."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from slurmfork.errors import UsageError

if TYPE_CHECKING:
    from slurmfork.backends.base import Backend

# Imported when they are asked for: a backend may need what is not installed everywhere.
_BACKENDS = {
    "local": "slurmfork.backends.local:LocalBackend",
    "ray": "slurmfork.backends.ray:RayBackend",
    "slurm": "slurmfork.backends.slurm:SlurmBackend",
}


def get(name: str) -> Backend:
    """The backend of that name; raises UsageError with the names that there are."""
    if name not in _BACKENDS:
        raise UsageError(f"unknown backend {name!r}; there are {', '.join(sorted(_BACKENDS))}")
    module, _, attribute = _BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
