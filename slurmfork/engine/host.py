"""The host: a worker's process that makes one object of a class, and serves calls of its methods until it is ended.

Ready when the object is made. Told to end, it takes no further calls, lets what runs come to its end, has the objects
close themselves, and leaves. Its output is the worker's log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import traceback
from typing import Any

import uvloop

from slurmfork.engine import hosting
from slurmfork.engine.door import Door
from slurmfork.engine.hosted import Engines
from slurmfork.engine.hosting import Hosting
from slurmfork.notify import ENDPOINTS, notify


class Host:
    """One process's engines. ``run`` returns its exit status."""

    def __init__(self, told: Hosting) -> None:
        self._told = told
        self._engines = Engines(told.worker)
        self._door = Door(told, self._engines)
        self._stop = asyncio.Event()
        self._made = False
        self._saving: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """From the first word to the last."""
        loop = asyncio.get_running_loop()
        for number in {signal.SIGTERM, signal.SIGINT, signal.Signals[f"SIG{self._told.stop}"]}:
            loop.add_signal_handler(number, self._signalled, number)
        if self._told.checkpoint is not None:
            loop.add_signal_handler(signal.Signals[f"SIG{self._told.checkpoint}"], self._warned)
        endpoints = self._door.open()
        try:
            await self._engines.create(
                self._told.worker, "", self._told.path, self._arguments, pickle=self._told.pickle
            )
        except Exception as error:
            traceback.print_exception(_without_us(error))
            return 1
        self._made = True
        notify(f"{ENDPOINTS}={' '.join(endpoints)}\nREADY=1")
        await self._stop.wait()
        await self._engines.close()
        self._door.close()
        return 0

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return self._told.args, self._told.kwargs

    def _warned(self) -> None:
        """The run is about to end. A constructor that still runs has nothing to save."""
        if self._made and self._saving is None:
            self._saving = asyncio.ensure_future(self._engines.checkpoint())
            self._saving.add_done_callback(self._saved)

    def _saved(self, task: asyncio.Task[None]) -> None:
        self._saving = None

    def _signalled(self, number: signal.Signals) -> None:
        self._stop.set()
        self._engines.closing = True
        if not self._made:  # the constructor cannot be interrupted: end as any program does of this signal
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _without_us(error: Exception) -> Exception:
    """The exception with a traceback that begins in the user's own code, if it gets there."""
    trace = error.__traceback__
    here = os.path.dirname(__file__)  # noqa: PTH120 (light)
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(here):
        trace = trace.tb_next
    return error.with_traceback(trace or error.__traceback__)


def main() -> int:
    """Be the host that the environment describes."""
    text = os.environ.pop(hosting.VARIABLE, None)
    if text is None:
        print("slurmfork: a host of engines is started by its agent, for a role with `engine:`", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # the log is read while it grows
    told = hosting.decode(text)
    status = uvloop.run(_run(told))
    sys.stdout.flush()
    return status


async def _run(told: Hosting) -> int:
    return await Host(told).run()
