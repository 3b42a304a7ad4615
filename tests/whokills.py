"""Who kills what: a worker whose children get away from it step by step, something dies, and who of them is left.

Real runs, whose processes are known by words of their command lines that nobody else has. Nothing is cleaned up.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from processes import kill_at_once
from running import Shell

from slurmfork import process
from slurmfork.process import Identity

Strike = Callable[[], object]

KINDS = ("worker", "P", "S", "D", "E")
PATIENCE = 30.0
ISOLATIONS = ("none", "namespace")
BEGIN, END = "<!-- made by scripts/whokills -->", "<!-- end of what scripts/whokills made -->"

WORKER = """
import os, socket, subprocess, sys, time
token = sys.argv[1]
def become(kind, environment=os.environ):
    os.execve("/bin/sleep", ["sleep", f"{token}.{kind}"], environment)
def daemon(kind, shed):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            if shed:
                os.chdir("/")
                os.closerange(0, 1000)
                become(kind, {})
            become(kind)
        os._exit(0)
    os.wait()
subprocess.Popen(["/bin/sleep", f"{token}.1"])
subprocess.Popen(["/bin/sleep", f"{token}.2"], start_new_session=True)
daemon(3, False)
daemon(4, True)
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
while True: time.sleep(1000)
"""


@dataclass
class Scene:
    """A run of a worker with its children, and another worker, which stays."""

    shell: Shell
    run_id: str
    token: str

    def everyone(self) -> dict[str, Identity]:
        """Whoever of the five is there."""
        found = {}
        for pid in process.pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
                mine = [word.decode() for word in words if word.decode(errors="replace").startswith(self.token)]
                if mine and (one := process.identify(pid)):
                    found[KINDS[int(mine[0].partition(".")[2] or 0)]] = one
        return found

    def pids(self, *parts: str) -> list[int]:
        [node] = self.shell.status(self.run_id)["nodes"]
        return [_stepd(node["guardian_pid"]) if part == "slurmstepd" else node[f"{part}_pid"] for part in parts]

    def worker(self) -> int:
        pid: int = self.shell.ps(self.run_id, "w")[0]["pid"]
        return pid


def _stepd(guardian: int) -> int:
    stat = process.parse_stat(Path(f"/proc/{guardian}/stat").read_bytes())
    assert stat is not None
    assert process.name(stat.parent) == "slurmstepd", "the guardian is not srun's task"
    return stat.parent


def _kills(*parts: str) -> Callable[[Scene], Strike]:
    return lambda scene: partial(kill_at_once, *scene.pids(*parts))


def _command(*words: str) -> Callable[[Scene], Strike]:
    verb, *rest = words
    return lambda scene: partial(scene.shell.json, verb, scene.run_id, *rest)


@dataclass(frozen=True)
class Event:
    """What happens. ``aim`` finds whom it hits, and returns what does it: only that is timed.

    ``ends``: the run; a worker's death does if its role says so. ``on``: the backends where it can.
    """

    name: str
    words: str
    aim: Callable[[Scene], Strike]
    ends: bool = True
    on: tuple[str, ...] = ("local", "slurm")


def _kill_worker(scene: Scene) -> Strike:
    return partial(os.kill, scene.worker(), signal.SIGKILL)


EVENTS = [
    Event("worker-end", "worker SIGKILL, which ends the run", _kill_worker),
    Event("worker", "worker SIGKILL, the run goes on", _kill_worker, ends=False),
    Event("agent", "agent SIGKILL", _kills("agent")),
    Event("guardian", "guardian SIGKILL", _kills("guardian")),
    Event("both", "guardian and agent SIGKILL at once", _kills("guardian", "agent")),
    Event("stepd", "slurmstepd SIGKILL", _kills("slurmstepd"), on=("slurm",)),
    Event(
        "three", "slurmstepd, guardian, agent SIGKILL at once", _kills("slurmstepd", "guardian", "agent"), on=("slurm",)
    ),
    Event("stop", "stop, the run goes on", _command("stop", "w"), ends=False),
    Event("cancel", "cancel", _command("cancel")),
]


@dataclass
class Cell:
    """One try: who was left, and how long it took until nobody was. ``place``: a backend, and Slurm's tracker.

    ``after``: who was left when a run that had gone on was cancelled.
    """

    event: str
    isolation: str
    place: str
    left: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    seconds: float | None = None


SPEC = """
    name: whokills
    isolation: {isolation}
    local: {{gpus-per-node: 1}}
    roles:
      w:
        command: [{python}, -I, -S, {worker}, "{token}"]
        ready: {{notify: true, timeout: 60}}
        stop: {{grace: 1}}
        on_failure: {on_failure}
      other: {{command: [sleep, "100000"]}}
"""


@contextlib.contextmanager
def begun(shell: Shell, event: Event, isolation: str, backend: str) -> Iterator[Scene]:
    """A scene for one event; whatever of it is left afterwards is ended."""
    token = str(7 * 10**14 + secrets.randbelow(10**14))
    path = shell.directory / "whokills.py"
    path.write_text(WORKER)
    how = {"isolation": isolation, "on_failure": "end" if event.ends else "ignore"}
    text = SPEC.format(python=sys.executable, worker=path, token=token, **how)
    scene = Scene(shell, shell.ready(shell.spec(text), "--backend", backend), token)
    try:
        if missing := set(KINDS) - set(scene.everyone()):
            raise AssertionError(f"not there: {missing}")
        yield scene
    finally:
        shell.call("cancel", scene.run_id)
        for one in scene.everyone().values():
            process.send(one, signal.SIGKILL)


def measure(shell: Shell, event: Event, isolation: str, place: str, *, unawaited: str = "") -> Cell:
    """One try. For ``unawaited`` nobody waits."""
    cell = Cell(event.name, isolation, place)
    with begun(shell, event, isolation, place.partition(" ")[0]) as scene:
        strike = event.aim(scene)
        began = time.monotonic()
        strike()
        cell.left = _awaited(scene, unawaited)
        if not cell.left:
            cell.seconds = time.monotonic() - began
        elif not event.ends:
            scene.shell.json("cancel", scene.run_id)
            cell.after = _awaited(scene)
    return cell


def _awaited(scene: Scene, unawaited: str = "") -> list[str]:
    deadline = time.monotonic() + PATIENCE
    while (there := scene.everyone()).keys() - {unawaited} and time.monotonic() < deadline:
        time.sleep(0.005)
    return [kind for kind in KINDS if kind in there]


# --- the table ---------------------------------------------------------------------------------------------

NEIGHBOURS = [
    ("Ray 2.60, worker SIGKILL", "g g l l"),
    ("Ray, `ray.kill(actor)` or `ray.shutdown()`", "g g g l"),
    ("Ray, raylet SIGKILL under `ray start --block`", "g g g l"),
    ("Ray, raylet SIGKILL under `ray.init()`", "l l l l"),
    ("Ray, `ray stop --force`", "g l l l"),
    ("Ray with its subreaper option, worker SIGKILL or `ray stop`", "g g l l"),
    ("Monarch 0.7, host agent or proc SIGKILL, or `stop()`", "g l l l"),
    ("torchrun 2.13, agent SIGKILL", "l l l l"),
    ("torchrun, agent SIGTERM", "g g l l"),
    ("Parsl, manager SIGKILL", "g l l l"),
    ("Dragon, launcher SIGKILL or SIGTERM", "l l l l"),
    ("AReaL's guard, SIGKILL", "l l l l"),
]
WORDS = {"g": "gone", "l": "**lives**"}

INTRO = """A worker starts **P**, a plain `sleep`; **S**, one in a session of its own; **D**, one that forked twice,
with a `setsid` after each; and **E**, as D, that has also shed its environment, its directory and every descriptor.
Then something dies, and {patience:g} s later one looks who lives. Nobody runs `slurmfork clean`, and no cgroup
tracker of Slurm's helps. *In the run*: while that goes on, nothing tells whose it was; it ends with the run. Made by
`scripts/whokills`, of {tries} tries on {places}; **s** is the longest that it took from the signal, or from the
start of the command, with 1 s of the worker's grace. The neighbours' rows were measured once, on a like machine,
without E."""


def table(cells: list[Cell]) -> str:
    """The table in Markdown: a row for each event and isolation; of several tries whoever lived in one lives."""
    places = list(dict.fromkeys(cell.place for cell in cells))
    lines = [INTRO.format(patience=PATIENCE, tries=len(cells), places=_listed(places)), ""]
    lines += ["| what dies | worker | P | S | D | E | s |", "|---|---|---|---|---|---|---|"]
    for isolation in ISOLATIONS:
        for event in EVENTS:
            those = [cell for cell in cells if (cell.event, cell.isolation) == (event.name, isolation)]
            if those:
                lines.append(_row(f"slurmfork, `isolation: {isolation}`: {event.words}", those))
    lines += [f"| {name} | {' | '.join(WORDS[one] for one in who.split())} | - | - |" for name, who in NEIGHBOURS]
    return "\n".join(lines)


def _row(name: str, those: list[Cell]) -> str:
    words = []
    for kind in KINDS:
        left = sum(kind in cell.left for cell in those)
        lasting = sum(kind in (cell.after if _goes_on(cell) else cell.left) for cell in those)
        if lasting:
            words.append(f"{WORDS['l']} ({lasting} of {len(those)})")
        else:
            words.append("in the run" if left else WORDS["g"])
    took = [cell.seconds for cell in those if cell.seconds is not None]
    return f"| {name} | {' | '.join(words)} | {f'{max(took):.1f}' if len(took) == len(those) else '-'} |"


def _goes_on(cell: Cell) -> bool:
    return any(event.name == cell.event and not event.ends for event in EVENTS)


def _listed(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"


def put(page: str, made: str) -> str:
    """A page with the table in its place; raises ValueError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"
