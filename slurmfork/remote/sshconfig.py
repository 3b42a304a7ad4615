"""What ~/.ssh/config and /etc/ssh/ssh_config say of a host, below what a profile says.

paramiko reads the files; `Include`, which it does not know, is put in its place before. Everything that we heed is
in ``Settings``; what weakens the check of host keys (StrictHostKeyChecking no) is not among it, on purpose.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import paramiko

from slurmfork import account
from slurmfork.errors import TransportError

SYSTEM = Path("/etc/ssh/ssh_config")
PORT = 22
CONNECT_S = 10.0
_DEPTH = 16
_DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


_EXEC = re.compile(r"^\s*match\b.*\bexec\b", re.IGNORECASE | re.MULTILINE)


def _have_match_exec() -> None:
    """paramiko runs the commands of `Match exec` by another library, which it was imported without."""
    import invoke
    import paramiko.config

    paramiko.config.invoke = invoke  # type: ignore[attr-defined]


class Hop(NamedTuple):
    """A machine to go to, as somebody wrote it; None where they left it to the files."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def of(cls, text: str) -> Hop:
        """From ``[user@]host[:port]`` or ``ssh://...``; raises ValueError."""
        match = re.fullmatch(
            r"(?:ssh://)?(?:([^@\s]+)@)?(\[[^\]\s]+\]|[^@:\s/\-][^@:\s/]*)(?::(\d{1,5}))?/?", text.strip()
        )
        if match is None:
            raise ValueError(f"{text!r} is not [user@]host[:port]")
        return cls(match[2].strip("[]"), match[1], int(match[3]) if match[3] else None)


@dataclass(frozen=True)
class Settings:
    """How a host is reached. ``alias`` is how it was called."""

    alias: str
    host: str
    port: int
    user: str
    identity_files: tuple[Path, ...]
    files_named: bool  # by somebody; they are not just the usual ones
    identities_only: bool
    certificate_files: tuple[Path, ...]
    jumps: tuple[Hop, ...]
    proxy_command: str | None
    known_hosts: tuple[Path, ...]  # the first is where a new one goes
    global_known_hosts: tuple[Path, ...]
    key_name: str | None  # the name under which its key is known
    hash_names: bool
    connect_s: float
    agent: str | None  # path of its socket
    batch: bool

    @property
    def lookup(self) -> str:
        """What the host is called in known_hosts."""
        if self.key_name:
            return self.key_name.lower()
        host = self.host.lower()
        return host if self.port == PORT else f"[{host}]:{self.port}"


class SshConfig:
    """The two files, read once."""

    def __init__(self, user_file: Path | None = None, system_file: Path = SYSTEM) -> None:
        self._home = Path.home()
        text = "\n".join(self._lines(user_file or self._home / ".ssh" / "config", self._home / ".ssh"))
        self._text = text + "\nHost *\n" + "\n".join(self._lines(system_file, SYSTEM.parent)) + "\n"

    def settings(
        self,
        hop: Hop,
        *,
        identity_file: str | None = None,
        proxy_jump: str | None = None,
        agent: str | None = None,
    ) -> Settings:
        """All that holds for a host; what is given goes before what the files say."""
        given = [f"User {hop.user}"] if hop.user else []
        given += [f"Port {hop.port}"] if hop.port else []  # before all else, and what tokens in other values mean
        try:
            if _EXEC.search(self._text):
                _have_match_exec()
            found = paramiko.SSHConfig.from_text("\n".join([*given, self._text])).lookup(hop.host)
        except Exception as error:  # ImportError for `Match exec`, among others
            raise TransportError(f"cannot read what ~/.ssh/config says of {hop.host}: {error}") from error
        user = found.get("user") or account.name()
        host = found.get("hostname") or hop.host
        paths = _Paths(self._home, host, user)
        named = [identity_file] if identity_file else [f for f in found.get("identityfile", []) if f.lower() != "none"]
        only = bool(identity_file) or found.get("identitiesonly", "no").lower() == "yes"
        defaults = [] if named or only else [f"~/.ssh/{name}" for name in _DEFAULT_KEYS]
        jumps = proxy_jump if proxy_jump is not None else found.get("proxyjump", "none")
        command = None if proxy_jump is not None or jumps.lower() != "none" else found.get("proxycommand")
        known = found.get("userknownhostsfile") or "~/.ssh/known_hosts ~/.ssh/known_hosts2"
        known_to_all = found.get("globalknownhostsfile") or "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
        own_agent = found.get("identityagent", "SSH_AUTH_SOCK").strip('"')
        return Settings(
            alias=hop.host,
            host=host,
            port=_number(found, "port", hop.host) or PORT,
            user=user,
            identity_files=tuple(paths.one(name) for name in named or defaults),
            files_named=bool(named),
            identities_only=only,
            certificate_files=tuple(paths.many(found.get("certificatefile", ""))),
            jumps=tuple(_jumps(jumps, hop.host)),
            proxy_command=command,
            known_hosts=tuple(paths.many(known)),
            global_known_hosts=tuple(paths.many(known_to_all)),
            key_name=found.get("hostkeyalias"),
            hash_names=found.get("hashknownhosts", "no").lower() == "yes",
            connect_s=_number(found, "connecttimeout", hop.host) or CONNECT_S,
            agent=agent if own_agent == "SSH_AUTH_SOCK" else _agent(own_agent, paths),
            batch=found.get("batchmode", "no").lower() == "yes",
        )

    def _lines(self, file: Path, base: Path, depth: int = 0) -> Iterator[str]:
        """The lines of a file; those of included ones in their places, after which the block goes on."""
        try:
            lines = file.read_text(errors="surrogateescape").splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise TransportError(f"cannot read {file}: {error.strerror}") from error
        block = "Host *"
        for line in lines:
            word, _, rest = line.strip().replace("=", " ", 1).partition(" ")
            if word.lower() in ("host", "match"):
                block = line
            if word.lower() != "include" or depth >= _DEPTH:
                yield line
                continue
            for pattern in rest.split():
                yield from self._included(pattern.strip('"'), base, depth)
            yield block

    def _included(self, pattern: str, base: Path, depth: int) -> Iterator[str]:
        path = Path(pattern).expanduser()
        top = Path("/") if path.is_absolute() else base
        for file in sorted(top.glob(str(path.relative_to("/")) if path.is_absolute() else pattern)):
            yield from self._lines(file, base, depth + 1)


class _Paths(NamedTuple):
    """How `~` and the tokens in paths are filled in."""

    home: Path
    host: str
    user: str

    def one(self, text: str) -> Path:
        tokens = {"%%": "%", "%d": str(self.home), "%h": self.host, "%r": self.user, "%u": account.name()}
        filled = re.sub("%[%dhru]", lambda token: tokens[token[0]], text.strip('"'))
        return self.home / filled[2:] if filled.startswith("~/") else Path(filled)

    def many(self, text: str) -> list[Path]:
        return [self.one(name) for name in text.split() if name.lower() != "none"]


def _jumps(text: str, host: str) -> Iterator[Hop]:
    if text.lower() == "none" or not text:
        return
    for part in text.split(","):
        try:
            yield Hop.of(part)
        except ValueError as error:
            raise TransportError(f"the ProxyJump of {host}: {error}") from error


def _agent(text: str, paths: _Paths) -> str | None:
    if text.lower() == "none":
        return None
    if text.startswith("$"):
        return os.environ.get(text.strip("${}"))
    return str(paths.one(text))


def _number(found: paramiko.SSHConfigDict, key: str, host: str) -> int | None:
    text = found.get(key)
    if text is None or text.lower() == "none":
        return None
    if not text.isdecimal():
        raise TransportError(f"what ~/.ssh/config says of {host}: {key} must be a number, not {text!r}")
    return int(text)
