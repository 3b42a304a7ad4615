"""A controller beside a trial, in a process of its own: it calls a role's engines until the run is over.

``python caller.py`` reads a line of JSON {root, run_id, role}, and ends when its standard input does: with 0 if all
that it ever called was answered, or failed as it should; else with a traceback.
"""

from __future__ import annotations

import json
import select
import sys
import time
from concurrent.futures import Future
from typing import Any

from slurmfork.errors import SlurmforkError
from slurmfork.run import Run

LARGE = bytes(2 * 1024 * 1024)  # goes by shared memory
PAUSE_S = 0.2


def over() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def calls(role: Any) -> list[Future[Any]]:
    """Some of each kind, of all workers: what comes to an end, what waits for its turn, what never ends by itself."""
    found: list[Future[Any]] = []
    for worker in role.workers:
        found += [worker.submit("works", 0.05), worker.submit("echo", LARGE), worker.submit("waits")]
    return found


def main() -> int:
    told = json.loads(sys.stdin.readline())
    answered, failed = 0, 0
    begun: list[Future[Any]] = []
    while not over():
        begun = []
        try:
            role = Run.load(told["run_id"], told["root"]).role(told["role"])
            begun = calls(role)
            with role.worker(0).stream("numbers") as numbers:
                next(numbers)
            while not over() and not any(future.done() and future.exception() for future in begun):
                role.call("echo", LARGE)
                answered += 1
                time.sleep(PAUSE_S)
        except SlurmforkError:
            failed += 1
            time.sleep(PAUSE_S)
        for future in begun:  # who waits is answered, or told that there will be no answer
            if not over():
                _ended(future)
    for future in begun:
        _ended(future)
    print(f"{answered} rounds answered, {failed} failed")
    return 0


def _ended(future: Future[Any]) -> None:
    error = future.exception()
    if error is not None and not isinstance(error, SlurmforkError):
        raise error


if __name__ == "__main__":
    sys.exit(main())
