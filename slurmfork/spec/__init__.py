"""The spec: what a user asks for, as typed data (``model``); ``reader`` makes one of a file.

The reader is not imported here: agents need the types alone, and every node waits for its agent to start.
"""

from slurmfork.spec.model import Checkpoint, Code, Local, Ready, Restart, Role, Spec, Stop, Strategy

__all__ = ["Checkpoint", "Code", "Local", "Ready", "Restart", "Role", "Spec", "Stop", "Strategy"]
