"""Private keys: from files, which may want a passphrase, and from an ssh-agent; with the certificates beside them."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from paramiko.agent import AgentKey, AgentSSH
from paramiko.pkey import PublicBlob

LISTING_S = 10.0
SIGNING_S = 60.0  # somebody may have to say yes, or to touch something
_MAGIC = b"openssh-key-v1\x00"
_CERTIFICATE = "-cert-v01@openssh.com"
Ask = Callable[[str], str]


class Unusable(Exception):
    """A key that cannot be used; the message says why, in words that follow the key's name."""


class PassphraseNeeded(Unusable):
    """A key that cannot be read without its passphrase."""


def public_blob(file: Path) -> bytes | None:
    """The public half of a key file, without a passphrase: from FILE.pub, or from the file's own beginning."""
    with contextlib.suppress(OSError, ValueError, IndexError, binascii.Error):
        return base64.b64decode(Path(f"{file}.pub").read_text().split()[1])
    with contextlib.suppress(OSError, ValueError, IndexError, binascii.Error):
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("-")]
        message = paramiko.Message(base64.b64decode("".join(lines)).removeprefix(_MAGIC))
        for _ in ("cipher", "kdf", "its options"):
            message.get_string()
        if message.get_int() == 1:
            return message.get_binary()
    return None


class PrivateKey:
    """A private key that was read, ready to be shown plainly or by certificates."""

    def __init__(self, key: Any) -> None:
        kinds: list[tuple[type, type[paramiko.PKey]]] = [
            (ed25519.Ed25519PrivateKey, paramiko.Ed25519Key),
            (ec.EllipticCurvePrivateKey, paramiko.ECDSAKey),
            (rsa.RSAPrivateKey, paramiko.RSAKey),
        ]
        self._kind = next((ours for theirs, ours in kinds if isinstance(key, theirs)), None)
        if self._kind is None:
            raise UnsupportedAlgorithm("")
        form = serialization.PrivateFormat.OpenSSH
        self._text = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
        self.plain = self._made()

    def _made(self) -> paramiko.PKey:
        assert self._kind is not None
        return self._kind.from_private_key(io.StringIO(self._text))

    def certified(self, certificate: Path) -> paramiko.PKey | None:
        """The same key, shown by its certificate; None where the certificate is another key's."""
        twin = self._made()
        with contextlib.suppress(ValueError, paramiko.SSHException, OSError):
            twin.load_certificate(str(certificate))
            blob: Any = twin.public_blob
            made: Any = type(twin)
            if made(data=blob.key_blob).asbytes() == self.plain.asbytes():
                return twin
        return None


def load(file: Path, passphrase: str | None = None) -> PrivateKey:
    """A private key, of any form that OpenSSH knows; raises Unusable, PassphraseNeeded."""
    try:
        facts = file.stat()
        data = file.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from error
    if stat.S_IMODE(facts.st_mode) & 0o077 and facts.st_uid == os.getuid():
        raise Unusable(f"can be read by others (chmod 600 {file})")
    secret = passphrase.encode(errors="surrogateescape") if passphrase is not None else None
    read: Any = serialization.load_ssh_private_key if b"OPENSSH PRIVATE" in data else serialization.load_pem_private_key
    try:
        return PrivateKey(read(data, secret))
    except TypeError:
        raise PassphraseNeeded("needs a passphrase") from None
    except ValueError:
        raise Unusable("has another passphrase" if passphrase is not None else "is not a private key") from None
    except (UnsupportedAlgorithm, paramiko.SSHException):
        raise Unusable("is of a kind that is not known here (an ssh-agent may know it)") from None


def certificates(file: Path, more: tuple[Path, ...]) -> Iterator[Path]:
    """The certificate files that may belong to a key file."""
    for candidate in (Path(f"{file}-cert.pub"), *more):
        if candidate.is_file():
            yield candidate


class Agent:
    """A connection to an ssh-agent; without one it has no keys. Never waits for it without end."""

    def __init__(self, path: str | None) -> None:
        self.keys: list[AgentKey] = []
        self._connection = AgentSSH()
        if not path:
            return
        with contextlib.suppress(OSError, paramiko.SSHException):
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.settimeout(LISTING_S)
            link.connect(path)
            self._connection._connect(link)  # type: ignore[attr-defined]
            link.settimeout(SIGNING_S)
            self.keys = list(map(_with_certificate, self._connection.get_keys()))

    def close(self) -> None:
        self._connection._close()  # type: ignore[attr-defined]


def _with_certificate(key: Any) -> AgentKey:
    """paramiko shows the plain key under a certificate's name; servers take the certificate only."""
    if is_certificate(key):
        key.public_blob = PublicBlob(key.get_name(), key.blob)
    elif key.inner_key is None:  # of a kind that paramiko does not know, as on a security token; the agent does
        key.public_blob = None
    agent_key: AgentKey = key
    return agent_key


def is_certificate(key: AgentKey) -> bool:
    """Whether an agent's key is shown by a certificate."""
    return key.get_name().endswith(_CERTIFICATE)
