"""Trust: whether the key that a server shows is that of the host we want.

Known: go on. Unknown: refused, with its fingerprint and the command that accepts it. Another one than is known, or
revoked: refused, always; nothing here accepts it. A certificate counts if its authority is known for the host.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slurmfork.errors import TransportError
from slurmfork.remote.knownhosts import AUTHORITY, REVOKED, Known, fingerprint, lines_about

if TYPE_CHECKING:
    import paramiko

    from slurmfork.remote.sshconfig import Settings


@dataclass(frozen=True)
class ShownKey:
    """The key that a server has shown, and proven to hold."""

    kind: str
    blob: bytes  # the plain key
    certificate: bytes | None = None

    @classmethod
    def of(cls, key: paramiko.PKey) -> ShownKey:
        """From what the key exchange left."""
        full = getattr(key, "public_blob", None)
        return cls(key.get_name(), key.asbytes(), full.key_blob if full else None)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.blob)

    @property
    def words(self) -> str:
        """Its type and fingerprint, for messages."""
        return f"{self.kind.removeprefix('ssh-')} {self.fingerprint}"


class UnknownHost(TransportError):
    """Nothing is known of a host that has shown ``key``."""

    kind = "unknown_host"

    def __init__(self, message: str, settings: Settings, key: ShownKey) -> None:
        super().__init__(message)
        self.settings = settings
        self.key = key


Decide = Callable[["Settings", ShownKey], bool]


@dataclass(frozen=True)
class Trust:
    """What is known of one host. ``profile`` is the name under which a command can accept its key."""

    settings: Settings
    profile: str | None = None
    known: list[Known] = field(default_factory=list)
    elsewhere: list[Known] = field(default_factory=list)  # for the same host, not by port: good enough to trust

    @classmethod
    def read(cls, settings: Settings, profile: str | None = None) -> Trust:
        """Read the known_hosts files; raises TransportError."""
        files = [*settings.known_hosts, *settings.global_known_hosts]
        known = list(lines_about(settings.lookup, files))
        plain = settings.host.lower()
        by_port = settings.key_name is None and settings.lookup != plain
        return cls(settings, profile, known, list(lines_about(plain, files)) if by_port else [])

    def first_kinds(self) -> list[str]:
        """Algorithms to ask the server for before all others: those for which we can recognise it."""
        kinds = [line.kind for line in (*self.known, *self.elsewhere) if not line.mark]
        return [algorithm for kind in dict.fromkeys(kinds) for algorithm in _algorithms(kind)]

    @property
    def has_authority(self) -> bool:
        """Whether an authority is known that may have certified the host's key."""
        return any(line.mark == AUTHORITY for line in self.known)

    def check(self, key: ShownKey) -> str:
        """Says by which line the key is known; raises UnknownHost, TransportError."""
        lines = [*self.known, *self.elsewhere]
        for line in lines:
            if line.mark == REVOKED and line.blob in (key.blob, *_authority_of(key)):
                raise TransportError(f"{self._who} shows a host key that {line.where} calls revoked: refused")
        for line in lines:
            if not line.mark and line.blob == key.blob:
                return line.where
        if key.certificate is not None:
            return self._certified(key)
        others = [line for line in self.known if not line.mark]
        if others:
            raise TransportError(self._changed(key, others))
        raise UnknownHost(self._unknown(key), self.settings, key)

    def _certified(self, key: ShownKey) -> str:
        assert key.certificate is not None
        authorities = {line.blob: line for line in self.known if line.mark == AUTHORITY}
        try:
            return authorities[_valid_authority(key, self.settings)].where
        except KeyError:
            raise TransportError(f"the certificate of {self._who} is by an authority that is not known") from None
        except ValueError as error:
            raise TransportError(f"the certificate of {self._who} is not valid: {error}") from error

    def _changed(self, key: ShownKey, others: list[Known]) -> str:
        line = next((line for line in others if line.kind == key.kind), others[0])
        remedy = f"ssh-keygen -f {shlex.quote(str(line.file))} -R {shlex.quote(self.settings.lookup)}"
        return (
            f"{self._who} shows another host key ({key.words}) than is known by {line.where} ({line.kind}): refused, "
            f"somebody may be in between; if its site says that the key has changed, `{remedy}` forgets the old one"
        )

    def _unknown(self, key: ShownKey) -> str:
        command = f"ssh {shlex.quote(self.settings.alias)}"
        if self.profile is not None:
            command = f"slurmfork cluster trust {shlex.quote(self.profile)} --fingerprint {key.fingerprint}"
        return (
            f"the host key of {self._who} is not known ({key.words}): "
            f"if its site publishes the same fingerprint, `{command}` accepts it"
        )

    @property
    def _who(self) -> str:
        return self.settings.lookup


def _algorithms(kind: str) -> list[str]:
    return ["rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind]


def _authority_of(key: ShownKey) -> list[bytes]:
    if key.certificate is None:
        return []
    from cryptography.hazmat.primitives import serialization

    certificate = _parsed(key)
    public = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return [_blob(certificate.signature_key().public_bytes(*public))]


def _valid_authority(key: ShownKey, settings: Settings) -> bytes:
    """The authority that has certified this key for this host, now; raises ValueError."""
    import fnmatch

    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import SSHCertificateType

    certificate = _parsed(key)
    try:
        certificate.verify_cert_signature()
    except InvalidSignature:
        raise ValueError("its signature is wrong") from None
    if certificate.type is not SSHCertificateType.HOST:
        raise ValueError("it is not a host's")
    if not certificate.valid_after <= time.time() < certificate.valid_before:
        raise ValueError("it has expired, or is not valid yet")
    name = (settings.key_name or settings.host).lower()
    principals = [principal.decode(errors="replace").lower() for principal in certificate.valid_principals]
    if not any(fnmatch.fnmatchcase(name, principal) for principal in principals):
        raise ValueError(f"it is for {', '.join(principals) or 'nobody'}, not for {name}")
    if certificate.critical_options:
        raise ValueError("it has critical options that nobody here knows")
    return _authority_of(key)[0]


def _parsed(key: ShownKey):  # type: ignore[no-untyped-def]
    import base64

    from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity

    assert key.certificate is not None
    kind_length = int.from_bytes(key.certificate[:4], "big")
    kind = key.certificate[4 : 4 + kind_length]
    identity = load_ssh_public_identity(kind + b" " + base64.b64encode(key.certificate))
    if not isinstance(identity, SSHCertificate):
        raise ValueError("it is no certificate")
    return identity


def _blob(line: bytes) -> bytes:
    import base64

    return base64.b64decode(line.split()[1])
