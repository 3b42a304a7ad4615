"""The engine that scripts/bench hosts."""

from __future__ import annotations


class Work:
    """Does nothing, gives back what it got, or keeps a core busy in pure Python."""

    def empty(self) -> None:
        return None

    def echo(self, value: object) -> object:
        return value

    def take(self, value: object) -> None:
        return None

    def spin(self, rounds: int) -> int:
        total = 0
        for number in range(rounds):
            total += number * number % 7
        return total
