"""Where clusters are kept: their directories, locks, blocks of ports, and cluster.json."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mini.words import BLOCKS, FIRST_PORT, Cluster, Failed, Place, Process, Record, Shape


def registry() -> Path:
    """Where all clusters of this user claim their blocks, wherever their own directories are."""
    return Path(f"/tmp/slurmfork-minicluster-{os.getuid()}")


def find(name: str) -> Cluster:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,19}", name):
        raise Failed(f"name {name!r}: take 1 to 20 of a-z, 0-9 and -, a letter first", 2)
    base = Path(os.environ.get("SLURMFORK_MINICLUSTER_DIR") or registry()).absolute()
    if len(str(base)) > 50:
        raise Failed(f"{base}: too long for Unix sockets below it (50 characters at most)", 2)
    if re.search(r"[^A-Za-z0-9_./-]", str(base)):
        raise Failed(f"{base}: Slurm wants a path of plain letters, digits and ._-/", 2)
    return Cluster(name, base / name)


def own_directory(path: Path) -> None:
    """Makes the directory, or makes sure that nobody else could have prepared it."""
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise Failed(
            f"{path}: must be a directory of yours that no one else can write; remove it, or set "
            "SLURMFORK_MINICLUSTER_DIR to another"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which is gone afterwards; a waiter that got a removed file tries again."""
    deadline = time.monotonic() + 300
    while True:
        own_directory(path.parent)
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            take(fd, path, deadline)
            if path.exists() and os.path.samestat(os.fstat(fd), path.lstat()):
                break
            os.close(fd)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)
        if path.parent == registry():  # a directory that the user has named stays
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def take(fd: int, path: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Failed(f"{path}: another minicluster command has held this for 300 s") from None
            time.sleep(0.1)


def lock_of(cluster: Cluster) -> Path:
    return cluster.home.parent / f".{cluster.name}.lock"


def claim(cluster: Cluster, shape: Shape) -> Place:
    """Takes the first block whose ports are free and that no living cluster has, and makes the directory."""
    with locked(registry() / ".lock"):
        for block in range(1, BLOCKS + 1):
            mark = registry() / f".block-{block}"
            if mark.is_symlink() and not Path(os.readlink(mark)).exists():
                mark.unlink()  # its cluster's directory was removed by hand
            if not mark.is_symlink() and all(map(is_free, Place(block).ports(shape))):
                cluster.home.mkdir(mode=0o755)
                mark.symlink_to(cluster.home)
                return Place(block)
    raise Failed(f"no free block of ports from {FIRST_PORT} on; take a cluster down first")


def give_back(cluster: Cluster) -> None:
    with locked(registry() / ".lock"):
        for mark in registry().glob(".block-*"):
            if mark.is_symlink() and Path(os.readlink(mark)) == cluster.home:
                mark.unlink()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def load(cluster: Cluster) -> Record | None:
    """None: no such cluster, or `up` died before it had written anything, or another version wrote it."""
    try:
        data = json.loads((cluster.home / "cluster.json").read_text())
        lists = {word: tuple(data["shape"].get(word, ())) for word in ("settings", "sshd_options")}
        data["shape"] = Shape(**{**data["shape"], **lists})
        data["daemons"] = {title: Process(**process) for title, process in data["daemons"].items()}
        data["keeper"] = Process(**data["keeper"]) if data["keeper"] else None
        return Record(**data)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def save(cluster: Cluster, record: Record) -> None:
    new = cluster.home / "cluster.json.new"
    new.write_text(json.dumps(asdict(record), indent=1))
    new.replace(cluster.home / "cluster.json")
