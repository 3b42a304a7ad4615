"""What a process asks of the kernel for itself and the standard library has no words for. Starts nothing."""

from __future__ import annotations

import ctypes
import os

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36


def become_subreaper() -> None:
    """Have every orphan below this process fall to it, however it was daemonized."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def signal_at_parents_death(signum: int) -> None:
    """Have the kernel signal this process when its parent ends, or the parent's thread that started it."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def rename(name: str) -> None:
    """Set what ``ps`` and ``top`` call this process, 15 characters at most."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def _prctl(option: int, value: int | bytes) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if library.prctl(option, argument, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")
