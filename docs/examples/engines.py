"""A controller: learns by what rollouts play, and has evaluation say how well it goes, at the same time.

python engines.py engines.yaml local      (in docs/examples, where bandit.py is)
"""

import asyncio
import sys

import slurmfork
from slurmfork.engine import Role


def learned(games: list[tuple[int, float]], arms: int) -> list[float]:
    """Weights by what each arm has given, with a little for those that were not tried."""
    weights = [0.05] * arms
    for arm, reward in games:
        weights[arm] += reward
    return weights


def main(spec: str, backend: str) -> None:
    run = slurmfork.submit(spec, backend=backend)
    try:
        run.wait("ready")
        rollout, evaluation = run.role("rollout"), run.role("eval")
        weights = [1.0, 1.0, 1.0]
        for step in range(3):
            rollout.call("update", weights)  # on all workers
            score = evaluation.submit("score", weights, 200)  # a future, meanwhile ...
            batches = rollout.scatter("play", [100, 100])  # ... each worker with an argument of its own
            weights = learned([game for batch in batches for game in batch], 3)
            print(f"step {step}: {len(batches)} batches, score {sum(score.result()) / 2:.2f}")
        print("one by one:", len(list(rollout.worker(0).stream("games", 50))))
        print("awaited:", asyncio.run(rest(rollout)))
        try:
            rollout.worker(1).call("play", "many", timeout=10)
        except TypeError as error:
            print("as raised there:", type(error).__name__)
    finally:
        print(f"{run.cancel().survivors} survivors")


async def rest(rollout: Role) -> list[str]:
    return await rollout.acall("rest", 0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
