"""slurmfork: a compose file for a Slurm allocation.

The public door: ``submit``, ``Run``, ``Scheduler``, ``Spec``, ``current`` and the errors. Names are resolved on first
use, so that ``import slurmfork`` costs nothing in the agents, whose start is on every node's critical path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slurmfork.version import __version__

if TYPE_CHECKING:
    from slurmfork.errors import SlurmforkError as SlurmforkError
    from slurmfork.run import Run as Run
    from slurmfork.scheduler import Scheduler as Scheduler
    from slurmfork.spec import Spec as Spec
    from slurmfork.spec.reader import load as load_spec
    from slurmfork.submission import submit as submit
    from slurmfork.worker import current as current

_HOMES = {
    "Run": ("slurmfork.run", "Run"),
    "Scheduler": ("slurmfork.scheduler", "Scheduler"),
    "Spec": ("slurmfork.spec", "Spec"),
    "SlurmforkError": ("slurmfork.errors", "SlurmforkError"),
    "current": ("slurmfork.worker", "current"),
    "load_spec": ("slurmfork.spec.reader", "load"),
    "submit": ("slurmfork.submission", "submit"),
}

__all__ = ["Run", "Scheduler", "SlurmforkError", "Spec", "__version__", "current", "load_spec", "submit"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slurmfork' has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
