"""The engines' figures: calls, starts, arrays, and why one forks; beside Ray's actors where Ray can be had."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benches import across, plot, spinning

HERE = Path(__file__).resolve().parent
RAY = "ray==2.60.0"
MEBIBYTES = 256
STARTS = 5


def ray_python() -> str | None:
    """A Python that has Ray, in an environment of its own that is kept; None where it cannot be installed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slurmfork-tests" / "ray"
    python = cache / "bin" / "python"
    if not (cache / ".complete").exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(cache)], check=True, timeout=120)
            install = [str(python), "-m", "pip", "-q", "--disable-pip-version-check", "install", RAY, "numpy"]
            subprocess.run(install, check=True, timeout=1800)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"bench: Ray is not measured beside: {error}")
            return None
        (cache / ".complete").touch()
    return str(python)


def beside_ray() -> dict[str, Any]:
    """Ray's figures, measured now; empty without Ray."""
    python = ray_python()
    if python is None:
        return {}
    done = subprocess.run(
        [python, str(HERE / "ray_actors.py"), str(MEBIBYTES)], stdout=subprocess.PIPE, timeout=600, check=False
    )
    if done.returncode:
        print(f"bench: Ray is not measured beside: its part ended with {done.returncode}")
        return {}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"bench: beside Ray {found['version']}")
    return found


def spec(fork: bool) -> str:
    """Two roles of one worker each, the second colocated with the first."""
    shown = "true" if fork else "false"
    return f"""name: bench
nodes: 1
roles:
  rollout: {{engine: "work:Work", cwd: {HERE}}}
  eval: {{engine: "work:Work", strategy: {{type: colocation, target: rollout, fork: {shown}}}}}
  late: {{engine: "work:Work", strategy: {{type: colocation, target: rollout}}, autostart: false}}
"""


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(bench: Any) -> None:
    """All of them; ``bench`` is scripts/bench's."""
    rays = beside_ray()
    with bench.run(spec(True), "local") as run:
        starts = []
        for _ in range(5):
            starts.append(seconds(lambda: first_call(run)))
            run.stop("late")
        add(bench, "engine worker, created to first answer", statistics.median(starts), "s", rays, "created", "<= 0.4")
        worker = run.role("rollout").worker(0)
        worker.call("empty")
        calls = [1000 * seconds(lambda: worker.call("empty")) for _ in range(1000)]
        add(bench, "empty call, median", statistics.median(calls), "ms", rays, "call", "<= 0.6")
        rates = [4000 / seconds(lambda: many(worker)) for _ in range(5)]
        add(bench, "calls with 1,000 in flight", statistics.median(rates), "per s", rays, "rate", ">= 2")
        with contextlib.suppress(ImportError):
            arrays(bench, worker, rays)
            across_nodes(bench, run)
    two_roles(bench)


def across_nodes(bench: Any, run: Any) -> None:
    ours, bare = across.rates(run, "rollout")
    name = f"{across.MEBIBYTES} MiB to a worker of another node, by TLS"
    bench.add(name, statistics.median(ours), "MiB/s", "a bare TLS stream", statistics.median(bare), bound=">= 0.7")


def two_roles(bench: Any) -> None:
    """Two busy roles in two processes, and in one; beside what the machine gives to two bare processes, and threads.

    All of them are started several times: the same program is some percent quicker in one process than in another.
    """
    rates: dict[str, list[float]] = {}
    for _ in range(STARTS):
        with (
            bench.run(spec(True), "local") as forked,
            bench.run(spec(False), "local") as shared,
            spinning.bare() as bare,
        ):
            kinds = {"fork: true": spinning.roles(forked), "fork: false": spinning.roles(shared), **bare}
            for kind, found in spinning.throughputs(kinds).items():
                rates.setdefault(kind, []).extend(found)
    middle = {name: statistics.median(found) / 1e6 for name, found in rates.items()}
    unit = "M rounds/s"
    name = "pure Python in two roles, fork: true"
    bench.add(name, middle["fork: true"], unit, "fork: false", middle["fork: false"], bound=">= 1.9")
    bench.add(name, middle["fork: true"], unit, "bare threads", middle["bare threads"])
    bench.add("the same in two bare processes", middle["bare processes"], unit, "bare threads", middle["bare threads"])
    if bench.plot is not None:
        plot.throughputs(bench.plot, rates)


def add(bench: Any, name: str, value: float, unit: str, rays: dict[str, Any], key: str, bound: str) -> None:
    if rays:
        bench.add(name, value, unit, "Ray", rays[key], bound=bound)
    else:
        bench.add(name, value, unit)


def first_call(run: Any) -> None:
    run.fork("late")
    run.role("late").worker(0).call("empty")


def many(worker: Any) -> None:
    for _ in range(4):
        for future in [worker.submit("empty") for _ in range(1000)]:
            future.result()


def arrays(bench: Any, worker: Any, rays: dict[str, Any]) -> None:
    import numpy

    array = numpy.ones(MEBIBYTES << 20, numpy.uint8)
    trips = [1000 * seconds(lambda: worker.call("echo", array)) for _ in range(7)]
    name = f"{MEBIBYTES} MiB to a worker and back"
    add(bench, name, statistics.median(trips), "ms", rays, "trip", "<= 1")
    from slurmfork.engine import shared

    for kib in (16, 64, 256, 1024, 4096):
        call = partial(worker.call, "echo", numpy.ones(kib << 10, numpy.uint8))
        took = {}
        for way, least in (("shared", 0), ("socket", 1 << 60)):
            kept, shared.LEAST = shared.LEAST, least  # this side's; the answer comes by the host's own choice
            took[way] = statistics.median(1e6 * seconds(call) for _ in range(200))
            shared.LEAST = kept
        bench.add(f"{kib} KiB there by shared memory", took["shared"], "us", "the socket", took["socket"])
