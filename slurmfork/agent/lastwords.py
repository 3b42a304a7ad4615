"""How the end of a process reads: its exit in words, and the last lines of its log. Also signals by name."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_VALID = frozenset(map(int, signal.valid_signals()))  # asking costs half a millisecond

TAIL_LINES = 20
TAIL_BYTES = 4096


def signal_number(name: str) -> int:
    """The number of TERM, USR1, RTMIN+2 ...; raises ValueError."""
    base, _, offset = name.partition("+")
    number = getattr(signal, f"SIG{base}", None)
    if not isinstance(number, signal.Signals) or (offset and not offset.isdigit()):
        raise ValueError(f"there is no signal {name}")
    value = int(number) + int(offset or 0)
    if value not in _VALID:
        raise ValueError(f"there is no signal {name}")
    return value


def caught(pid: int) -> int:
    """The signals that a process has handlers for, as bits."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return int(line.split()[1], 16)
    return 0


def in_words(code: int, *, ours: bool = False) -> str:
    """An exit, with ``code`` as ``os.waitstatus_to_exitcode`` has it; ``ours``: we were stopping it."""
    if code >= 0:
        return f"exited with {code}" + {126: " (not executable?)", 127: " (command not found?)"}.get(code, "")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL and not ours else "")


def tail(path: Path, begin: int) -> str:
    """The end of what a log holds from ``begin`` on: some lines, some bytes, whichever is less."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        end = os.fstat(descriptor).st_size
        start = max(begin if begin <= end else 0, end - TAIL_BYTES) if end else 0
        data = os.pread(descriptor, TAIL_BYTES, start)
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return "\n".join(data.decode(errors="replace").splitlines()[-TAIL_LINES:])
