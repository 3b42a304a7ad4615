"""A controller: a small reinforcement-learning loop by the scheduler API, the same on a laptop, Slurm and Ray.

python loop.py loop.yaml local      (or slurm, or ray; in docs/examples, where policy.py is)
"""

import asyncio
import hashlib
import sys

import numpy as np

import slurmfork

GAMES, STEPS, RATE = 500, 5, 4.0


async def learn(scheduler: slurmfork.Scheduler) -> np.ndarray:
    """Play, learn, and meanwhile evaluate what was learned a step before."""
    actor, rollout = scheduler.role("actor"), scheduler.role("rollout")
    reference, evaluation = scheduler.role("reference"), scheduler.role("eval")
    weights = (await actor.acall("apply", 0.0, RATE))[0]
    for step in range(STEPS):
        await asyncio.gather(rollout.acall("update", weights), evaluation.acall("update", weights))
        scores = asyncio.create_task(evaluation.ascatter("score", [(0, step, GAMES), (1, step, GAMES)]))
        batches = await rollout.ascatter("play", [(0, step, GAMES), (1, step, GAMES)])
        distance = await reference.ascatter("divergence", [(weights, batch) for batch in batches])
        gradient = sum(await actor.ascatter("gradient", batches)) / len(batches)
        weights = (await actor.acall("apply", gradient, RATE))[0]
        reward = np.mean([batch.given.mean() for batch in batches])
        print(f"step {step}: reward {reward:.4f}, eval {np.mean(await scores):.4f}, kl {np.mean(distance):.6f}")
    return weights


def main(spec: str, backend: str) -> None:
    with slurmfork.Scheduler(spec, backend=backend) as scheduler:
        for role in ("actor", "rollout"):  # devices of their own
            scheduler.create_workers(role)
        scheduler.fork_workers("reference", "actor")  # on those devices, in processes of their own
        scheduler.fork_workers("eval", "rollout")
        for role in ("actor", "reference", "rollout", "eval"):
            for worker in scheduler.get_workers(role):
                print(f"{worker.id} on {worker.node}, GPUs {worker.gpus}, beside {worker.target}", file=sys.stderr)
        weights = asyncio.run(learn(scheduler))
        scheduler.delete_workers("eval")  # their processes end, the rollouts' go on
        final = scheduler.call_engine("rollout/0", "score", 0, STEPS, GAMES)
        print(f"at the end: {final:.4f}, weights {hashlib.sha256(weights.round(9).tobytes()).hexdigest()[:16]}")
        scheduler.delete_workers()


if __name__ == "__main__":
    main(*sys.argv[1:])
