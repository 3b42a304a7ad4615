"""Processes that are hard to end: ``python -I -S awkward.py KIND DIR NAME`` becomes one of them.

It announces itself in ``DIR/NAME.pid`` (PID and start time) and stays. Tests start them through
``processes.py``; this file starts without site-packages, so that fifty of them are quick.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

LIFETIME = 300  # seconds; what a broken test forgets ends by itself


def announce(directory: str, name: str) -> None:
    """Tell who this process is to whoever watches the directory."""
    signal.alarm(LIFETIME)
    with open("/proc/self/stat") as stat:
        start_time = stat.read().rpartition(")")[2].split()[19]
    path = os.path.join(directory, f"{name}.pid")
    with open(f"{path}.{os.getpid()}", "w") as file:
        file.write(f"{os.getpid()} {start_time}")
    os.rename(f"{path}.{os.getpid()}", path)


def stay() -> None:
    while True:
        signal.pause()


def plain(directory: str, name: str) -> None:
    announce(directory, name)
    stay()


def ignores_term(directory: str, name: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    announce(directory, name)
    stay()


def graceful(directory: str, name: str) -> None:
    """Says good bye in NAME.bye when it is asked to stop."""

    def leave(*_: object) -> None:
        with open(os.path.join(directory, f"{name}.bye"), "w"):
            os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    announce(directory, name)
    stay()


def daemonize() -> None:
    """Fork twice, with a session in between; returns in the daemon only."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)


def daemon(directory: str, name: str) -> None:
    daemonize()
    plain(directory, name)


def scrubbed(directory: str, name: str) -> None:
    """A daemon that carries no environment at all, and so no tag."""
    daemonize()
    os.execve(sys.executable, [sys.executable, "-I", "-S", __file__, "plain", directory, name], {})


def stopped(directory: str, name: str) -> None:
    announce(directory, name)
    os.kill(os.getpid(), signal.SIGSTOP)
    stay()


def forks(directory: str, name: str) -> None:
    """Fifty children, half of them in sessions of their own, announced as NAME-0, NAME-1 ..."""
    for number in range(50):
        if os.fork() == 0:
            if number % 2:
                os.setsid()
            plain(directory, f"{name}-{number}")
    plain(directory, name)


def hops(directory: str, name: str) -> None:
    """Never the same process for long: each forks the next one and leaves."""
    announce(directory, name)
    end = time.monotonic() + LIFETIME
    while time.monotonic() < end:
        time.sleep(0.001)
        if os.fork():
            os._exit(0)


def breeds(directory: str, name: str) -> None:
    """Answers SIGTERM with a new child that ignores it."""

    def breed(*_: object) -> None:
        if os.fork() == 0:
            ignores_term(directory, f"{name}-child")

    signal.signal(signal.SIGTERM, breed)
    announce(directory, name)
    stay()


def headless(directory: str, name: str) -> None:
    """Its first thread ends, so that it looks like a zombie; another one lives on."""
    import ctypes

    threading.Thread(target=time.sleep, args=(LIFETIME,)).start()
    announce(directory, name)
    ctypes.CDLL(None).pthread_exit(None)


KINDS = {
    "plain": plain,
    "ignores-term": ignores_term,
    "graceful": graceful,
    "daemon": daemon,
    "scrubbed": scrubbed,
    "stopped": stopped,
    "forks": forks,
    "hops": hops,
    "breeds": breeds,
    "headless": headless,
}

if __name__ == "__main__":
    KINDS[sys.argv[1]](sys.argv[2], sys.argv[3])
    sys.exit(0)
