"""The spec: what a user asks for, as typed data (``model``); ``reader`` makes one of a file.

The reader is not imported here: agents need the types alone, and their start is on every node's critical path.
"""

from slurmfork.spec.model import Local, Ready, Restart, Role, Spec, Stop, Strategy

__all__ = ["Local", "Ready", "Restart", "Role", "Spec", "Stop", "Strategy"]
