"""Engines: Python objects that workers host, and calling their methods from elsewhere.

``Run.role`` gives the handles; in the methods of an engine ``cancelled`` tells whether the caller has given up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slurmfork.engine.handle import Worker as Worker
    from slurmfork.engine.hosted import cancelled as cancelled
    from slurmfork.engine.role import Role as Role

_HOMES = {
    "Role": "slurmfork.engine.role",
    "Worker": "slurmfork.engine.handle",
    "cancelled": "slurmfork.engine.hosted",
}

__all__ = ["Role", "Worker", "cancelled"]


def __getattr__(name: str) -> Any:  # the host is on the path to the first call: it imports no handles
    if name not in _HOMES:
        raise AttributeError(f"module 'slurmfork.engine' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
