"""Whether a host is this machine: by its name, or because its address is one of ours."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from slurmfork import account
from slurmfork.remote.lean import lean


def is_this_machine(host: str, user: str | None) -> bool:
    """Whether ``ssh host`` would lead to this user on this machine, whatever ~/.ssh/config calls it."""
    if not (Path.home() / ".ssh" / "config").exists():
        return user in (None, account.name()) and _is_ours(host)
    with lean():
        from slurmfork.remote.sshconfig import PORT, Hop, SshConfig

    settings = SshConfig().settings(Hop(host, user))
    straight = settings.port == PORT and not settings.jumps and settings.proxy_command is None
    return straight and settings.user == account.name() and _is_ours(settings.host)


def _is_ours(host: str) -> bool:
    """An address is ours if we can bind to it."""
    if host.lower() in ("localhost", socket.gethostname().lower()):
        return True
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, _, _, address in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    continue
                return False
            return True
    return False
