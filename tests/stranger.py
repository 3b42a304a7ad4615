"""Another user of the same machine: becomes one, tries what it is told, and prints what came of it as JSON.

``python stranger.py TRY ARGUMENT...``, as root. All that it needs is loaded first: afterwards the files of this very
Python may be out of its reach.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 (sockets load it late)
import errno
import json
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

UID = 64_999  # nobody's on any machine, so that nothing of anybody's is in the way


def become() -> None:
    os.setgroups([])
    os.setgid(UID)
    os.setuid(UID)


def read(*paths: str) -> dict[str, str]:
    """What opening each of these for reading, or listing it, gives: the error's name, or how much there is."""
    found = {}
    for path in paths:
        try:
            found[path] = f"{len(os.listdir(path))} entries" if os.path.isdir(path) else f"{len(_bytes(path))} bytes"
        except OSError as error:
            found[path] = errno.errorcode[error.errno or 0]
    return found


def _bytes(path: str) -> bytes:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read()


def write(*paths: str) -> dict[str, str]:
    """What opening each of these for writing, or making a file in it, gives."""
    found = {}
    for path in paths:
        target = f"{path}/planted" if os.path.isdir(path) else path
        try:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK))
            found[path] = "written"
        except OSError as error:
            found[path] = errno.errorcode[error.errno or 0]
    return found


def door(path: str) -> str:
    """What connecting to a Unix socket gives."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        try:
            client.connect(path)
            client.sendall(b"GET /v1/health HTTP/1.0\r\n\r\n")
            return client.recv(100).decode()
        except OSError as error:
            return errno.errorcode[error.errno or 0]


def head(address: str, port: str, name: str, *certificate: str) -> str:
    """What a request to the head gives, without a certificate or with one of its own making."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for file in certificate:
        context.load_cert_chain(file)
    become()
    try:
        with (
            socket.create_connection((address, int(port)), 30) as raw,
            context.wrap_socket(raw, server_hostname=name) as tls,
        ):
            tls.sendall(b"GET /v1/health HTTP/1.0\r\n\r\n")
            return tls.recv(100).decode() or "hung up"
    except (ssl.SSLError, ConnectionError):
        return "hung up"


def spy() -> list[str]:
    """Command lines and environments of all processes, as far as they can be read."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                found.append((entry / name).read_bytes().decode(errors="replace"))
            except OSError:
                continue
    return found


def ask(what: str, *arguments: str) -> Any:
    """Try something as that user; for tests to call."""
    argv = [sys.executable, "-I", __file__, what, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    tried = {"read": read, "write": write, "door": door, "head": head, "spy": spy}[sys.argv[1]]
    if tried is not head:  # which has a file to read first
        become()
    print(json.dumps(tried(*sys.argv[2:])))
