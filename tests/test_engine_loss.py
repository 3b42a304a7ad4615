"""Calls whose connection was lost, and that somebody gives up while the head is asked about them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from slurmfork.engine import loss
from slurmfork.engine.pending import CallFuture, Pending
from slurmfork.messages import WorkerView
from slurmfork.names import WorkerState


class Head:
    """Says that its worker has failed."""

    run_id = "demo-abc234"
    credentials_directory = Path()

    def __init__(self, view: WorkerView) -> None:
        self.view = view

    def engine_views(self, role: str) -> list[WorkerView]:
        return [self.view]


class GivenUp(Pending):
    """One that another thread gives up at the very moment at which it is looked at."""

    calls: loss.Calls

    @property
    def worker(self) -> str:
        self.calls.pop(1, None)
        return "actor/0"

    @worker.setter
    def worker(self, name: str) -> None:
        pass


async def test_a_call_that_is_given_up_meanwhile_keeps_no_other_from_its_error() -> None:
    view = WorkerView(worker="actor/0", role="actor", index=0, state=WorkerState.FAILED, exit_status=7)
    other = CallFuture(2, lambda number: None)
    given_up = GivenUp("actor/0", ())
    given_up.calls = calls = {1: given_up, 2: Pending("actor/0", (), other)}

    async def again() -> bool:
        return False

    assert not await asyncio.wait_for(loss.settled(Head(view), view, [calls], "gone", again), 60)
    assert "exit status 7" in str(other.exception(0))
