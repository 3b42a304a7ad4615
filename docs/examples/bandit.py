"""Engines for engines.yaml: plain classes, which know nothing of slurmfork."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator


class Rollout:
    """Plays a game of chance, and is told from time to time how to play it."""

    def __init__(self, seed: int, arms: list[float]) -> None:
        self.random = random.Random(seed)
        self.arms = arms
        self.weights = [1.0] * len(arms)

    def update(self, weights: list[float]) -> None:
        self.weights = weights

    def play(self, games: int) -> list[tuple[int, float]]:
        """A list of (arm, reward), one for each game."""
        chosen = self.random.choices(range(len(self.arms)), self.weights, k=games)
        return [(arm, float(self.random.random() < self.arms[arm])) for arm in chosen]

    def games(self, count: int) -> Iterator[tuple[int, float]]:
        """The same, one by one."""
        for _ in range(count):
            yield self.play(1)[0]

    async def rest(self, seconds: float) -> str:
        """An async method: others are served meanwhile."""
        await asyncio.sleep(seconds)
        return "rested"

    def close(self) -> None:
        """Called when the worker is stopped."""
        print("weights at the end:", [round(weight, 2) for weight in self.weights])


class Evaluation(Rollout):
    """Says how well one would play with some weights."""

    def score(self, weights: list[float], games: int) -> float:
        self.update(weights)
        return sum(reward for _, reward in self.play(games)) / games
