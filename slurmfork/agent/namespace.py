"""A PID namespace for all that an agent starts, and its init: when that ends, the kernel ends everything in it.

The agent stays outside, and so do the PIDs that it sees; only what its starter's thread starts is born inside, where
/proc shows the inside alone. init is a fork of the agent as it begins, without an exec: it reaps, hears the agent's
death, and ends all. Made while the agent has one thread. Standard library only: it is on every node's critical path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from slurmfork import prctl
from slurmfork.agent.outside import Outside
from slurmfork.process import Identity, identify, send

NAME = "slurmfork-init"
_NEWNS, _NEWUSER, _NEWPID, _FS = 0x20000, 0x10000000, 0x20000000, 0x200
_NOSUID, _NODEV, _NOEXEC, _REC, _SLAVE = 2, 4, 8, 1 << 14, 1 << 19
_PR_CAPBSET_DROP, _LAST_CAPABILITY = 24, 63
_HEARD = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE}
_FIRST_LOOK_S, _LONGEST_PAUSE_S = 0.002, 0.02
_DONE = b"done"
_MESSAGE = 1024


class Unavailable(Exception):
    """This node gives no namespace; the message says why, and names the setting where one is to blame."""


class Namespace:
    """A namespace with an init in it, a child of this process.

    ``outside`` is there where this process is in a user namespace of its own now. ``killed``: by this process.
    """

    def __init__(self, init: int, lifeline: int) -> None:
        found = identify(init)
        assert found is not None  # nobody has reaped it yet
        self.init: Identity = found
        self.outside: Outside | None = None
        self.killed = False
        self._lifeline = lifeline
        self._confined = not _mapped_whole()
        self.proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # the outside's; nobody inherits it
        self._mounts = os.open(f"/proc/{init}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self._pids = os.open(f"/proc/{init}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def enter(self) -> None:
        """Have all that this thread starts be born inside; its own PID stays outside. Raises OSError.

        It can make no threads any more.
        """
        _call("unshare", ctypes.c_int(_FS))  # a mount namespace is a thread's own only where its directory is
        _call("setns", ctypes.c_int(self._mounts), ctypes.c_int(_NEWNS))
        _call("setns", ctypes.c_int(self._pids), ctypes.c_int(_NEWPID))
        if self._confined:  # what root may in a user namespace of its own must not undo the mount of /proc
            for capability in range(_LAST_CAPABILITY + 1):
                with suppress(OSError):
                    _call("prctl", *map(ctypes.c_ulong, (_PR_CAPBSET_DROP, capability, 0, 0, 0)))

    @property
    def keepers(self) -> frozenset[int]:
        """PIDs of the children of this process that are part of the machinery."""
        return frozenset({self.init.pid} | ({self.outside.pid} if self.outside else set()))

    def kill(self) -> None:
        """Have the kernel end all that is inside. It is over when init is gone, once the workers have been reaped."""
        self.killed = True
        send(self.init, signal.SIGKILL)

    def end(self, patience: float = 2.0) -> bool:
        """End init, and with it all that is inside; whether it was over in time. Reaps every child."""
        if self.outside is not None:
            self.outside.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.kill()
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.001)
            except ChildProcessError:
                return True
        return False


def create(*, grace: float, guardian: int) -> Namespace:
    """Make one, for the children of the thread that calls its ``enter``; raises Unavailable, and changes nothing then.

    On the agent's death its processes get SIGTERM and ``grace`` seconds. ``guardian``: a pipe whose other end only the
    guardian holds. While that lives it is the one to ask them, so that they are asked once.
    """
    prctl.become_subreaper()  # init is made by a child that leaves
    if os.geteuid() == 0:
        try:
            return _build(grace, guardian)
        except Unavailable as refusal:
            if "(EPERM)" not in str(refusal):  # a root that may not, as in many a container
                raise
    _try_it(grace, guardian)  # what this process becomes by it, it stays
    outside = Outside(close=[guardian])
    _unshare_user()
    made = _build(grace, guardian)
    made.outside = outside
    return made


def refusal() -> str:
    """Why there is none to be had here, found by making one in a child; empty where there is."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        _in_child(lambda: str(create(grace=0.0, guardian=reader).end()))
    except Unavailable as reason:
        return str(reason)
    finally:
        os.close(reader)
        os.close(writer)
    return ""


def _try_it(grace: float, guardian: int) -> None:
    """Make the whole of it in a child of its own, which leaves with it."""

    def work() -> None:
        prctl.become_subreaper()
        _unshare_user()
        _build(grace, guardian).end()

    _in_child(work)


def _in_child(work: Callable[[], str | None]) -> str:
    """Do something in a fork of this process; what it returns. Raises what it raises, as Unavailable."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, b"+" + (work() or "").encode())
        except BaseException as error:
            os.write(writer, b"-" + str(error).encode()[: _MESSAGE - 1])
        os._exit(0)
    os.close(writer)
    text = os.read(reader, _MESSAGE).decode()  # not until its end: who the child started may hold the pipe too
    os.close(reader)
    os.waitpid(child, 0)
    if not text.startswith("+"):
        raise Unavailable(text[1:] or "the process that was to make the namespace died")
    return text[1:]


def _build(grace: float, guardian: int) -> Namespace:
    """Unshare in a child, which makes init and leaves: this process may go on making threads.

    init then falls to this process, which is a subreaper.
    """
    go, lifeline = os.pipe2(os.O_CLOEXEC)
    told, tell = os.pipe2(os.O_CLOEXEC)

    def work() -> str:
        _step("unshare", ctypes.c_int(_NEWPID | _NEWNS))
        # What is mounted outside later, by an automounter mostly, shows inside too; not the other way round.
        _step("mount", b"none", b"/", None, ctypes.c_ulong(_REC | _SLAVE), None)
        init = os.fork()
        if init == 0:
            os.close(lifeline)  # so that it is the agent's alone, once this child has left
            _be_init(go, tell, grace, guardian)
        return str(init)

    try:
        init = int(_in_child(work))
        os.close(tell)
        os.write(lifeline, b"!")  # its parent is this process now
        words = os.read(told, _MESSAGE).decode()
        if words != _DONE.decode():
            os.waitpid(init, 0)
            raise Unavailable(words or "the namespace's init died")
        return Namespace(init, lifeline)
    except BaseException:
        os.close(lifeline)
        raise
    finally:
        os.close(go)
        os.close(told)


def _unshare_user() -> None:
    uid, gid = os.geteuid(), os.getegid()
    _step("unshare", ctypes.c_int(_NEWUSER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            raise Unavailable(_why(f"write to /proc/self/{name}", error)) from None


def _mapped_whole() -> bool:
    """Whether this is the user namespace in which every user is himself."""
    with open("/proc/self/uid_map") as file:
        return file.read().split() == ["0", "0", "4294967295"]


# --- init --------------------------------------------------------------------------------------------------


def _be_init(go: int, tell: int, grace: float, guardian: int) -> NoReturn:
    """Be the namespace's init; never returns. What is outside of it has PIDs that mean nothing here."""
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        prctl.rename(NAME)
        try:
            _step("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(_NOSUID | _NODEV | _NOEXEC), None)
        except Unavailable as refusal:
            os.read(go, 1)
            os.write(tell, str(refusal).encode()[:_MESSAGE])
            os._exit(1)
        os.chdir("/")
        if not os.read(go, 1):
            os._exit(1)
        prctl.signal_at_parents_death(signal.SIGTERM)
        os.write(tell, _DONE)
        _keep_only(go, guardian)
        if not _hung_up(go):  # it died before we asked to be told
            _wait_for_the_end()
        _end_all(grace, guardian)
    finally:
        os._exit(0)


def _keep_only(*wanted: int) -> None:
    nowhere = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    first = 3
    for number in sorted(wanted):
        os.closerange(first, number)
        first = number + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX") if sys.version_info < (3, 11) else 1 << 20)


def _wait_for_the_end() -> None:
    while signal.sigwaitinfo(_HEARD).si_signo != signal.SIGTERM:
        _reap()


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _end_all(grace: float, guardian: int) -> None:
    """Ask everything here to end, unless the guardian does; wait for that, but no longer than the grace."""
    deadline = time.monotonic() + grace
    asked, pause = False, _FIRST_LOOK_S
    while (rest := deadline - time.monotonic()) > 0:
        if not asked and _hung_up(guardian):
            asked = True
            for number in (signal.SIGTERM, signal.SIGCONT):
                with suppress(ProcessLookupError):
                    os.kill(-1, number)
        _reap()
        if _alone():
            return
        signal.sigtimedwait({signal.SIGCHLD}, min(pause, rest))
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)


def _hung_up(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _alone() -> bool:
    """Whether nothing here runs any more; who waits to be reaped by a parent outside does not."""
    for name in os.listdir("/proc"):  # noqa: PTH208 (light)
        if name.isdigit() and name != "1":
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
                if fields[0] not in b"ZX" or int(fields[17]) > 1:
                    return False
    return True


# --- the kernel, and why it refuses ------------------------------------------------------------------------


def _call(function: str, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _step(function: str, *arguments: object) -> None:
    """A call that a node may refuse; raises Unavailable."""
    try:
        _call(function, *arguments)
    except OSError as error:
        flags = getattr(arguments[0], "value", 0)
        what = "mount of /proc" if arguments[0] == b"proc" else function
        if function == "unshare":
            kinds = (("user", _NEWUSER), ("PID", _NEWPID), ("mount", _NEWNS))
            what = f"unshare of a {' and a '.join(kind for kind, flag in kinds if flags & flag)} namespace"
        raise Unavailable(_why(what, error)) from None


def _why(what: str, error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    blame = _blame(what, error.errno or 0)
    return f"{what} was refused ({name})" + (f": {blame}" if blame else "")


def _blame(what: str, code: int) -> str:
    """The setting that is likely behind a refusal; empty where none is known."""
    if code in (errno.ENOSPC, errno.EUSERS):
        kinds = ("user",) if "user" in what else ("pid", "mnt")
        limits = [f"user.max_{kind}_namespaces is {_setting(f'user/max_{kind}_namespaces')}" for kind in kinds]
        return " and ".join(limits)
    if _setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return "kernel.apparmor_restrict_unprivileged_userns is 1"
    if _setting("kernel/unprivileged_userns_clone") == "0":
        return "kernel.unprivileged_userns_clone is 0"
    if "mount of /proc" in what and (masks := _masks()):
        return f"a masked /proc, as containers have it ({', '.join(masks[:3])} is mounted over)"
    if code == errno.EPERM and _filtered():
        return "a seccomp filter, as containers have it"
    if code == errno.EINVAL:
        return "this kernel was built without such namespaces"
    return ""


def _setting(path: str) -> str:
    try:
        with open(f"/proc/sys/{path}") as file:
            return file.read().strip()
    except OSError:
        return ""


def _masks() -> list[str]:
    try:
        with open("/proc/self/mountinfo") as file:
            return [place for line in file if (place := line.split()[4]).startswith("/proc/")]
    except OSError:
        return []


def _filtered() -> bool:
    try:
        with open("/proc/self/status") as file:
            return any(line.split() == ["Seccomp:", "2"] for line in file)
    except OSError:
        return False
