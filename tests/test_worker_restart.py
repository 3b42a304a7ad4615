"""A worker that ends before whoever had it started again hears of the start, which no real process does at will."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agent_rig import order
from processes import PATIENCE

from slurmfork import process
from slurmfork.agent.starter import Launch
from slurmfork.agent.worker import Worker
from slurmfork.names import WorkerState
from slurmfork.spec import Restart


class Starter:
    """Starts nothing: each process is there, and has ended with 4, when its start is told."""

    def __init__(self) -> None:
        self.starts = 0
        self.exited: Callable[[int], None]

    async def start(self, launches: list[Launch], launched: Callable[[], None]) -> None:
        self.starts += 1
        launches[0].leader = process.identify(os.getpid())
        launched()
        self.exited(4)
        await asyncio.sleep(0)

    def note(self, entry: object) -> None:
        """No journal is kept."""


@pytest.mark.parametrize("restarts", [1, 3])
async def test_an_end_at_the_moment_of_a_restart_is_an_end_like_any_other(tmp_path: Path, restarts: int) -> None:
    starter, nothing = Starter(), lambda *_: None
    log = tmp_path / "a-0.log"
    log.touch()
    site: Any = SimpleNamespace(
        node=SimpleNamespace(name="n0", rundir=SimpleNamespace(worker_log=lambda role, index: log)),
        trees=SimpleNamespace(enter=nothing, leave=nothing, of=lambda *_: []),
        ports=SimpleNamespace(release=nothing),
        scratch=SimpleNamespace(set_aside=nothing),
        starter=starter,
        tell=nothing,
        reap=nothing,
        closing=False,
    )
    worker = Worker(order("a/0", ["unused"], restart=Restart(policy="on-failure", max=restarts, backoff=0.0)), site)
    outfit: Any = SimpleNamespace(notify=None, command=["unused"], values={}, environment={}, scratch=tmp_path)
    worker._outfit, starter.exited = outfit, worker.exited
    await starter.start([worker.launch()], worker.launched)

    async def over() -> None:
        while worker.live:
            await asyncio.sleep(0.01)

    await asyncio.wait_for(over(), PATIENCE)
    assert (worker.view.state, worker.view.restarts, starter.starts) == (WorkerState.FAILED, restarts, restarts + 1)
