"""Ray's side of the engines' figures: run by a Python that has Ray, prints one JSON document.

python ray_actors.py MIB
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy
import ray


@ray.remote(num_cpus=0)
class Work:
    def empty(self) -> None:
        return None

    def echo(self, value: object) -> object:
        return value


def created() -> float:
    """Seconds from asking for an actor to its first answer."""
    began = time.perf_counter()
    actor = Work.remote()
    ray.get(actor.empty.remote())
    took = time.perf_counter() - began
    ray.kill(actor)
    return took


def main(mebibytes: int) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    starts = [created() for _ in range(5)]
    actor = Work.remote()
    ray.get(actor.empty.remote())
    calls = []
    for _ in range(1000):
        began = time.perf_counter()
        ray.get(actor.empty.remote())
        calls.append(1000 * (time.perf_counter() - began))
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(4):
            ray.get([actor.empty.remote() for _ in range(1000)])
        rates.append(4000 / (time.perf_counter() - began))
    array = numpy.ones(mebibytes << 20, numpy.uint8)
    trips = []
    for _ in range(7):
        began = time.perf_counter()
        back = ray.get(actor.echo.remote(array))
        trips.append(1000 * (time.perf_counter() - began))
        assert back[-1] == 1
        del back
    told = {"created": starts, "call": calls, "rate": rates, "trip": trips, "version": ray.__version__}
    print(json.dumps({name: statistics.median(x) if isinstance(x, list) else x for name, x in told.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
