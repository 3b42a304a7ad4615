"""When a node counts as lost: after its lease, or as soon as its guardian is known to have ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from slurmfork.head import absentees
from slurmfork.head import members as rooms
from slurmfork.head.absentees import BatchLog
from slurmfork.head.members import Members
from slurmfork.link import Link
from slurmfork.orders import Join
from slurmfork.rundir import RunDir

LONG, PATIENCE = 1000.0, 30.0


async def nobody(*_: Any) -> None:
    """Answers nothing."""


class Answering(Link):
    """One that is not connected, and answers at once."""

    def __init__(self) -> None:
        super().__init__(nobody)
        self.asked: asyncio.Queue[str] = asyncio.Queue()

    async def ask(self, op: str, *_: Any, **__: Any) -> Any:
        self.asked.put_nowait(op)


class House:
    """Members without connections, and the batch log that tells of ends."""

    def __init__(self, directory: Path) -> None:
        self.rundir = RunDir(directory / "run")
        self.rundir.make()
        self.lost: list[str] = []
        self.members = Members(
            "run",
            2,
            {},
            on_join=lambda view: None,
            on_lost=self.lost.append,
            on_silence=lambda node, silent: None,
            on_notice=lambda node, op, body: None,
            on_api=nobody,
            end_of=BatchLog(self.rundir).end_of,
        )
        self.links = {node: self.join(node) for node in ("n1", "n2")}

    def join(self, node: str) -> Answering:
        link = Answering()
        join = Join(
            node=node,
            hostname=node,
            address="",
            devices=[],
            cpus=1,
            agent_pid=2,
            guardian_pid=1,
            boot_id="b",
            guarantee="rings",
            version="v",
        )
        self.members.joined(join, link)
        return link

    async def end_link(self, node: str) -> None:
        self.links[node].close()
        await asyncio.wait_for(self.members.left(node, self.links[node]), PATIENCE)

    def say(self, *lines: str) -> None:
        with self.rundir.batch_log.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(rooms, "LEASE", LONG)
    monkeypatch.setattr(rooms, "SETTLE", 0.01)
    monkeypatch.setattr(absentees, "LOOK_S", 0.01)
    return House(tmp_path)


@pytest.mark.parametrize(
    "word", ["slurmfork: the agent of n1 ended with 137", "srun: error: n1: task 0: Exited with exit code 137"]
)
async def test_the_others_do_not_wait_for_a_node_whose_guardian_has_ended(house: House, word: str) -> None:
    ending = asyncio.ensure_future(house.end_link("n1"))
    house.say("whatever", word)
    await ending
    assert house.lost == ["n1"]


async def test_a_lost_link_alone_has_its_lease(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.say("slurmfork: the agent of n2 ended with 137")
    monkeypatch.setattr(rooms, "LEASE", 0.1)
    await house.end_link("n1")
    assert house.lost == ["n1"]
    monkeypatch.setattr(rooms, "LEASE", LONG)
    waiting = asyncio.ensure_future(house.members.left("n1", house.links["n1"]))
    assert (await asyncio.wait([waiting], timeout=0.2))[1] == {waiting}
    waiting.cancel()


async def test_who_came_back_is_not_lost(house: House) -> None:
    house.say("slurmfork: the agent of n1 ended with 137")
    house.links["n1"].close()
    house.join("n1")
    await asyncio.wait_for(house.members.left("n1", house.links["n1"]), PATIENCE)
    assert house.lost == []


async def test_the_last_node_is_left_to_the_launcher(house: House) -> None:
    house.links["n2"].close()
    house.say("slurmfork: the agent of n1 ended with 137")
    ending = asyncio.ensure_future(house.end_link("n1"))
    assert (await asyncio.wait([ending], timeout=0.2))[1] == {ending}
    assert house.lost == []
    ending.cancel()


async def test_an_agent_is_asked_at_once_whether_it_is_there_when_the_run_ends(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "PING_INTERVAL", LONG)
    link = house.links["n1"]
    asking = asyncio.ensure_future(house.members.stay_in_touch("n1", link))
    await asyncio.wait_for(link.asked.get(), PATIENCE)
    house.members.close()
    assert await asyncio.wait_for(link.asked.get(), PATIENCE) == "ping"
    asking.cancel()


async def test_of_what_srun_complains_the_node_is_what_counts(house: House) -> None:
    log = BatchLog(house.rundir)
    house.say(
        "srun: error: Task launch for StepId=3.0 failed on node n2: Job credential expired",
        "srun: error: Application launch failed: Job credential expired",
        "srun: error: n1: task 0: Exited with exit code 1",
        "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.",
    )
    assert await log.trouble() == "Task launch for StepId=3.0 failed on node n2: Job credential expired"
