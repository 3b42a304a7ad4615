"""systemd's notify protocol, from the worker's side. Light: it is on the path of an engine's start."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from slurmfork.errors import Unreachable

NOTIFY_SOCKET = "NOTIFY_SOCKET"
ENDPOINTS = "X_SLURMFORK_ENDPOINTS"  # an engine's host tells its agent where it listens, separated by blanks


def notify(text: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send lines to the notify socket (systemd's protocol); False where there is none."""
    address = environment.get(NOTIFY_SOCKET)
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.connect(address)
            sender.sendall(text.encode())
        except OSError as error:
            raise Unreachable(f"the agent of this node does not listen: {error}") from None
    return True
