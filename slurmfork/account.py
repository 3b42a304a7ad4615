"""This user's account, also where the system has no entry for the uid: a name, and a home directory."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from slurmfork.errors import UsageError


def known_name() -> str | None:
    """What the system calls the user of this process; None where it knows none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return None


def name() -> str:
    """What the system calls this user; else what the environment says, which may be somebody else's; else the uid."""
    return known_name() or os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.geteuid())


def home() -> Path:
    """The home directory; raises UsageError where neither HOME nor the system names one."""
    try:
        return Path.home()
    except RuntimeError:
        raise UsageError(f"uid {os.geteuid()} has no home directory here: set HOME, and --root for runs") from None
