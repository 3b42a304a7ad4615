"""Silence: a machine that is gone sends nothing any more; the kernel is to find out in seconds, not hours."""

from __future__ import annotations

import socket


def notice(raw: socket.socket, seconds: int) -> None:
    """Have a TCP connection end when the other side has been silent, or deaf, for so long."""
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds // 2)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds // 4)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
