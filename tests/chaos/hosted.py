"""What a trial's engine roles host: a class that announces itself as the other workers do, and may be awkward, too."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from chaos import worker

BEGINNINGS = {"daemon": worker.begin_daemon, "hidden": worker.begin_hidden, "scrubbed": worker.begin_scrubbed}
FOREVER_S = 3600.0


class Engine:
    """``kind``: of a daemon that it leaves; ``stubborn`` never comes to the end of its close. ``role``: its own."""

    def __init__(self, kind: str, place: str, role: str) -> None:
        self._kind = kind
        worker.place, worker.name = place, os.environ["SLURMFORK_WORKER"]
        # One that lives in its target's process is announced as a part of that.
        worker.announce("leader" if worker.name.startswith(f"{role}/") else "child")
        BEGINNINGS.get(kind, lambda: None)()

    def echo(self, value: object) -> object:
        return value

    def works(self, seconds: float) -> None:
        time.sleep(seconds)

    async def waits(self) -> None:
        await asyncio.sleep(FOREVER_S)

    def numbers(self) -> Iterator[int]:
        yield from range(1_000_000)

    def close(self) -> None:
        while self._kind == "stubborn":
            time.sleep(FOREVER_S)
