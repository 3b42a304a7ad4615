"""The engine that scripts/bench hosts."""

from __future__ import annotations

import time

ROUNDS = 20_000  # between two looks at the clock: about 2 ms


class Work:
    """Does nothing, gives back what it got, or keeps a core busy in pure Python."""

    def empty(self) -> None:
        return None

    def echo(self, value: object) -> object:
        return value

    def take(self, value: object) -> None:
        return None

    def spin(self, seconds: float) -> tuple[int, float, float]:
        """Rounds of pure Python that were done in so many seconds, and when they began and ended (CLOCK_MONOTONIC)."""
        total, done, began = 0, 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            for number in range(ROUNDS):
                total += number * number % 7
            done += ROUNDS
        return done, began, time.perf_counter()
