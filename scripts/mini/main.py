"""The command line."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace

from mini.down import down
from mini.keeper import keep
from mini.nodes import DEEDS, execute, node
from mini.releases import RELEASES, own
from mini.report import print_env, status
from mini.sites import SITES
from mini.store import find
from mini.up import up
from mini.words import Failed, Shape

SHELLS = ("bash", "csh", "fish")
TRACKERS = ("linuxproc", "pgid", "cgroup")
KERNELS_RELEASE = "24.11"  # where the machine has none of its own


def between(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a number from {low} to {high}")
        return int(text)

    return number


def setting(text: str) -> str:
    if not re.fullmatch(r"\w+ *=[^\n]+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be KEY=VALUE, on one line")
    return text


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="minicluster", description="a real Slurm on this one machine")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    known = {
        "up": "start a cluster, and return when all its nodes are idle",
        "down": "end its jobs and daemons, and remove its directory",
        "status": "say how its daemons and nodes are",
        "env": 'print what a shell needs: eval "$(minicluster env)"',
        "exec": "run a command on its login node, or on a node that is a kernel of its own",
        "node": "do to a node that is a kernel of its own what life does to nodes",
    }
    verb = {name: verbs.add_parser(name, help=text, description=text) for name, text in known.items()}
    verb["keep"] = verbs.add_parser("keep")  # not for people: the parent of the daemons
    for each in verb.values():
        each.add_argument("--name", default="default", help="which cluster (default: %(default)s)")
    verb["status"].add_argument("--json", action="store_true", help="one JSON document")
    shape_options(verb["up"])
    verb["exec"].add_argument("--node", help="a node in place of the login node; with --kernels")
    verb["exec"].add_argument("--user", help="as this user in place of root; without --kernels")
    verb["exec"].add_argument("command", nargs="+", metavar="COMMAND", help="after --, with its arguments")
    verb["node"].add_argument("node", help="n1, n2, ... or login")
    verb["node"].add_argument(
        "deed",
        choices=DEEDS,
        help="kill: without power; start: with it again; cut, join: off "
        "and on the network of the nodes; freeze, thaw; clock: set it off by SECONDS; fill-tmp",
    )
    verb["node"].add_argument("seconds", nargs="?", type=int, help="for clock: how far it is to go on; may be below 0")
    return top


def shape_options(up_parser: argparse.ArgumentParser) -> None:
    add = up_parser.add_argument
    add("--nodes", type=between(1, 250), metavar="N", help="how many nodes (default: 4, or 2 with --kernels)")
    add("--gpus", type=between(0, 64), default=8, metavar="G", help="GPUs per node (default: %(default)s)")
    add("--cpus", type=between(1, 1024), default=64, metavar="C", help="CPUs per node (default: %(default)s)")
    add(
        "--proctrack",
        choices=TRACKERS,
        help="how Slurm knows a job's processes (default: linuxproc, or cgroup with --kernels)",
    )
    add("--slurm", choices=list(RELEASES), help="which release (default: this machine's own)")
    add("--kernels", action="store_true", help="each node, and the login node, a kernel of its own")
    add("--site", choices=list(SITES), help="configured as particular sites have it")
    add("--accounting", action="store_true", help="slurmdbd and a MariaDB of its own, so that sacct answers")
    add(
        "--min-job-age",
        type=between(2, 86400),
        default=300,
        metavar="S",
        help="seconds for which squeue knows an ended job (default: %(default)s)",
    )
    add(
        "--set",
        action="append",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="a line for slurm.conf; repeatable",
    )
    add("--ssh", action="store_true", help="sshd of a login node, of each compute node, and of a jump host")
    add(
        "--sshd-option",
        action="append",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="an option for the login node's sshd; repeatable",
    )
    add("--login-shell", choices=SHELLS, default=SHELLS[0], help="what users get by SSH (default: %(default)s)")
    add("--no-install", action="store_true", help="do not install what is missing")


def settled(shape: Shape, slurm: str | None, kernels: bool) -> Shape:
    """With what was left open; a release that is the machine's own needs no root."""
    chosen = slurm or (own() if kernels else "")
    if kernels and chosen not in RELEASES:
        chosen = KERNELS_RELEASE
    if chosen == own() and not kernels:
        chosen = ""
    if (chosen or kernels) and (shape.ssh or shape.accounting):
        raise Failed("--ssh and --accounting are for this machine's own release, without --kernels", 2)
    if kernels and (shape.nodes or 2) > 4:
        raise Failed("--kernels: 4 nodes at most", 2)
    if kernels and shape.proctrack == "cgroup" and RELEASES[chosen].numbers < (22, 5):
        raise Failed(f"Slurm {chosen} knows no control groups of version 2, which kernels of their own have", 2)
    nodes = shape.nodes or (2 if kernels else 4)
    proctrack = shape.proctrack or ("cgroup" if kernels else TRACKERS[0])
    return replace(shape, nodes=nodes, proctrack=proctrack, slurm=chosen, kernels=kernels)


def run(asked: argparse.Namespace) -> int:
    cluster = find(asked.name)
    if asked.verb == "up":
        words = ("nodes", "gpus", "cpus", "proctrack", "accounting", "min_job_age", "ssh", "login_shell")
        options = tuple(asked.sshd_option)
        if (options or asked.login_shell != SHELLS[0]) and not asked.ssh:
            raise Failed("--sshd-option and --login-shell are of use with --ssh only", 2)
        values = {word: getattr(asked, word) for word in words}
        shape = Shape(**values, settings=tuple(asked.set), sshd_options=options, site=asked.site or "")
        up(cluster, settled(shape, asked.slurm, asked.kernels), not asked.no_install)
    elif asked.verb == "down":
        down(cluster)
    elif asked.verb == "status":
        return status(cluster, asked.json)
    elif asked.verb == "exec":
        execute(cluster, asked.node, asked.user, asked.command)
    elif asked.verb == "node":
        node(cluster, asked.node, asked.deed, asked.seconds)
    elif asked.verb == "keep":
        keep(cluster)
    else:
        print_env(cluster)
    return 0


def main() -> int:
    os.environ["PATH"] = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"
    os.umask(0o022)  # daemons and users read what is written here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that an interrupted `up` takes itself down
    try:
        return run(parser().parse_args())
    except Failed as failure:
        print(f"minicluster: {failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print("minicluster: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
