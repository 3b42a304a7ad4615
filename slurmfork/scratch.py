"""The node-local directory of an agent: sockets, and a scratch directory per worker. Removed at the end."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from slurmfork.errors import RunDirError
from slurmfork.userdir import private_directory as private_directory
from slurmfork.userdir import user_directory

_LONGEST_BASE = 48  # with what programs add below TMPDIR, a Unix socket's path stays within its 107 bytes
_LONGEST_NAME = 24
_MARK = "whose"


def node_directory(run_id: str, node: str) -> Path:
    """Where the agent of this node keeps its sockets; a hash stands in for names that would be too long."""
    own = user_directory()
    plain = own / f"{run_id}-{node}"
    if len(os.fsencode(plain)) <= _LONGEST_BASE:
        return plain
    return own / f"h-{_hash(f'{run_id}/{node}')}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Scratch:
    """The directories of one agent. Raises RunDirError where they cannot be made."""

    def __init__(self, run_id: str, node: str) -> None:
        self._removed = 0
        try:
            self.ports = user_directory() / "ports.lock"
            self.path = private_directory(node_directory(run_id, node))
            self._workers = private_directory(self.path / "t")
            self._notify = private_directory(self.path / "n")
            self._lock = _lock(self.path / "lock")
        except OSError as error:
            raise RunDirError(f"cannot make {error.filename}: {error.strerror}") from None

    def mark(self, job: tuple[str, str], run_dir: Path, node: str) -> None:
        """Say whose it is, for a sweep that knows no more than a job (cluster and id, or empty), and for ``marked``."""
        descriptor = os.open(self.path / _MARK, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w") as file:
            file.write("\n".join((*job, node, str(run_dir))))

    @property
    def socket(self) -> Path:
        """The agent's own socket."""
        return self.path / "agent.sock"

    def worker(self, name: str) -> Path:
        """Where a worker's scratch directory is, or will be."""
        return self._workers / _short(name)

    def notify(self, name: str) -> Path:
        """Where a worker's notify socket goes."""
        return self._notify / _short(name)

    def set_aside(self, name: str) -> Path | None:
        """Free a worker's name at once; returns what it left, for a thread to remove. None: it left nothing."""
        here = self._workers / _short(name)
        try:
            here.rmdir()
        except FileNotFoundError:
            return None
        except OSError:
            self._removed += 1
            aside = self.path / f"removed-{self._removed}"
            try:
                here.rename(aside)
            except OSError:
                return None
            return aside
        return None


def of_job(cluster: str, job_id: str) -> list[tuple[Path, str]]:
    """Run directory and node of each run of a Slurm job whose agents have, or left, a directory on this host.

    Both must be the same: hosts that belong to two clusters have two jobs of one id.
    """
    return [(run_dir, node) for job, run_dir, node in _marked() if job_id and job == (cluster, job_id)]


def marked() -> list[tuple[Path, str]]:
    """Run directory and node of each directory of an agent on this host, whether that lives or not."""
    return [(run_dir, node) for _, run_dir, node in _marked()]


def _marked() -> Iterator[tuple[tuple[str, str], Path, str]]:
    for place in user_directory().iterdir():
        with contextlib.suppress(OSError, ValueError):
            cluster, job_id, node, run_dir = (place / _MARK).read_text().split("\n", 3)
            yield (cluster, job_id), Path(run_dir), node


def _lock(path: Path) -> int:
    """Hold the directory for as long as this process lives; raises RunDirError where another one does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RunDirError(f"this node of the run has an agent already: it holds {path}") from None
    return descriptor


def _short(name: str) -> str:
    plain = name.replace("/", "-")
    return plain if len(plain) <= _LONGEST_NAME else _hash(name)


def remove(path: Path) -> None:
    """Remove a directory with all that is in it; slow if it holds much."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def remove_left(run_id: str, node: str) -> None:
    """Remove what an agent that died has left, unless another one has taken its place since."""
    path = node_directory(run_id, node)
    with contextlib.suppress(OSError, RunDirError):
        if _is_ours(path):
            lock = _lock(path / "lock")
            remove(path)
            os.close(lock)


def _is_ours(path: Path) -> bool:
    facts = path.lstat()
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid()
