"""The Unix users that a cluster's SSH is for: made by `up`, gone with `down`."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mini.accounts import MARK, made_for, marked
from mini.clients import command
from mini.store import locked, registry
from mini.words import Cluster, Failed, Place, Shape


@dataclass(frozen=True)
class Users:
    """Names by what they can do on the login node: log in with a key, with a password, not at all."""

    user: str
    password_user: str
    locked_user: str

    @classmethod
    def of(cls, place: Place) -> Users:
        """Blocks are unique on a machine, so these are."""
        base = f"slurmfork{place.block}"
        return cls(base, f"{base}-pw", f"{base}-locked")


def homes(cluster: Cluster) -> Path:
    return cluster.home / "ssh" / "home"


def make_users(cluster: Cluster, shape: Shape, place: Place, password: str) -> None:
    users = Users.of(place)
    with locked(registry() / ".lock"):  # useradd fails where another has the lock of /etc/passwd
        for name in (users.user, users.password_user, users.locked_user):
            if name in marked() and not Path(marked()[name][1]).exists():
                remove(name)  # its cluster's directory was removed by hand
            # With "!", useradd's own choice, sshd refuses keys too; "*" is no password, and no lock.
            options = ["--password", "*", *(["--expiredate", "1970-01-02"] if name == users.locked_user else [])]
            shell = shutil.which(shape.login_shell) or "/bin/sh"
            at = homes(cluster) / name
            words = ["--no-create-home", "--home-dir", str(at), "--shell", shell, "--comment", f"{MARK}{cluster.home}"]
            command("useradd", "--user-group", *words, *options, name, env=dict(os.environ))
            at.mkdir(mode=0o700, parents=True)
            shutil.chown(at, name, name)
        command("chpasswd", env=dict(os.environ), stdin=f"{users.password_user}:{password}\n")


@contextlib.contextmanager
def settled_users(shape: Shape | None) -> Iterator[None]:
    """Lets an `up` that is at it finish with useradd, which leaves half a user if killed, and not begin with it."""
    with locked(registry() / ".lock") if shape and shape.ssh else contextlib.nullcontext():
        yield


def remove_users(cluster: Cluster) -> None:
    if made_for(cluster):
        with locked(registry() / ".lock"):
            for name in made_for(cluster):
                remove(name)


def remove(name: str) -> None:
    command("userdel", name, env=dict(os.environ))


def need_a_way_in(cluster: Cluster) -> None:
    for path in cluster.home.parents:
        if not path.stat().st_mode & 0o001:
            raise Failed(f"{path}: other users cannot pass it, so --ssh needs another SLURMFORK_MINICLUSTER_DIR")
