"""What is done on nodes, and to them: commands run there, power, network, clock."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mini.clients import client_env, command, daemon_env
from mini.inside import way_in
from mini.kernels import address, boot, forget_connection, members, on_node, reach, tap
from mini.processes import command_line, end, executable, look
from mini.sites import site_environment
from mini.store import load, lock_of, locked, save
from mini.words import Cluster, Failed, Process, Record

DEEDS = ("kill", "start", "freeze", "thaw", "cut", "join", "clock", "fill-tmp")


def there(cluster: Cluster) -> Record:
    record = load(cluster)
    if not record or not record.keeper or look(record.keeper.pid) != record.keeper:
        raise Failed(f"{cluster.name} is not up; first: {Path(sys.argv[0]).name} up --name {cluster.name}")
    return record


def need_node(cluster: Cluster, record: Record, name: str) -> None:
    if not record.shape.kernels:
        raise Failed(
            f"the nodes of {cluster.name} share this machine; `up --kernels` gives each a kernel of its own", 2
        )
    if name not in members(cluster, record.shape):
        raise Failed(f"{name}: no such node; there are {', '.join(members(cluster, record.shape))}", 2)


def execute(cluster: Cluster, name: str | None, user: str | None, argv: list[str]) -> None:
    """Becomes the command: on the login node, or on one of the others."""
    record = there(cluster)
    if user and record.shape.kernels:
        raise Failed("--user: on kernels of their own all files of /shared are root's, and so is all work", 2)
    if user:
        argv = ["runuser", "-u", user, "--", *argv]
    if name:
        need_node(cluster, record, name)
    sys.stdout.flush()
    environment = {**client_env(cluster), **site_environment(record.shape)}
    if record.shape.kernels:
        line, environment = reach(cluster, record.keeper, name or "login", argv), daemon_env(cluster)
    elif record.shape.rooted:
        line = [*way_in(cluster, record), os.getcwd(), *argv]
    else:
        line = argv
    try:
        os.execvpe(line[0], line, environment)
    except OSError as error:
        raise Failed(f"{line[0]}: {error.strerror}", 127) from None


def node(cluster: Cluster, name: str, deed: str, seconds: int | None) -> None:
    """Does one of DEEDS."""
    with locked(lock_of(cluster)):
        record = there(cluster)
        need_node(cluster, record, name)
        if (seconds is None) == (deed == "clock"):
            raise Failed("clock takes a number of seconds, and nothing else does", 2)
        kernel = record.daemons.get(name)
        if kernel and look(kernel.pid) != kernel:
            kernel = None
        if deed == "start":
            start(cluster, record, name, kernel)
        elif not kernel:
            raise Failed(f"{name} has no power; `node {name} start` gives it some")
        elif deed == "kill":
            cut_power(cluster, record, name, kernel)
        elif deed in ("freeze", "thaw"):
            os.kill(kernel.pid, signal.SIGSTOP if deed == "freeze" else signal.SIGCONT)
        elif deed in ("cut", "join"):
            pass_packets(cluster, record, name, passing=deed == "join")
        elif deed == "clock":
            on_node(cluster, record, name, "sh", "-c", f"date -s @$(($(date +%s) + {seconds}))")
        else:
            fill_tmp(cluster, record, name)


def start(cluster: Cluster, record: Record, name: str, kernel: Process | None) -> None:
    if kernel:
        raise Failed(f"{name} has power already")
    assert record.keeper
    spaces = [f"--mount=/proc/{record.keeper.pid}/ns/mnt", f"--net=/proc/{record.keeper.pid}/ns/net"]
    child = boot(cluster, name, record.shape.gpus, ["nsenter", *spaces, "--"])
    child.returncode = 0  # it stays when this command has ended
    if process := look(child.pid):
        record.daemons[name] = process
        save(cluster, record)


def cut_power(cluster: Cluster, record: Record, name: str, kernel: Process) -> None:
    """The kernel, and the processes that it has its address spaces in."""
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    those = [look(pid) for pid in pids if is_of(cluster, name, pid)]
    forget_connection(cluster, name)
    end([kernel, *(one for one in those if one and one != kernel)], signal.SIGKILL, 10)
    record.daemons.pop(name)
    save(cluster, record)


def is_of(cluster: Cluster, name: str, pid: int) -> bool:
    words = command_line(pid) if executable(pid).startswith("linux") else []
    return f"bed={cluster.home}" in words and f"node={name}" in words


def pass_packets(cluster: Cluster, record: Record, name: str, *, passing: bool) -> None:
    """From it and to it, or none, without a word to who sent them, as when a cable is pulled; we still reach it."""
    assert record.keeper
    others = [other for other in members(cluster, record.shape) if other != name]
    rules = [["iif", tap(name)], *(["iif", tap(other), "to", address(name)] for other in others)]
    inside = ["nsenter", f"--net=/proc/{record.keeper.pid}/ns/net", "--", "ip", "rule"]
    known = command(*inside, "show", env=dict(os.environ))
    for rule in rules:
        is_there = any(line.split()[1:] == rule_shown(rule) for line in known.splitlines())
        if is_there == passing:
            command(*inside, "del" if passing else "add", "pref", "10", *rule, "blackhole", env=dict(os.environ))


def rule_shown(rule: list[str]) -> list[str]:
    """As `ip rule` prints it."""
    source, destination = rule[1], rule[3] if len(rule) > 2 else ""
    return ["from", "all", *(["to", destination] if destination else []), "iif", source, "blackhole"]


def fill_tmp(cluster: Cluster, record: Record, name: str) -> None:
    """Until not one byte more goes there."""
    on_node(cluster, record, name, "sh", "-c", "cat /dev/zero >/tmp/full 2>/dev/null; ! echo 1 2>/dev/null >/tmp/more")
