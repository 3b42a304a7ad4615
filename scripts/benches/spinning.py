"""What two busy threads, and two busy processes, get done on this machine without slurmfork; and with it.

``python spinning.py THREADS`` spins for SECONDS in each of its threads for each line that it reads, and prints a line
with what each did. A window is a length of time and not an amount of work: what one of two has left to do when the
other is through would count against both.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

if __name__ == "__main__":  # beside this file, as engines find it in their working directory
    from work import Work
else:
    from benches.work import Work

SECONDS, WINDOWS = 0.4, 8
Spin = tuple[int, float, float]  # rounds, began, ended


def main(threads: int) -> None:
    work = Work()
    with ThreadPoolExecutor(threads) as pool:
        for _ in sys.stdin:
            those = [pool.submit(work.spin, SECONDS) for _ in range(threads)]
            print(json.dumps([one.result() for one in those]), flush=True)


class Bare:
    """A process of this file, started beforehand."""

    def __init__(self, threads: int) -> None:
        argv = [sys.executable, __file__, str(threads)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")

    def spins(self) -> list[Spin]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("bench: a bare process has ended")
        return [tuple(one) for one in json.loads(line)]

    def end(self) -> None:
        self._process.communicate("")


@contextlib.contextmanager
def bare() -> Iterator[dict[str, Callable[[], list[Spin]]]]:
    """By name, what keeps two threads busy, and two processes."""
    alone, other, both = those = [Bare(1), Bare(1), Bare(2)]

    def window(*busy: Bare) -> list[Spin]:
        for one in busy:
            one.begin()
        return [spin for one in busy for spin in one.spins()]

    try:
        yield {"bare processes": lambda: window(alone, other), "bare threads": lambda: window(both)}
    finally:
        for one in those:
            one.end()


def roles(run: Any) -> Callable[[], list[Spin]]:
    """What keeps both roles of a run busy."""
    workers = [run.role(name).worker(0) for name in ("rollout", "eval")]

    def window() -> list[Spin]:
        return [future.result() for future in [worker.submit("spin", SECONDS) for worker in workers]]

    return window


def throughputs(kinds: dict[str, Callable[[], list[Spin]]]) -> dict[str, list[float]]:
    """Rounds a second (of both together) of each kind, in windows that take turns; the first of each is not counted."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(WINDOWS + 1):
        for name, window in kinds.items():
            spins = window()
            took = max(ended for _, _, ended in spins) - min(began for _, began, _ in spins)
            found[name].append(sum(rounds for rounds, _, _ in spins) / took)
    return {name: rates[1:] for name, rates in found.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]))
