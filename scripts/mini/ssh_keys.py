"""The keys of a cluster's SSH: of its hosts, of its users, and of who signs certificates."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from mini.clients import command
from mini.words import Cluster

TYPES = {"ed25519": "ed25519", "ecdsa": "ecdsa", "rsa": "rsa"}  # each a name of a key, too
CLIENT_KEYS = {**TYPES, "passphrase": "ed25519", "certificate": "ed25519", "unauthorised": "ed25519"}
AUTHORISED = ("ed25519", "ecdsa", "rsa", "passphrase")  # `certificate` gets in by its signature alone
SECRETS = ("password", "passphrase")


def keys_at(cluster: Cluster) -> Path:
    return cluster.home / "ssh" / "keys"


def key_paths(cluster: Cluster) -> dict[str, Path]:
    return {name: keys_at(cluster) / name for name in CLIENT_KEYS}


def secret_paths(cluster: Cluster) -> dict[str, Path]:
    """Files of one line: what the password user types, and what opens the key `passphrase`."""
    return {name: keys_at(cluster) / f"{name}.txt" for name in SECRETS}


def authority(cluster: Cluster) -> Path:
    return cluster.home / "ssh" / "ca"


def make_key(path: Path, kind: str, passphrase: str = "") -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    command("ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", str(path), env=dict(os.environ))


def make_client_keys(cluster: Cluster, principal: str) -> None:
    """All private keys and secrets are 0600, in a directory that is 0700."""
    keys_at(cluster).mkdir(mode=0o700)
    for path in secret_paths(cluster).values():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(12) + "\n")
    for name, path in key_paths(cluster).items():
        locked = name == "passphrase"
        make_key(path, CLIENT_KEYS[name], secret_paths(cluster)[name].read_text().strip() if locked else "")
    make_key(authority(cluster), "ed25519")
    signed = str(key_paths(cluster)["certificate"].with_suffix(".pub"))
    sign = ["-I", "slurmfork", "-n", principal, "-V", "-1h:+52w"]
    command("ssh-keygen", "-q", "-s", str(authority(cluster)), *sign, signed, env=dict(os.environ))


def public(path: Path) -> str:
    """Type and key, without the comment."""
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def authorised(cluster: Cluster) -> list[str]:
    return [public(key_paths(cluster)[name]) for name in AUTHORISED]
