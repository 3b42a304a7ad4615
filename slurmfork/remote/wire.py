"""The wire: paramiko's Transport, and what it lacks.

It waits for nothing without end, asks first for the host keys that are known, takes no other host key when keys are
exchanged again, hears that the other side is gone, and keeps what a server tells of a command's end.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import paramiko
from paramiko.auth_handler import AuthOnlyHandler
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_REQUEST,
    cMSG_GLOBAL_REQUEST,
    cMSG_SERVICE_REQUEST,
    cMSG_USERAUTH_REQUEST,
)
from paramiko.transport import ServiceRequestingTransport

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # or its errors come on stderr, with tracebacks

AUTH_S = 30.0
PULSE_S = 15.0
PULSES = 3  # unanswered ones, after which the other side is taken for gone
_WEAK = {
    "ciphers": ["aes128-cbc", "aes192-cbc", "aes256-cbc", "blowfish-cbc", "3des-cbc"],
    "macs": ["hmac-md5", "hmac-md5-96", "hmac-sha1-96"],
    "keys": ["ssh-rsa", "ssh-dss"],
    "pubkeys": ["ssh-rsa", "ssh-dss"],
    "kex": ["diffie-hellman-group1-sha1", "diffie-hellman-group14-sha1", "diffie-hellman-group-exchange-sha1"],
}
_CERTIFICATE = "-cert-v01@openssh.com"


class Fate:
    """How a channel ended, beyond what paramiko keeps."""

    orderly = False  # the server said so; otherwise the connection was cut
    deaf = False  # the command has closed its input
    signal: str | None = None


_fates: weakref.WeakKeyDictionary[paramiko.Channel, Fate] = weakref.WeakKeyDictionary()


def fate_of(channel: paramiko.Channel) -> Fate:
    """What became of a channel so far."""
    return _fates.setdefault(channel, Fate())


def _request(channel: paramiko.Channel, message: paramiko.Message) -> None:
    rest = paramiko.Message(message.get_remainder())
    kind = rest.get_text()
    if kind == "exit-signal":
        rest.get_boolean()
        fate_of(channel).signal = rest.get_text()
    elif kind == "eow@openssh.com":
        fate_of(channel).deaf = True
    _HANDLERS[MSG_CHANNEL_REQUEST](channel, message)


def _eof(channel: paramiko.Channel, message: paramiko.Message) -> None:
    fate_of(channel).orderly = True
    _HANDLERS[MSG_CHANNEL_EOF](channel, message)


def _close(channel: paramiko.Channel, message: paramiko.Message) -> None:
    fate_of(channel).orderly = True
    _HANDLERS[MSG_CHANNEL_CLOSE](channel, message)


class _AuthHandler(AuthOnlyHandler):
    """paramiko's, but that it takes note of an answer however quickly it comes; and that "none" can be asked."""

    def send_auth_request(self, username: str, method: str, finish_message: Any = None) -> list[str]:
        this: Any = self
        this.auth_method, this.username = method, username
        message = paramiko.Message()
        message.add_byte(cMSG_USERAUTH_REQUEST)
        for text in (username, "ssh-connection", method):
            message.add_string(text)
        if finish_message is not None:
            finish_message(message)
        this.auth_event = event = threading.Event()
        with this.transport.lock:
            this.transport._send_message(message)
        allowed: list[str] = this.wait_for_response(event)
        return allowed


_HANDLERS: dict[int, Any] = ServiceRequestingTransport._channel_handler_table  # type: ignore[attr-defined]


class Wire(ServiceRequestingTransport):
    """A connection to an SSH server. ``first``: host key algorithms to ask for before all others."""

    _channel_handler_table = {  # noqa: RUF012 (paramiko's)
        **_HANDLERS,
        MSG_CHANNEL_REQUEST: _request,
        MSG_CHANNEL_EOF: _eof,
        MSG_CHANNEL_CLOSE: _close,
    }

    def __init__(self, sock: Any, *, first: Sequence[str] = (), certificates: bool = False) -> None:
        self._first = list(first)
        self._certificates = certificates
        self._accepted = threading.Event()
        self._unanswered = 0
        self._pinned: bytes | None = None
        super().__init__(sock, disabled_algorithms=_WEAK)
        self.auth_timeout = AUTH_S

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """Host key algorithms in the order of our preference."""
        all_of_them = super().preferred_keys
        plain = [name for name in all_of_them if not name.endswith(_CERTIFICATE)]
        plain.sort(key=lambda name: name not in self._first)
        certified = [name for name in all_of_them if name.endswith(_CERTIFICATE)] if self._certificates else []
        return (*certified, *plain)

    def shake_hands(self, timeout: float) -> None:
        """Agree on keys. Raises TimeoutError, and what paramiko raises."""
        done = threading.Event()
        self.banner_timeout = self.handshake_timeout = timeout
        self.start_client(event=done)
        in_time = done.wait(timeout)
        if self.is_active() and self.initial_kex_done:
            return
        error = self.get_exception()
        if in_time and error is not None:
            raise error
        raise EOFError if in_time else TimeoutError

    def keep_alive(self, every: float = PULSE_S) -> None:
        """From now on ask the server, when nothing was sent for ``every`` seconds, whether it is there."""
        this = weakref.ref(self)

        def pulse() -> None:
            wire = this()
            if wire is not None:
                wire._pulse()

        self.packetizer.set_keepalive(every, pulse)

    def _pulse(self) -> None:
        if self._unanswered >= PULSES:
            raise EOFError  # in the thread that reads: it ends the connection
        if self.in_kex:
            return
        self._unanswered += 1
        message = paramiko.Message()
        message.add_byte(cMSG_GLOBAL_REQUEST)
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        self._send_user_message(message)  # type: ignore[attr-defined]

    # --- what paramiko calls

    def _parse_request_success(self, m: paramiko.Message) -> None:
        self._unanswered = 0
        super()._parse_request_success(m)  # type: ignore[misc]

    def _parse_request_failure(self, m: paramiko.Message) -> None:
        self._unanswered = 0
        super()._parse_request_failure(m)  # type: ignore[misc]

    def _verify_key(self, host_key: bytes, sig: bytes) -> None:
        super()._verify_key(host_key, sig)  # type: ignore[misc]
        if self._pinned not in (None, host_key):
            raise paramiko.SSHException("the host key changed within the connection")
        self._pinned = host_key

    def _parse_service_accept(self, m: paramiko.Message) -> None:
        super()._parse_service_accept(m)  # type: ignore[misc]
        self._accepted.set()

    def ensure_session(self) -> None:
        """Ask for the right to log in; paramiko's own waits for the answer for ever."""
        if not self.is_active():
            raise EOFError
        if self.auth_handler is not None:
            return
        message = paramiko.Message()
        message.add_byte(cMSG_SERVICE_REQUEST)
        message.add_string("ssh-userauth")
        self._send_message(message)  # type: ignore[attr-defined]
        waited = 0.0
        while not self._accepted.wait(0.1):
            waited += 0.1
            if not self.is_active():
                raise EOFError
            if waited > AUTH_S:
                raise TimeoutError
        self.auth_handler = self.get_auth_handler()

    def get_auth_handler(self) -> AuthOnlyHandler:
        return _AuthHandler(self)
