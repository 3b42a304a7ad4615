"""What git says of a directory: the files that belong to it, and the state that they are in.

git is asked for what it can tell without changing anything; where it is not there, or refuses, that is said.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from slurmfork.errors import one_line
from slurmfork.rundir import GitRecord

PATIENCE_S = 120.0
SHOWN = 100  # names of changed files that are recorded


class GitFailed(Exception):
    """git is not here, or did not answer; in words."""


def repository(directory: Path) -> Path | None:
    """The top of the working tree that a directory is in, if it is in one."""
    return next((place for place in (directory, *directory.parents) if (place / ".git").exists()), None)


def files(directory: Path) -> list[str]:
    """Paths of what is tracked and of what is neither tracked nor ignored; other repositories within are directories.

    A directory that the repository around it ignores has nothing to do with that: raises GitFailed, as without git.
    """
    tracked = _list(directory, "--cached")
    if not tracked and _status(directory, "check-ignore", "-q", "--", str(directory)) == 0:
        raise GitFailed("")
    others = _list(directory, "--others", "--exclude-standard")
    return sorted({name.rstrip("/") for name in (*tracked, *others)})


def facts(directory: Path) -> GitRecord:
    """Commit, branch, and what of the directory differs from the commit."""
    changed = _changed(_ask(directory, "status", "--porcelain=v1", "-z", "--untracked-files=normal", "--", "."))
    return GitRecord(
        commit=_word(directory, "rev-parse", "--verify", "-q", "HEAD"),
        branch=_word(directory, "symbolic-ref", "-q", "--short", "HEAD"),
        dirty=bool(changed),
        changed=changed[:SHOWN],
        more=max(0, len(changed) - SHOWN),
    )


def _changed(told: bytes) -> list[str]:
    """Two letters, a blank and a path each; a rename is followed by the path that it had."""
    found, fields = [], iter(told.split(b"\0"))
    for field in fields:
        if field:
            found.append(f"{field[:2].decode()} {field[3:].decode(errors='replace')}")
            if field[:1] in b"RC":
                next(fields, None)
    return found


def _list(directory: Path, *options: str) -> list[str]:
    told = _ask(directory, "ls-files", "-z", *options, "--", ".")
    return [os.fsdecode(name) for name in told.split(b"\0") if name]


def _word(directory: Path, *arguments: str) -> str | None:
    done = _run(directory, arguments)
    return done.stdout.decode(errors="replace").strip() or None


def _status(directory: Path, *arguments: str) -> int:
    return _run(directory, arguments).returncode


def _ask(directory: Path, *arguments: str) -> bytes:
    done = _run(directory, arguments)
    if done.returncode:
        raise GitFailed(one_line(done.stderr.decode(errors="replace"))[:300] or f"git {arguments[0]} failed")
    return done.stdout


def _run(directory: Path, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[bytes]:
    """No lock is taken, and no program started that the repository's own configuration names."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(directory), *arguments]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as within a hook
    try:
        return subprocess.run(
            command,
            env={**outside, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except FileNotFoundError:
        raise GitFailed("there is no git here") from None
    except subprocess.TimeoutExpired:
        raise GitFailed(f"git did not answer within {PATIENCE_S:.0f} s") from None
