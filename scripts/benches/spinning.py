"""What two busy threads, and two busy processes, get done on this machine without slurmfork; and with it.

``python spinning.py THREADS`` spins CALLS times in each of its threads for each line that it reads, and prints a line.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":  # beside this file, as engines find it in their working directory
    from work import Work
else:
    from benches.work import Work

SPIN, CALLS, WINDOWS = 2_000_000, 4, 9


def main(threads: int) -> None:
    work = Work()

    def spin() -> None:
        for _ in range(CALLS):
            work.spin(SPIN)

    for _ in sys.stdin:
        those = [threading.Thread(target=spin) for _ in range(threads)]
        for one in those:
            one.start()
        for one in those:
            one.join()
        print(flush=True)


class Bare:
    """A process of this file, started beforehand."""

    def __init__(self, threads: int) -> None:
        argv = [sys.executable, __file__, str(threads)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")

    def await_end(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            sys.exit("bench: a bare process has ended")

    def end(self) -> None:
        self._process.communicate("")


@contextlib.contextmanager
def bare() -> Iterator[dict[str, Callable[[], None]]]:
    """By name, what keeps two threads busy, and two processes."""
    alone, other, both = those = [Bare(1), Bare(1), Bare(2)]

    def window(*busy: Bare) -> None:
        for one in busy:
            one.begin()
        for one in busy:
            one.await_end()

    try:
        yield {"bare processes": lambda: window(alone, other), "bare threads": lambda: window(both)}
    finally:
        for one in those:
            one.end()


def roles(run: Any) -> Callable[[], None]:
    """What keeps both roles of a run busy."""
    workers = [run.role(name).worker(0) for name in ("rollout", "eval")]

    def window() -> None:
        for future in [worker.submit("spin", SPIN) for worker in workers for _ in range(CALLS)]:
            future.result()

    return window


def throughputs(kinds: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Rounds a second (in all) of each kind, in windows that take turns; the first of each is not counted."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(WINDOWS + 1):
        for name, window in kinds.items():
            began = time.perf_counter()
            window()
            found[name].append(2 * CALLS * SPIN / (time.perf_counter() - began))
    return {name: rates[1:] for name, rates in found.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]))
