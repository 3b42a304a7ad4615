"""What the tests of engines host, and send."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import slurmfork
from slurmfork.engine import cancelled


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Sample:
    prompt: str
    rewards: list[float]
    extra: Any = None
    later: int = dataclasses.field(init=False, default=3)


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: int

    def __post_init__(self) -> None:
        if os.environ.get("ENGINE_CLASSES_TRAP"):
            raise AssertionError("code was run because data said so")


class Record(msgspec.Struct):
    name: str
    size: int = 0


class Mishap(Exception):
    """An error whose constructor takes other arguments than it keeps."""

    def __init__(self, what: str, *, code: int) -> None:
        super().__init__(f"{what} ({code})")
        self.code = code


class Speechless(Exception):
    """An error that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Plain:
    """Nothing that can be sent."""


class Saving:
    """Says when it is told to save itself, and takes its time for what it is at."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.steps = 0

    def step(self, count: int) -> int:
        self.steps += count
        return self.steps

    def checkpoint(self) -> None:
        with open(self._path, "a") as file:
            file.write(f"{self.steps}\n")


class Engine:
    """Does what tests ask; ``made`` tells of its making in the worker's log."""

    def __init__(self, start: int = 0, *, note: str = "", fail: bool = False, slow: float = 0.0) -> None:
        if fail:
            raise Mishap("was told to fail", code=4)
        if slow:
            time.sleep(slow)
        self.total = start
        self.thread = threading.get_ident()
        self.log: list[str] = []
        self.note = note
        print("made in", slurmfork.current().name, note)

    def add(self, amount: int = 1) -> int:
        self.total += amount
        return self.total

    def echo(self, value: Any) -> Any:
        return value

    def both(self, *args: Any, **kwargs: Any) -> Any:
        return [list(args), kwargs]

    def pid(self) -> int:
        """Its PID on the node, which is another than its own in a namespace."""
        return slurmfork.current().host_pid

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def own_thread(self) -> bool:
        return self.thread == threading.get_ident()

    def modules(self) -> list[str]:
        return list(sys.modules)

    def import_(self, name: str) -> str:
        return str(__import__(name).__file__)

    def raises(self, code: int) -> None:
        raise Mishap("it broke", code=code)

    def adds_and_raises(self, amount: int) -> None:
        self.total += amount
        raise Mishap("it broke after all", code=5)

    @property
    def broken(self) -> Any:
        raise Mishap("a property that breaks", code=9)

    def divides(self) -> float:
        return 1 / 0

    def exits(self) -> None:
        sys.exit(3)

    def neighbours(self, role: str) -> list[int]:
        """What those of another role say, asked from here."""
        pids: list[int] = slurmfork.current().engines(role).call("pid")
        return pids

    def unsendable(self) -> Any:
        return Plain()

    def dies(self, status: int) -> None:
        print("the last word", flush=True)
        os._exit(status)

    def killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def blocks(self, name: str) -> str:
        """Until the file is there, or the caller gives up; leaves a file that says which."""
        Path(f"{name}.began").touch()
        while not Path(name).exists():
            if cancelled():
                Path(f"{name}.cancelled").touch()
                return "cancelled"
            time.sleep(0.005)
        return "done"

    async def waits(self, name: str) -> str:
        Path(f"{name}.began").touch()
        try:
            while not Path(name).exists():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            Path(f"{name}.cancelled").touch()
            raise
        return "done"

    async def grows(self, amount: int) -> int:
        self.total += amount
        return self.total

    def counts(self, up_to: int) -> Iterator[int]:
        for number in range(up_to):
            self.total = number
            yield number

    def counts_forever(self, name: str) -> Iterator[int]:
        try:
            number = 0
            while True:
                self.total = number
                yield number
                number += 1
        finally:
            Path(name).touch()

    async def acounts(self, up_to: int) -> AsyncIterator[int]:
        for number in range(up_to):
            await asyncio.sleep(0)
            yield number

    def breaks_off(self) -> Iterator[int]:
        yield 1
        raise Mishap("half way", code=2)

    def speechless(self) -> None:
        raise Speechless

    def forks_and_dies(self) -> None:
        """Of SIGKILL, and what it has forked holds all that it had open."""
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        print("closed", self.note, flush=True)
