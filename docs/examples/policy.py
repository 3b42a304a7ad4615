"""Engines for loop.yaml: a softmax policy over a few actions, learned by REINFORCE; plain classes and NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEATURES, ACTIONS = 4, 3
TRUTH = np.random.default_rng(0).normal(size=(FEATURES, ACTIONS))  # what the game rewards


@dataclass
class Batch:
    """Games that were played: what was seen (float64, games x FEATURES), done (int64) and given (float64)."""

    seen: np.ndarray
    done: np.ndarray
    given: np.ndarray


def probabilities(weights: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Of each action in each game (games x ACTIONS)."""
    scores = np.exp(seen @ weights - (seen @ weights).max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


class Rollout:
    """Plays with the weights that it was given last. The same seed, index and step make the same games."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.weights = np.zeros((FEATURES, ACTIONS))

    def update(self, weights: np.ndarray) -> None:
        self.weights = weights

    def play(self, index: int, step: int, games: int) -> Batch:
        random = np.random.default_rng([self.seed, index, step])
        seen = random.normal(size=(games, FEATURES))
        chances = probabilities(self.weights, seen).cumsum(axis=1)
        done = (random.random((games, 1)) > chances).sum(axis=1)
        given = (done == (seen @ TRUTH).argmax(axis=1)).astype(float)
        return Batch(seen, done, given)

    def score(self, index: int, step: int, games: int) -> float:
        """The mean reward."""
        return float(self.play(index, step, games).given.mean())


class Actor:
    """Holds the weights, and learns."""

    def __init__(self) -> None:
        self.weights = np.zeros((FEATURES, ACTIONS))

    def gradient(self, batch: Batch) -> np.ndarray:
        """Of the mean reward, by what was played."""
        chosen = np.eye(ACTIONS)[batch.done] - probabilities(self.weights, batch.seen)
        return batch.seen.T @ (chosen * (batch.given - batch.given.mean())[:, None]) / len(batch.done)

    def apply(self, gradient: np.ndarray, rate: float) -> np.ndarray:
        """Go that way; the weights then."""
        self.weights = self.weights + rate * gradient
        return self.weights


class Reference:
    """The policy as it was at first."""

    def __init__(self) -> None:
        self.weights = np.zeros((FEATURES, ACTIONS))

    def divergence(self, weights: np.ndarray, batch: Batch) -> float:
        """How far (KL, in nats) a policy has come from it, over the games of a batch."""
        new, old = probabilities(weights, batch.seen), probabilities(self.weights, batch.seen)
        return float((new * np.log(new / old)).sum(axis=1).mean())
