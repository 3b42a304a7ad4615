"""What the workers of a trial run: ``python -I -S worker.py KIND PLACE NAME [SECONDS]`` is one of several kinds.

Each process of it, forked ones too, maps the file PLACE/mark, which no closing of descriptors and no change of title
or environment undoes, and announces itself by a line in PLACE/announced. What a broken trial forgets ends by itself.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable

LIFETIME = 300
PR_SET_NAME = 15
CHILDREN = 1000
PER_SECOND, BREEDING_S = 50, 6
CGROUPS = "/sys/fs/cgroup"
BOMB, USERS = 300, 4000

place, name, lifetime = "", "", LIFETIME
_marks: list[mmap.mmap] = []


def announce(role: str = "child") -> None:
    """Be known to the checker: PID, start time, the PID namespace that these hold in, leader or child, worker."""
    signal.alarm(lifetime)
    if not _marks:  # forked children have inherited it
        descriptor = os.open(f"{place}/mark", os.O_RDONLY)
        _marks.append(mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ))
        os.close(descriptor)
    with open("/proc/self/stat") as stat:
        start_time = stat.read().rpartition(")")[2].split()[19]
    descriptor = os.open(f"{place}/announced", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    space = os.stat("/proc/self/ns/pid").st_ino
    os.write(descriptor, f"{os.getpid()} {start_time} {space} {role} {name}\n".encode())
    os.close(descriptor)


def say_ready() -> None:
    """Whatever readiness was asked for: a notification, and a listener on the first port."""
    if ports := os.environ.get("SLURMFORK_PORTS"):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", int(ports.split(",")[0])))
        listener.listen()
        _kept.append(listener)
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"READY=1", path)


_kept: list[socket.socket] = []


def stay() -> None:
    say_ready()
    while True:
        signal.pause()


def pause_forever() -> None:
    while True:
        signal.pause()


def daemonize() -> bool:
    """Fork twice, with a session in between; True in the daemon."""
    if (first := os.fork()) != 0:
        os.waitpid(first, 0)
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    return True


def deafen() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


# --- kinds


def plain() -> None:
    stay()


def graceful() -> None:
    """Takes a moment to end in its own way."""

    def leave(*_: object) -> None:
        time.sleep(0.1)
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    stay()


def stubborn() -> None:
    deafen()
    stay()


def stopped() -> None:
    say_ready()
    os.kill(os.getpid(), signal.SIGSTOP)
    pause_forever()


def begin_daemon() -> None:
    if daemonize():
        announce()
        pause_forever()


def begin_hidden() -> None:
    """A daemon that holds no descriptor, is nowhere, is called like a kernel thread, and heeds no SIGTERM."""
    if daemonize():
        announce()
        deafen()
        os.chdir("/")
        os.closerange(0, 4096)
        retitle(b"[kworker/u8:3-events]")
        pause_forever()


def retitle(title: bytes) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, ctypes.c_char_p(title[1:16]), 0, 0, 0)
    with open("/proc/self/stat") as stat:
        begin, end = map(int, stat.read().rpartition(")")[2].split()[45:47])
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(begin)
        memory.write(title[: end - begin].ljust(end - begin, b"\0"))


def begin_scrubbed() -> None:
    """A daemon that is started as by ``env -i``: no environment, and so no tag."""
    if daemonize():
        os.execve(sys.executable, [sys.executable, "-I", "-S", __file__, "rest", place, name], {})


def daemon() -> None:
    begin_daemon()
    stay()


def hidden() -> None:
    begin_hidden()
    stay()


def scrubbed() -> None:
    begin_scrubbed()
    stay()


def rest() -> None:
    pause_forever()


def breeder() -> None:
    """Starts fifty processes a second for a while, half of them in sessions of their own."""
    say_ready()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for number in range(PER_SECOND * BREEDING_S):
        if os.fork() == 0:
            if number % 2:
                os.setsid()
            announce()
            pause_forever()
        time.sleep(1 / PER_SECOND)
    pause_forever()


def thousand() -> None:
    for _ in range(CHILDREN):
        if os.fork() == 0:
            announce()
            pause_forever()
    stay()


def loader() -> None:
    """A rank with loaders, as PyTorch's: they fill a pipe that nobody reads, whose other end they hold, too."""
    reader, writer = os.pipe()
    for _ in range(4):
        if os.fork() == 0:
            announce()
            while True:
                os.write(writer, bytes(65536))
    assert reader  # stays open in all of them
    stay()


def escaped() -> None:
    """Leaves the control groups that Slurm put it into, where it may, with a daemon of its own."""
    hierarchies = sorted(os.listdir(CGROUPS)) if os.path.isdir(CGROUPS) else []
    for group in [CGROUPS, *(f"{CGROUPS}/{hierarchy}" for hierarchy in hierarchies)]:
        try:
            with open(f"{group}/cgroup.procs", "w") as file:
                file.write(str(os.getpid()))
        except OSError:
            continue
    daemon()


def bomb() -> None:
    """A fork bomb whose every process is in a session of its own and heeds no SIGTERM.

    RLIMIT_NPROC bounds it, which holds for everybody but root: there it becomes another user, whom nobody else is.
    """
    say_ready()
    deafen()
    resource.setrlimit(resource.RLIMIT_NPROC, (BOMB, BOMB))
    if os.geteuid() == 0:
        user = 61_000 + time.monotonic_ns() // 1000 % USERS
        os.setresuid(user, user, user)
    while True:
        try:
            if os.fork() == 0:
                signal.alarm(lifetime)
                os.setsid()
        except OSError:
            time.sleep(0.1)


def fails() -> None:
    say_ready()
    time.sleep(0.3)
    os._exit(3)


def leaves() -> None:
    """Ends well at once, and leaves a daemon behind."""
    if daemonize():
        announce()
        pause_forever()
    say_ready()
    os._exit(0)


KINDS: dict[str, Callable[[], None]] = {
    "plain": plain,
    "graceful": graceful,
    "stubborn": stubborn,
    "stopped": stopped,
    "daemon": daemon,
    "hidden": hidden,
    "scrubbed": scrubbed,
    "rest": rest,
    "breeder": breeder,
    "thousand": thousand,
    "loader": loader,
    "escaped": escaped,
    "bomb": bomb,
    "fails": fails,
    "leaves": leaves,
}

if __name__ == "__main__":
    kind, place, name = sys.argv[1:4]
    lifetime = int(sys.argv[4]) if len(sys.argv) > 4 else LIFETIME
    announce("child" if kind == "rest" else "leader")
    KINDS[kind]()
