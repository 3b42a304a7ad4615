"""Lean: paramiko is imported without the library by which it runs the commands of `Match exec`.

That one takes as long to import as all the rest; ``sshconfig`` does it where somebody's configuration needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lean() -> Iterator[None]:
    """For the first import of what imports paramiko."""
    there = "invoke" in sys.modules
    if not there:
        sys.modules["invoke"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not there:
            del sys.modules["invoke"]
