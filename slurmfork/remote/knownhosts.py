"""known_hosts files: reading them as OpenSSH does, and adding a line.

Names may be hashed, may be patterns, may be negated; a line may be marked @revoked or @cert-authority. paramiko's own
reader knows neither marks nor patterns.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import fnmatch
import hashlib
import hmac
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slurmfork.errors import TransportError

REVOKED = "@revoked"
AUTHORITY = "@cert-authority"


@dataclass(frozen=True)
class Known:
    """One line that is about a host."""

    file: Path
    line: int
    mark: str
    kind: str
    blob: bytes

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.file}:{self.line}"


def fingerprint(blob: bytes) -> str:
    """As `ssh-keygen -l` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def lines_about(name: str, files: Iterable[Path]) -> Iterator[Known]:
    """All lines whose names fit ``name``; raises TransportError for a file that is there and cannot be read."""
    for file in files:
        try:
            text = file.read_text(errors="surrogateescape")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TransportError(f"cannot read the known host keys in {file}: {error.strerror}") from error
        for number, line in enumerate(text.splitlines(), 1):
            known = _parse(file, number, line, name)
            if known is not None:
                yield known


def _parse(file: Path, number: int, line: str, name: str) -> Known | None:
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    mark = words.pop(0).lower() if words[0].startswith("@") else ""
    if len(words) < 3 or not _fits(words[0], name):
        return None
    with contextlib.suppress(binascii.Error):
        return Known(file, number, mark, words[1], base64.b64decode(words[2], validate=True))
    return None


def _fits(names: str, name: str) -> bool:
    found = False
    for pattern in names.split(","):
        if pattern.startswith("|1|"):
            found |= _is_hash_of(pattern, name)
        elif pattern.startswith("!"):
            if _matches(pattern[1:], name):
                return False
        else:
            found |= _matches(pattern, name)
    return found


def _matches(pattern: str, name: str) -> bool:
    """OpenSSH's patterns know * and ?; brackets stand for themselves, as in [host]:port."""
    return fnmatch.fnmatchcase(name, pattern.lower().replace("[", "[[]"))


def _is_hash_of(text: str, name: str) -> bool:
    try:
        salt, digest = (base64.b64decode(part) for part in text[3:].split("|", 1))
    except ValueError:
        return False
    return hmac.compare_digest(hmac.new(salt, name.encode(), "sha1").digest(), digest)


def _hashed(name: str) -> str:
    salt = os.urandom(20)
    digest = hmac.new(salt, name.encode(), "sha1").digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


def add(file: Path, name: str, kind: str, blob: bytes, *, hashed: bool = False) -> None:
    """Append a key to a file, which is made if need be, for this user alone; raises TransportError."""
    line = f"{_hashed(name) if hashed else name} {kind} {base64.b64encode(blob).decode()}\n"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with open(descriptor, "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            size = stream.seek(0, os.SEEK_END)
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = "\n" + line
            stream.write(line.encode())
    except OSError as error:
        raise TransportError(f"cannot write the host key to {file}: {error.strerror}") from error
