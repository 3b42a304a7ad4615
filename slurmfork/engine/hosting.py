"""What a host is told by its agent, in one environment variable: whose it is, where it listens, what it hosts."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct, field

VARIABLE = "SLURMFORK_ENGINE"
SOCKET = "engine.sock"  # in the worker's own directory on the node
UNIX, TLS = "unix:", "tls://"


class Hosting(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``path`` is ``package.module:Class``, called with ``args`` and ``kwargs``; ``stop`` the signal that ends it,
    ``checkpoint`` the one that says that the run is about to end (None: none does).

    ``address`` is the node's own, of which it takes a TCP port. ``pickle``: whether callers may send pickled values.
    """

    worker: str
    run_id: str
    run_dir: str
    socket: str
    address: str
    path: str
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    pickle: bool = False
    stop: str = "TERM"
    checkpoint: str | None = None


def encode(hosting: Hosting) -> str:
    """As it stands in the environment."""
    return msgspec.json.encode(hosting).decode()


def decode(text: str) -> Hosting:
    """Read it back; raises msgspec.ValidationError."""
    return msgspec.json.decode(text, type=Hosting)
